"""The place of a target among scored candidates, counted instead of sorted: every top-k figure follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 22
"""Scores held at a time: 16 MiB of float32."""


def target_rank(score_NM: NDArray[Any], target_N: NDArray[np.int64], order_M: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """How many candidates stand before the target of each row, int64 `[N]`, 0 = first.

    Candidates with a higher score stand before; among equal scores those with the lower `order_M` do (their column, if none is given), so
    that a model with constant features scores at chance and not at 100 %. A target whose score is NaN comes last.
    """
    rows = np.arange(len(score_NM))
    own_N1 = score_NM[rows, target_N][:, None]
    rank_N = np.asarray(np.count_nonzero(score_NM > own_N1, axis=1), np.int64)
    equal_NM = score_NM == own_N1
    tied = np.flatnonzero(np.count_nonzero(equal_NM, axis=1) > 1)
    if len(tied):
        order = np.arange(score_NM.shape[1]) if order_M is None else order_M
        rank_N[tied] += np.count_nonzero(equal_NM[tied] & (order < order[target_N[tied]][:, None]), axis=1)
    rank_N[np.isnan(own_N1[:, 0])] = score_NM.shape[1] - 1
    return rank_N


def chunks(rows: int, width: int) -> list[slice]:
    """Slices of the rows such that `len(slice) * width` stays within `CHUNK`."""
    step = max(1, CHUNK // max(1, width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
