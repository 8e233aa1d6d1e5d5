"""The cache classifier behind Tip-Adapter, TIP-X and CapS-Adapter, and its grid evaluated fast.

A cache of M keys answers a query with `exp(-beta (1 - A)) V`: affinities A to the keys, summed by the keys' classes (V is one-hot).
Everything is float64: near beta = 50 half precision underflows, and a grid of counts should not hang on rounding.

Shape legend: N queries, B queries of a tile, D feature width, M keys, C classes, G values of a grid. Queries come last, so that sums
over keys and maxima over classes run along whole rows of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diptych.adapt import support as parts
from diptych.core.config import Config
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

TILE_ELEMENTS = 1 << 18
"""Elements of a tile's largest array: 2 MiB, what a core's own cache holds."""

RESTART = 16
"""Products in a row before `exp` is called again: they lose at most half a unit in the last place each."""


class Grid(Config):
    """Evenly spaced values `start + i (stop - start) / steps`, i < steps: `stop` itself is left out, as the authors have it."""

    start: float = Field(ge=0, description="the first value")
    stop: float = Field(gt=0, description="where the values end; not one of them")
    steps: int = Field(ge=1, description="how many values")

    def values(self) -> Floats:
        """The values `[steps]`, rounded as the published expression rounds."""
        return np.arange(self.steps) * (self.stop - self.start) / self.steps + self.start


@dataclass(frozen=True)
class Chosen:
    """Hyper-parameters in use; `accuracy` is the fraction of validation rows they got right, None if nothing was searched."""

    alpha: float
    beta: float
    gamma: float = 0.0
    delta: float = 0.0
    accuracy: float | None = None


@dataclass(frozen=True)
class Cache:
    """The keys, ordered by class, so that multiplying by V is a sum over neighbouring rows.

    Attributes:
        key_MD: image keys, float64.
        label_M: their classes, ascending.
        classes: C; a class may be without keys.
        caption_MD: caption keys, float64, or None.
    """

    key_MD: Floats
    label_M: Labels
    classes: int
    caption_MD: Floats | None = None

    @classmethod
    def of(cls, examples: Examples, classes: int) -> Cache:
        """A cache of checked labelled examples: a key a picture, the mean over its views, normalised (once, after the mean).

        Views of a picture that differ in their label raise DataError. Without `picture_N` the rows are the keys as they come.
        """
        assert examples.label_N is not None, "examples without labels are no support"
        first_M, picture_N = _pictures(examples)
        label_M = examples.label_N[first_M]
        if (mixed_N := label_M[picture_N] != examples.label_N).any():
            row = int(np.flatnonzero(mixed_N)[0])
            expected = f"{label_M[picture_N[row]]}, as the first view of its picture"
            raise DataError.at("Views of one picture disagree", f"labelled.label_N[{row}]", int(examples.label_N[row]), expected)
        order_M = np.argsort(label_M, kind="stable")

        def pooled(feature_ND: NDArray[np.float32] | None) -> Floats | None:
            if feature_ND is None:
                return None
            exact_ND = feature_ND.astype(np.float64)
            return exact_ND[order_M] if examples.picture_N is None else _mean_views(exact_ND, picture_N)[order_M]

        key_MD = pooled(examples.feature_ND)
        assert key_MD is not None
        return cls(key_MD, label_M[order_M], classes, pooled(examples.caption_ND))

    @cached_property
    def segments(self) -> list[tuple[int, int, int]]:
        """(class, first row, row after the last) of every class that has keys."""
        present, start = np.unique(self.label_M, return_index=True)
        return list(zip(present.tolist(), start.tolist(), [*start[1:].tolist(), len(self.label_M)], strict=True))

    def class_sums(self, value_MB: Floats) -> Floats:
        """`V^T value`, `[C, B]`: sums over the keys of every class; 0 for a class without keys."""
        sums_CB = np.zeros((self.classes, value_MB.shape[1]))
        for label, start, stop in self.segments:
            np.add.reduce(value_MB[start:stop], axis=0, out=sums_CB[label])
        return sums_CB

    def logits(self, affinity_MB: Floats, betas: Sequence[float] | Floats) -> Iterator[Floats]:
        """The cache logits `exp(-beta (1 - A)) V`, `[C, B]`, of one beta after the other.

        On an evenly spaced grid the next exponential is a product, `exp(-(beta + h) x) = exp(-beta x) exp(-h x)`, several times as
        fast as `exp`.
        """
        distance_MB = 1 - affinity_MB
        decay_MB, step_MB, gap = distance_MB, distance_MB, np.nan
        for index, beta in enumerate(betas):
            if index % RESTART == 0:
                decay_MB = np.exp(-beta * distance_MB)
            else:
                previous, gap = gap, beta - betas[index - 1]
                if not np.isclose(gap, previous, rtol=1e-12, atol=0):
                    step_MB = np.exp(-gap * distance_MB)
                decay_MB *= step_MB
            yield self.class_sums(decay_MB)

    def tiles(self, rows: int, grid: int) -> Iterator[slice]:
        """Cuts `rows` queries so that neither a tile's affinities nor its scores over `grid` values outgrow `TILE_ELEMENTS`."""
        width = max(16, TILE_ELEMENTS // max(len(self.label_M), self.classes * grid))
        return (slice(start, min(start + width, rows)) for start in range(0, rows, width))


def correct(base_CB: Floats, step_GCB: Floats, label_B: Labels) -> Labels:
    """How many of B queries `argmax_c(base + step)` gets right for every value of a grid, int64 `[G]`; of equal scores the first wins."""
    score_GCB = step_GCB + base_CB
    top_GCB = score_GCB == score_GCB.max(axis=1, keepdims=True)
    if np.count_nonzero(top_GCB) > len(step_GCB) * len(label_B):
        right_GB = score_GCB.argmax(axis=1) == label_B
    else:
        right_GB = top_GCB[:, label_B, np.arange(len(label_B))]
    return np.asarray(np.count_nonzero(right_GB, axis=1))


def first_best(hits: Labels) -> tuple[int, ...] | None:
    """Where a search that demands strict improvement over no hit at all ends, in nested order of the axes; None if nothing has a hit."""
    best = np.unravel_index(int(hits.argmax()), hits.shape)
    return tuple(int(index) for index in best) if hits[best] else None


def labelled(support: Support, method: str, *, captions: bool = False) -> Examples:
    """The labelled examples, views and all, if a cache can be made of them; with `captions`, only if every row has one. Else DataError."""
    examples = support.labelled
    feature_ND = parts.labelled(support, method).feature_ND
    assert examples is not None
    where, rows = f"{method}: labelled", len(feature_ND)
    finite(feature_ND, where)
    if examples.picture_N is not None and examples.picture_N.shape != (rows,):
        raise DataError.at("Picture numbers do not match the rows", where, examples.picture_N.shape, f"shape ({rows},)")
    if captions:
        if examples.caption_ND is None:
            fix = "caption the pictures, or take an adapter without captions (sus-x)"
            raise DataError.at("The adapter needs captions", where, None, "the features of every row's caption", fix)
        if examples.caption_ND.shape != feature_ND.shape:
            raise DataError.at("Captions do not match the rows", where, examples.caption_ND.shape, f"shape {feature_ND.shape}")
        finite(examples.caption_ND, where)
    return examples


def validation(support: Support, method: str) -> parts.Labelled | None:
    """The examples to search on, None if there are none. Raises DataError for such as will not do."""
    if (found := parts.validation(support, method)) is not None:
        finite(found.feature_ND, f"{method}: validation")
    return found


def queries(test: Examples, width: int) -> NDArray[np.floating[Any]]:
    """The features `[N, D]` to classify. Raises DataError unless they are `width` wide and finite."""
    return finite(parts.features(test, width), "test")


def finite(feature_ND: NDArray[np.floating[Any]], where: str) -> NDArray[np.floating[Any]]:
    """The features; raises DataError if one is NaN or infinite, since it would spoil the scores of its whole block."""
    wrong_N = ~np.isfinite(feature_ND).all(axis=1)
    if wrong_N.any():
        row = int(np.flatnonzero(wrong_N)[0])
        raise DataError.at("A feature is not a number", f"{where}: row {row}", feature_ND[row], "finite values")
    return feature_ND


def _pictures(examples: Examples) -> tuple[Labels, Labels]:
    """The first row of every picture `[M]`, by rising picture number, and the picture `[N]` of every row, in [0, M)."""
    if examples.picture_N is None:
        rows = np.arange(len(examples.feature_ND))
        return rows, rows
    _, first_M, picture_N = np.unique(examples.picture_N, return_index=True, return_inverse=True)
    return first_M, picture_N


def _mean_views(feature_ND: Floats, picture_N: Labels) -> Floats:
    """L2-normalised means `[M, D]` of the rows of every picture. Raises DataError if views cancel out."""
    sum_MD = np.zeros((int(picture_N.max()) + 1, feature_ND.shape[1]))
    np.add.at(sum_MD, picture_N, feature_ND)
    norm_M = np.linalg.norm(sum_MD, axis=1, keepdims=True)
    if not norm_M.all():
        raise DataError.at(
            "The views of a picture cancel out", "labelled.feature_ND", "a mean of length 0", "views that resemble each other"
        )
    return np.asarray(sum_MD / norm_M)
