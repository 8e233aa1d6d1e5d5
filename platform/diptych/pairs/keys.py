"""Which keys have been seen: eight bytes a key, so that a hundred million of them fit into memory."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray


class KeyIndex:
    """A growing set of 64-bit key hashes in sorted runs; a run is merged with its neighbour once it is as long.

    It knows for certain that a key is new. That one is old it only suspects: two keys may share a hash (3 in 10,000 for a set of 10^8).
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def suspects(self, keys: pl.Series) -> pl.Series:
        """Boolean, a row a key: True where the key may have been added before."""
        wanted = hashes(keys)
        found = np.zeros(len(wanted), dtype=bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, wanted), len(run) - 1)
            found |= run[place] == wanted
        return pl.Series("suspect", found)

    def add(self, keys: pl.Series) -> None:
        """Adds keys."""
        if not len(keys):
            return
        run = np.sort(hashes(keys))
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")  # merges two sorted halves in linear time
        self._runs.append(run)


def hashes(keys: pl.Series) -> NDArray[np.uint64]:
    """A 64-bit hash a key; for use within one process only."""
    return keys.hash(seed=0).to_numpy()
