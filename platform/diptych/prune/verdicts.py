"""How a method of this room splits a batch into what stays and what leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.points import Verdict


def verdict(
    batch: pl.DataFrame, rejected_N: NDArray[np.bool_], reason: str, score_N: NDArray[np.floating[Any]], twin: pl.Series | None = None
) -> Verdict:
    """Splits a batch; every rejected pair gets the one reason and its score, and the key of its `twin` where it is a copy."""
    rejected = batch.select("key", reason=pl.lit(reason), score=pl.Series(score_N, dtype=pl.Float32))
    if twin is not None:
        rejected = rejected.with_columns(twin=twin)
    return Verdict(kept=batch.filter(~rejected_N), rejected=rejected.filter(rejected_N))


def first_choice(key: str, same: Sequence[str]) -> pl.Expr:
    """The smallest key among the pairs that agree in some columns, for every one of them."""
    return pl.col(key).min().over(list(same))
