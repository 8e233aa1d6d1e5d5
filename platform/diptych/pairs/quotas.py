"""So many pairs of every stratum (a source, a class, a language), drawn by key without replacement: what methods with quotas share.

Two folds: the strata are counted, then every stratum's largest draw that still belongs to its quota is found. A smaller quota of one
seed lies inside a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.chance import key_hash, key_hashes, uniform
from diptych.core.errors import DataError
from diptych.core.points import Fold

Floats = NDArray[np.float64]
Quotas = Callable[[Mapping[str, int]], Mapping[str, int]]
"""From the pairs that there are to the pairs to take, by stratum; a stratum that is not named has none taken."""


@dataclass(frozen=True)
class Drawn:
    """The smallest draws of every stratum, float64, and how many pairs each stratum has."""

    rows: Mapping[str, int]
    smallest: Mapping[str, Floats]


@dataclass(frozen=True)
class Taken:
    """The finished state, by stratum: the largest draw that is taken, the pairs taken, the pairs there were."""

    threshold: Mapping[str, float]
    taken: Mapping[str, int]
    rows: Mapping[str, int]

    def stays(self, batch: pl.DataFrame, column: str, seed: int) -> tuple[pl.Series, Floats]:
        """Whether each pair is taken, and its draw `[N]`. Null strata are never taken."""
        stratum = strata(batch, column)
        draw_N = draws(batch, column, seed)
        limit = stratum.replace_strict(list(self.threshold), list(self.threshold.values()), default=-1.0, return_dtype=pl.Float64)
        return pl.Series(draw_N) <= limit.fill_null(-1.0), draw_N


def strata(batch: pl.DataFrame, column: str) -> pl.Series:
    """The stratum of every pair, as a string or null. Raises DataError without the column, or if it holds no plain values."""
    if column not in batch.columns:
        raise DataError.at("The pairs have no such column", "column", column, f"one of {', '.join(batch.columns)}")
    if batch.schema[column].is_nested():
        raise DataError.at("A stratum is one value a pair", f"column {column!r}", batch.schema[column], "text, numbers or truth values")
    return batch[column].cast(pl.String)


def draws(batch: pl.DataFrame, column: str, seed: int) -> Floats:
    """A uniform draw `[N]` in [0, 1) a pair, from the seed, its stratum and its key."""
    stratum = strata(batch, column)
    names = stratum.unique().drop_nulls().to_list()
    hash_N = stratum.fill_null("").replace_strict(["", *names], [0, *map(key_hash, names)], return_dtype=pl.UInt64).to_numpy()
    return uniform(seed, hash_N, key_hashes(batch["key"]))


class Count(Fold):
    """Counts the pairs of each stratum: a string and an integer a stratum."""

    def __init__(self, column: str, quotas: Quotas) -> None:
        self.column, self.quotas = column, quotas

    def map(self, batch: pl.DataFrame, state: Any) -> dict[str, int]:
        """The batch's counts."""
        del state
        return {name: int(count) for name, count in strata(batch, self.column).value_counts().iter_rows() if name is not None}

    def merge(self, left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
        """Counts add up."""
        return {name: left.get(name, 0) + right.get(name, 0) for name in sorted({*left, *right})}

    def finish(self, partial: dict[str, int], state: Any) -> dict[str, int]:
        """The counts. Raises what `quotas` raises where they do not allow it."""
        del state
        self.quotas(partial)
        return partial


class Draw(Fold):
    """Finds every stratum's threshold among its draws. Holds 8 bytes a pair of the quotas, twice while two partials merge."""

    def __init__(self, column: str, quotas: Quotas, seed: int) -> None:
        self.column, self.quotas, self.seed = column, quotas, seed

    def map(self, batch: pl.DataFrame, state: dict[str, int]) -> Drawn:
        """The batch's smallest draws by stratum."""
        quota = self.quotas(state)
        frame = pl.DataFrame({"stratum": strata(batch, self.column), "draw": draws(batch, self.column, self.seed)})
        parts = {
            str(name): part["draw"].to_numpy() for (name,), part in frame.partition_by("stratum", as_dict=True).items() if name in quota
        }
        return Drawn(state, {name: _smallest(draw_N, quota[name]) for name, draw_N in parts.items()})

    def merge(self, left: Drawn, right: Drawn) -> Drawn:
        """The smallest of both."""
        quota, none = self.quotas(left.rows), np.empty(0)
        names = sorted({*left.smallest, *right.smallest})
        both = {name: np.concatenate([left.smallest.get(name, none), right.smallest.get(name, none)]) for name in names}
        return Drawn(left.rows, {name: _smallest(draw_N, quota[name]) for name, draw_N in both.items()})

    def finish(self, partial: Drawn, state: Any) -> Taken:
        """The largest draw that is taken, of every stratum."""
        del state
        return Taken(
            {name: float(draw_S.max()) for name, draw_S in partial.smallest.items() if len(draw_S)},
            {name: len(draw_S) for name, draw_S in partial.smallest.items()},
            partial.rows,
        )


def _smallest(draw_N: Floats, count: int) -> Floats:
    if count <= 0:
        return draw_N[:0]
    return np.partition(draw_N, count - 1)[:count] if len(draw_N) > count else draw_N
