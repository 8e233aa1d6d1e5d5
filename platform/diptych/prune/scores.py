"""Which pairs a score keeps: those above a threshold, or the best share of all, found in two folds of bounded memory.

Shape legend: N pairs in a batch, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.config import Config
from diptych.core.errors import DataError
from diptych.core.points import Fold, Verdict

Floats = NDArray[np.float64]
ScoreOf = Callable[[pl.DataFrame], Floats]
BINS = 1 << 16


class Cut(Config):
    """Base of a filter's parameters: a threshold or a share, exactly one of the two."""

    threshold: float | None = Field(None, description="a pair stays if its score is at least this (at most, where low scores are good)")
    keep: float | None = Field(
        None, gt=0, le=1, description="share of the pairs with a score that stay, the best by it; ties stay together"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.keep is None) == (self.threshold is None):
            raise ValueError("exactly one of threshold and keep (a share)")
        return self


@dataclass(frozen=True)
class Bin:
    """Where the threshold lies: `need` of the scores in [low, high) stay, besides all above. `scored` pairs have a score."""

    low: float
    high: float
    need: int
    scored: int


class Histogram(Fold):
    """Counts scores in 65,536 bins and finds the bin that holds the threshold; scores above `high` or below `low` go to the end bins.

    Used twice, the second time inside the bin of the first: the threshold is then exact to `(high - low) / 2^32`, finer than float32
    tells scores in [-1, 1] apart. A partial is int64 `[1 + B]`: pairs above, then the bins. 512 KiB, however many pairs.
    """

    def __init__(self, score_of: ScoreOf, keep: float, low: float, high: float) -> None:
        self.score_of, self.keep, self.low, self.high = score_of, keep, low, high

    def map(self, batch: pl.DataFrame, state: Bin | None) -> NDArray[np.int64]:
        """The batch's counts. NaN is no score and not counted."""
        low, high = (self.low, self.high) if state is None else (state.low, state.high)
        score_N = self.score_of(batch)
        score_N = score_N[~np.isnan(score_N)]
        if state is not None:
            score_N = score_N[(bin_of(score_N, self.low, self.high) == bin_of(np.array([low + (high - low) / 2]), self.low, self.high)[0])]
        counts = np.bincount(bin_of(score_N, low, high), minlength=BINS)
        return np.concatenate([[len(score_N)], counts]).astype(np.int64)

    def merge(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts add up."""
        return left + right

    def finish(self, partial: NDArray[np.int64], state: Bin | None) -> Bin:
        """The bin of the threshold. Raises DataError if no pair has a score."""
        total, counts_B = int(partial[0]), partial[1:]
        if state is None and not total:
            raise DataError.at("No pair has a score", "score", 0, "one scored pair or more")
        low, high = (self.low, self.high) if state is None else (state.low, state.high)
        need = max(1, round(self.keep * total)) if state is None else state.need
        above_B = np.cumsum(counts_B[::-1])[::-1]  # scores in this bin or a higher one
        place = int(np.flatnonzero(above_B >= need)[-1])
        width = (high - low) / BINS
        inside = need - int(above_B[place + 1] if place + 1 < BINS else 0)
        return Bin(low + place * width, low + (place + 1) * width, inside, total if state is None else state.scored)


def bin_of(score_N: Floats, low: float, high: float) -> NDArray[np.int64]:
    """The bin of every score, int64 `[N]` in [0, 65,536)."""
    return np.clip(np.floor((score_N - low) * (BINS / (high - low))), 0, BINS - 1).astype(np.int64)


def folds(cut: Cut, score_of: ScoreOf, low: float, high: float) -> Sequence[Fold]:
    """None for a threshold; two for a share, of scores in [low, high]. Their state is a `Bin` whose `low` is the threshold."""
    if cut.keep is None:
        return []
    return [Histogram(score_of, cut.keep, low, high)] * 2


def threshold_of(cut: Cut, state: Bin | None) -> float:
    """The score from which pairs stay."""
    if cut.threshold is not None:
        return cut.threshold
    assert state is not None, "a share needs its folds"
    return state.low


def verdict(batch: pl.DataFrame, score_N: Floats, threshold: float, reason: str, missing: str, column: str | None = None) -> Verdict:
    """Splits a batch: kept are scores of at least the threshold, with the score in `column` if one is named; NaN leaves as `missing`."""
    none_N = np.isnan(score_N)
    kept_N = ~none_N & (score_N >= threshold)
    scored = batch if column is None else batch.with_columns(pl.Series(column, score_N, dtype=pl.Float32))
    why = pl.when(pl.Series(none_N)).then(pl.lit(missing)).otherwise(pl.lit(reason))
    score = pl.Series(np.where(none_N, np.nan, score_N), dtype=pl.Float32).fill_nan(None)
    return Verdict(kept=scored.filter(kept_N), rejected=batch.select("key", reason=why, score=score).filter(~kept_N))


def figures(cut: Cut, state: Bin | None) -> dict[str, Any]:
    """For the report: the threshold, and with a share how many pairs it was found among."""
    if state is None:
        return {} if cut.threshold is None else {"threshold": cut.threshold}
    return {"threshold": state.low, "keep": cut.keep, "scored": state.scored}
