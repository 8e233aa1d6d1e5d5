"""A random subset, drawn by key: the baseline that every pruning method has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Fold, PairMethod, Verdict

REASON = "not drawn"


class Config(BaseConfig):
    """A share (`keep`) or a number (`count`) of the pairs, exactly one of the two."""

    method: Literal["random-subset"] = "random-subset"
    keep: float | None = Field(None, gt=0, le=1, description="share of the pairs that stay, each by its own draw")
    count: int | None = Field(None, ge=1, description="number of pairs that stay, exactly")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.keep is None) == (self.count is None):
            raise ValueError("exactly one of keep (a share) and count (a number of pairs)")
        return self

    def build(self, seed: int) -> RandomSubset:
        """The method; `seed` names the draws, so that a smaller subset of one seed lies inside a larger one."""
        return RandomSubset(self, seed)


@dataclass(frozen=True)
class Draws:
    """The `count` smallest words among `rows` pairs, uint64: 8 bytes a pair to keep."""

    rows: int
    word_S: NDArray[np.uint64]


class SmallestDraws(Fold):
    """Finds the largest draw that still belongs to the `count` smallest. Holds at most `16 count` bytes."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def map(self, batch: pl.DataFrame, state: Any) -> Draws:
        """The batch's smallest draws."""
        del state
        return self._smallest(batch.height, draws(batch, self.seed))

    def merge(self, left: Draws, right: Draws) -> Draws:
        """The smallest of both."""
        return self._smallest(left.rows + right.rows, np.concatenate([left.word_S, right.word_S]))

    def finish(self, partial: Draws, state: Any) -> np.uint64:
        """The `count`-th smallest draw. Raises DataError if there are fewer pairs."""
        del state
        if partial.rows < self.count:
            raise DataError.at("Fewer pairs than are to be drawn", "count", self.count, f"at most {partial.rows}, the pairs there are", "lower it")
        return np.uint64(partial.word_S.max())

    def _smallest(self, rows: int, word_N: NDArray[np.uint64]) -> Draws:
        return Draws(rows, np.partition(word_N, self.count - 1)[: self.count] if len(word_N) > self.count else word_N)


@dataclass(frozen=True)
class RandomSubset(PairMethod):
    """Keeps a pair iff its draw from `(seed, key)` is small enough. A rejected pair's score is its draw, in [0, 1)."""

    config: Config
    seed: int

    def folds(self) -> Sequence[Fold]:
        """None for a share; for a number, one that finds the threshold."""
        return [] if self.config.count is None else [SmallestDraws(self.config.count, self.seed)]

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state: nothing for a share, two sets of draws for a number."""
        del width
        return 16 * min(self.config.count or 0, rows)

    def apply(self, batch: pl.DataFrame, state: np.uint64 | None) -> Verdict:
        """The verdict on a batch; `state` is the largest draw that stays, None for a share."""
        word_N = draws(batch, self.seed)
        uniform_N = (word_N >> np.uint64(11)).astype(np.float64) * 2.0**-53
        kept_N = uniform_N < self.config.keep if self.config.keep is not None else word_N <= state
        rejected = pl.DataFrame({"key": batch["key"], "reason": pl.repeat(REASON, batch.height, eager=True), "score": uniform_N.astype(np.float32)})
        return Verdict(kept=batch.filter(kept_N), rejected=rejected.filter(~kept_N))

    def report(self, state: np.uint64 | None) -> Mapping[str, Any]:
        """The share that was asked for, or the threshold that gives the number."""
        return {"keep": self.config.keep} if state is None else {"count": self.config.count, "threshold": float(state) * 2.0**-64}


def draws(batch: pl.DataFrame, seed: int) -> NDArray[np.uint64]:
    """A uniform word `[N]` a pair, from `(seed, key)` alone."""
    return chance.mix(seed, chance.key_hashes(batch["key"]))
