"""Splits of a labelled set as adapters may see them: features in the order of the keys, and nothing that tells a label where none is due.

Shape legend: N pictures, C classes, D feature width, E width of the second encoder, K principal axes, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.chance import key_hashes, uniform
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Examples, PictureTransform
from diptych.evaluate import zero_shot
from diptych.evaluate.rows import of_split

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """A split with its labels, rising by key."""

    keys: Sequence[str]
    examples: Examples

    @property
    def label_N(self) -> Labels:
        """Class numbers `[N]`."""
        assert self.examples.label_N is not None, "every split is read with its labels"
        return self.examples.label_N

    @property
    def unlabelled(self) -> Examples:
        """The pictures without what tells their class: neither labels nor captions."""
        return replace(self.examples, label_N=None, caption_ND=None)


def take(examples: Examples, rows: Labels) -> Examples:
    """Some rows, of every array that there is."""
    return Examples(**{name: value[rows] for name, value in vars(examples).items() if value is not None})


def stacked(views: Sequence[Examples]) -> Examples:
    """Views below each other; rows of one picture keep its number."""
    present = [name for name, value in vars(views[0]).items() if value is not None]
    return Examples(**{name: np.concatenate([getattr(view, name) for view in views]) for name in present})


def draw_shots(keys: Sequence[str], label_N: Labels, classes: int, shots: int, draw: int) -> Labels:
    """Rows of `shots` pictures of each of `classes` classes, int64 `[classes * shots]` by class, drawn by `(draw, key)`.

    More shots of one draw hold the fewer ones. Raises DataError for a class that has not as many.
    """
    count_C = np.bincount(label_N, minlength=classes)
    if count_C.min() < shots:
        least = int(count_C.argmin())
        raise DataError.at(
            "A class has too few pictures for its shots", "shots", shots, f"at most {count_C.min()}: so many has class {least}",
            "ask for fewer shots, or name another split in shots_from",
        )  # fmt: skip
    order = np.lexsort((uniform(draw, key_hashes(keys)), label_N))
    first_C = np.concatenate([[0], np.cumsum(count_C)[:-1]])
    return np.asarray(order[(first_C[:, None] + np.arange(shots)).ravel()])


@dataclass(frozen=True)
class Reader:
    """Reads splits of a set.

    Attributes:
        classnames: the column of class names.
        captioned: the split whose captions are encoded too, the first of every picture; None: of no split.
        auxiliary: a second encoder, None without.
        components: principal axes that its features are projected to, None for all that it gives.
        fitted_on: the split that these axes come from.
    """

    encoder: Encoder
    pairs: pl.DataFrame
    classnames: str
    captioned: str | None = None
    auxiliary: str | None = None
    components: int | None = None
    fitted_on: str = ""

    def read(self, split: str, transform: PictureTransform | None = None) -> Pictures:
        """A split in the order of its keys. `transform` changes what the first encoder sees, not the second.

        Raises DataError for a split that is missing, lacks labels, or lacks the captions that were asked for.
        """
        found, frame = zero_shot.classes(self.pairs, split, name=self.classnames)
        order = np.argsort(np.asarray(frame["key"].to_list(), dtype=object), kind="stable")
        frame = frame[order]
        image_ND = self.encoder.images(frame, transform) if transform else self.encoder.images(frame)
        captions = self._captions(frame) if split == self.captioned else None
        examples = Examples(np.asarray(image_ND), found.label_N[order], np.arange(len(frame)), captions, self._auxiliary(frame))
        return Pictures(frame["key"].to_list(), examples)

    def _captions(self, frame: pl.DataFrame) -> NDArray[np.float32]:
        texts = [captions[0]["text"] if captions else None for captions in frame["captions"].to_list()]
        if None in texts:
            raise DataError.at("A picture has no caption", "captions", frame["key"][texts.index(None)], "a caption a picture")
        return np.asarray(self.encoder.texts([str(text) for text in texts]))

    def _auxiliary(self, frame: pl.DataFrame) -> NDArray[np.float32] | None:
        if self.auxiliary is None:
            return None
        feature_NE = self._second(frame)
        return feature_NE if self._axes is None else self._axes.project(feature_NE)

    def _second(self, frame: pl.DataFrame) -> NDArray[np.float32]:
        second: Any = getattr(self.encoder, "auxiliary", None)
        if second is None:
            raise DataError.at("This encoder has no second one beside it", "auxiliary", self.auxiliary, "an encoder over a pair dataset")
        return np.asarray(second(frame, self.auxiliary))

    @cached_property
    def _axes(self) -> Axes | None:
        if self.components is None:
            return None
        return principal_axes(self._second(of_split(self.pairs, self.fitted_on)), self.components)


class Axes(NamedTuple):
    """Principal axes: `(feature - mean) @ axis`, `mean_E` and `axis_EK` float64."""

    mean_E: NDArray[np.float64]
    axis_EK: NDArray[np.float64]

    def project(self, feature_NE: NDArray[np.float32]) -> NDArray[np.float32]:
        """The coordinates along the axes, float32 `[N, K]`."""
        return np.asarray((feature_NE - self.mean_E) @ self.axis_EK, dtype=np.float32)


def principal_axes(feature_NE: NDArray[np.float32], count: int) -> Axes:
    """The first `count` principal axes of features, all scaled by one factor: coordinates of these rows have variance 1 in the mean.

    One factor keeps the axes' proportions and makes them independent of the encoder's unit. Of an axis and its opposite, the one whose
    largest entry is positive. Raises DataError for more axes than the rows span.
    """
    mean_E = feature_NE.mean(axis=0, dtype=np.float64)
    _, singular_R, axis_RE = np.linalg.svd(feature_NE - mean_E, full_matrices=False)
    rank = int((singular_R > singular_R[0] * len(feature_NE) * np.finfo(np.float32).eps).sum())
    if count > rank:
        raise DataError.at("There are not so many principal axes", "auxiliary_pca", count, f"at most {rank}, which the rows span")
    axis_KE = axis_RE[:count]
    largest_K = axis_KE[np.arange(count), np.abs(axis_KE).argmax(axis=1)]
    spread = np.sqrt(np.square(singular_R[:count]).sum() / (len(feature_NE) * count))
    return Axes(mean_E, (axis_KE * np.sign(largest_K)[:, None]).T / spread)
