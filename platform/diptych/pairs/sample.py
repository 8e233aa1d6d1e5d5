"""A bounded sample of a pool's features that is the same however the pool is cut: the pairs whose keys rank lowest.

Shape legend: S pairs of the sample, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """The pairs of smallest rank among `rows` seen, sorted by rank (uint64)."""

    rows: int
    rank_S: NDArray[np.uint64]
    feature_SD: NDArray[np.float32]

    def smallest(self, limit: int) -> Sample:
        """The `limit` pairs of smallest rank, sorted by it."""
        order = np.argsort(self.rank_S)[:limit]
        return Sample(self.rows, self.rank_S[order], self.feature_SD[order])
