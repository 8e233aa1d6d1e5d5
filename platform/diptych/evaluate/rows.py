"""From per-example values to rows of the evaluation matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.intervals import interval


def of_split(pairs: pl.DataFrame, split: str) -> pl.DataFrame:
    """The rows of a split. Raises DataError, with the splits there are, if it has none."""
    rows = pairs.filter(pl.col("split") == split)
    if rows.is_empty():
        known = sorted(pairs["split"].unique().drop_nulls().to_list())
        raise DataError.at("The set has no such split", "split", split, f"one of {known}" if known else "a set that is not empty")
    return rows


@dataclass(frozen=True)
class Rows:
    """Makes rows that share a set, a task, examples and settings.

    Attributes:
        set, task, settings: as in `Metric`.
        keys: the examples' keys `[N]`.
        seed: names the bootstrap's draws.
    """

    set: str
    task: str
    keys: Sequence[str]
    seed: int
    settings: Mapping[str, Any]

    def mean(self, metric: str, value_N: NDArray[Any], weight_N: NDArray[np.float64] | None = None) -> Metric:
        """The row of a mean over examples (weighted, with weights of mean 1, if any are given), with its bootstrap interval."""
        low, high = interval(value_N, self.seed, weights=weight_N)
        summand_N = value_N if weight_N is None else value_N * weight_N
        value = float(np.mean(summand_N, dtype=np.float64))
        return Metric(self.set, self.task, metric, value, len(self.keys), low, high, self.settings, self.keys, summand_N.astype(np.float32))


def preprocessing(encoder: Encoder) -> dict[str, Any]:
    """`{"preprocessing": …}` where the encoder says how it prepares pixels (an attribute `settings`), else nothing."""
    said = getattr(encoder, "settings", None)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in dict(said or {}).items()}
    return {} if said is None else {"preprocessing": plain}
