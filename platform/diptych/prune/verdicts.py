"""How a method of this room splits a batch into what stays and what leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.points import Verdict


def verdict(batch: pl.DataFrame, rejected_N: NDArray[np.bool_], reason: str, score_N: NDArray[np.floating[Any]]) -> Verdict:
    """Splits a batch; every rejected pair gets the one reason and its score."""
    rejected = batch.select("key", reason=pl.lit(reason), score=pl.Series(score_N, dtype=pl.Float32))
    return Verdict(kept=batch.filter(~rejected_N), rejected=rejected.filter(rejected_N))
