"""A random subset, drawn by key: the baseline that every pruning method has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.chance import key_hashes, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Fold, PairMethod, Verdict
from diptych.prune.verdicts import verdict

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
    """The `count` smallest draws among `rows` pairs, float64: 8 bytes a pair to keep."""

    rows: int
    smallest_S: NDArray[np.float64]


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
        return self._smallest(left.rows + right.rows, np.concatenate([left.smallest_S, right.smallest_S]))

    def finish(self, partial: Draws, state: Any) -> float:
        """The `count`-th smallest draw. Raises DataError if there are fewer pairs."""
        del state
        if partial.rows < self.count:
            raise DataError.at(
                "Fewer pairs than are to be drawn", "count", self.count, f"at most {partial.rows}, the pairs there are", "lower it"
            )
        return float(partial.smallest_S.max())

    def _smallest(self, rows: int, draw_N: NDArray[np.float64]) -> Draws:
        return Draws(rows, np.partition(draw_N, self.count - 1)[: self.count] if len(draw_N) > self.count else draw_N)


@dataclass(frozen=True)
class RandomSubset(PairMethod):
    """Keeps a pair iff its draw from `(seed, key)` is small enough. A rejected pair's score is its draw."""

    config: Config
    seed: int

    def folds(self) -> Sequence[Fold]:
        """None for a share; for a number, one that finds the threshold."""
        return [] if self.config.count is None else [SmallestDraws(self.config.count, self.seed)]

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state: nothing for a share, two sets of draws for a number."""
        del width
        return 16 * min(self.config.count or 0, rows)

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on a batch; `state` is the largest draw that stays; for a share there is none."""
        draw_N = draws(batch, self.seed)
        return verdict(batch, draw_N >= self.config.keep if self.config.keep is not None else draw_N > state, REASON, draw_N)

    def report(self, state: float | None) -> Mapping[str, Any]:
        """The share that was asked for, or the number and the threshold that gives it."""
        return {"keep": self.config.keep} if state is None else {"count": self.config.count, "threshold": state}


def draws(batch: pl.DataFrame, seed: int) -> NDArray[np.float64]:
    """A uniform draw `[N]` in [0, 1) a pair, from `(seed, key)` alone."""
    return uniform(seed, key_hashes(batch["key"]))
