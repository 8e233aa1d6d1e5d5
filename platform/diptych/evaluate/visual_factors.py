"""What accuracy depends on: visual factors that some images have, and the cue, shape or texture, that a prediction follows.

Sources: Idrissi et al., ImageNet-X: Understanding Model Mistakes with Factor of Variation Annotations (ICLR 2023), for error ratios; Geirhos
et al., ImageNet-trained CNNs are biased towards texture (ICLR 2019), for shape bias and the 16 coarse classes.

Shape legend: N images, C classes, G groups of classes, F factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.errors import DataError, nearest

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

MAX_LEVELS = 100


# ---------------------------------------------------------------- visual factors


class Factors(NamedTuple):
    """Accuracy `[F]` among the images with each factor, and their error over the error of all, `[F]`. NaN for a factor without images."""

    accuracy: Floats
    error_ratio: Floats


def by_factor(mask_NF: NDArray[np.bool_], correct_N: NDArray[Any]) -> Factors:
    """How each visual factor bears on accuracy.

    Args:
        mask_NF: whether the image has the factor; an image may have several.
        correct_N: 0 or 1.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        accuracy_F = (mask_NF * np.asarray(correct_N, np.float64)[:, None]).sum(axis=0) / mask_NF.sum(axis=0)
        return Factors(accuracy_F, (1 - accuracy_F) / (1 - np.mean(correct_N, dtype=np.float64)))


# ---------------------------------------------------------------- shape bias


class Cues(NamedTuple):
    """What predictions follow where shape and texture disagree: `[n]` each, for those images alone."""

    shape_n: NDArray[np.bool_]
    texture_n: NDArray[np.bool_]

    @property
    def shape_bias(self) -> float:
        """The share of shape among the predictions that follow either; NaN if none does."""
        followed = int(self.shape_n.sum() + self.texture_n.sum())
        return float(self.shape_n.sum()) / followed if followed else np.nan

    @property
    def accuracy(self) -> float:
        """The share of predictions that follow either."""
        return float((self.shape_n | self.texture_n).mean())


def cues(predicted_N: Labels, shape_N: Labels, texture_N: Labels) -> Cues:
    """Sorts predictions by the cue that they follow; images whose shape and texture are of one class are left aside."""
    conflict = shape_N != texture_N
    return Cues((predicted_N == shape_N)[conflict], (predicted_N == texture_N)[conflict])


def coarse(prob_NC: Floats, group_C: Labels, groups: int) -> Floats:
    """Probabilities of groups of classes, `[N, G]`: the mean over a group's classes. A class of group -1 counts nowhere."""
    member_CG = (group_C[:, None] == np.arange(groups)).astype(np.float64)
    return np.asarray(prob_NC @ (member_CG / member_CG.sum(axis=0)))


# ---------------------------------------------------------------- from the columns of a set


def factor_masks(pairs: pl.DataFrame, frame: pl.DataFrame, columns: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Which rows of the frame have which factor: name -> bool `[N]`.

    Args:
        pairs: all pairs; names and levels are theirs, so that a factor may turn out empty in the frame.
        frame: the rows to mark.
        columns: of booleans (one factor), of names or numbers (a factor a level), or of lists of names (a factor a name). A null has none.

    Raises:
        DataError: a column is missing, has no level or more than 100, or two factors have one name.
    """
    masks: dict[str, NDArray[np.bool_]] = {}
    for column in columns:
        _require(frame, column, "a column of visual factors")
        for factor, mask in _column_masks(pairs[column], frame[column]):
            if factor in masks:
                raise DataError.at("Two visual factors have one name", column, factor, "names that differ in letters, digits, - or _")
            masks[factor] = mask.fill_null(value=False).to_numpy()
    return masks


def _column_masks(whole: pl.Series, part: pl.Series) -> Iterator[tuple[str, pl.Series]]:
    name = whole.name.removeprefix("meta.")
    if whole.dtype == pl.Boolean:
        yield slug(name), part
        return
    levels = (whole.explode() if isinstance(whole.dtype, pl.List) else whole).drop_nulls().unique().sort().to_list()
    if not 0 < len(levels) <= MAX_LEVELS:
        raise DataError.at(
            "This column holds no visual factors",
            whole.name,
            f"{len(levels)} different values",
            f"1 to {MAX_LEVELS}",
            "bin the numbers first",
        )
    for level in levels:
        yield f"{slug(name)}.{slug(str(level))}", part.list.contains(level) if isinstance(part.dtype, pl.List) else part == level


def slug(name: str) -> str:
    """A name as metrics may carry it: what is no ASCII letter, digit, - or _ becomes _."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in name)


def class_numbers(frame: pl.DataFrame, column: str, names: Sequence[str]) -> Labels:
    """The place among `names` of each value of a column, int64 `[N]`. Raises DataError for a value that is none of them."""
    _require(frame, column, "a column of class names")
    place = {name: number for number, name in enumerate(names)}
    values = frame[column].cast(pl.String).to_list()
    if unknown := sorted({str(value) for value in values if value not in place}):
        raise DataError.at(
            "A cue names no class", column, unknown[:5], "a class name on every row of the split", nearest(unknown[0], names)
        )
    return np.array([place[value] for value in values], np.int64)


def group_numbers(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> Labels:
    """The group of each class, int64 `[C]`, -1 for none. Raises DataError for unknown classes and for groups that overlap or are empty."""
    group_of = {member: number for number, members in enumerate(groups.values()) for member in members}
    listed = [member for members in groups.values() for member in members]
    if unknown := sorted(set(listed) - set(names)):
        raise DataError.at(
            "A group lists a class that the set lacks", "cue_conflict.groups", unknown[:5], "class names", nearest(unknown[0], names)
        )
    if len(group_of) < len(listed) or not all(groups.values()):
        raise DataError.at("Groups of classes overlap or are empty", "cue_conflict.groups", dict(groups), "each class in one group at most")
    return np.array([group_of.get(name, -1) for name in names], np.int64)


def _require(frame: pl.DataFrame, column: str, expected: str) -> None:
    if column not in frame.columns:
        raise DataError.at(f"The set has no column {column!r}", column, frame.columns, expected, nearest(column, frame.columns))
