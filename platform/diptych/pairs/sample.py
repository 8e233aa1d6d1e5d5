"""A bounded sample of a pool's features that is the same however the pool is cut: the pairs whose keys rank lowest.

Two folds. The first looks at keys alone and finds the rank up to which pairs are drawn; the second takes the features of those, so that
no more than the sample itself travels from the tables to whoever merges.

Shape legend: N pairs in a batch, S pairs of the sample, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.chance import key_hash, key_hashes, mix
from diptych.core.points import Fold

Ranks = NDArray[np.uint64]


@dataclass(frozen=True)
class Draw:
    """How pairs are drawn: `limit` of them, by a rank that hashes `name`, the seed and their keys."""

    limit: int
    name: str
    seed: int

    def ranks(self, batch: pl.DataFrame) -> Ranks:
        """The rank `[N]` of every pair."""
        return mix(self.seed, key_hash(self.name), key_hashes(batch["key"]))


@dataclass(frozen=True)
class Bar:
    """The largest rank that is drawn from `rows` pairs."""

    rows: int
    rank: int


class BarFold(Fold):
    """Finds the bar. A partial is uint64 `[1 + S]`: how many pairs were seen, then the smallest ranks among them, 8 bytes each."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def map(self, batch: pl.DataFrame, state: Any) -> Ranks:
        """The batch's rows and smallest ranks."""
        del state
        return self._smallest(batch.height, self.draw.ranks(batch))

    def merge(self, left: Ranks, right: Ranks) -> Ranks:
        """The rows and smallest ranks of both."""
        return self._smallest(int(left[0] + right[0]), np.concatenate([left[1:], right[1:]]))

    def finish(self, partial: Ranks, state: Any) -> Bar:
        """The bar; of no pairs, one that draws nothing."""
        del state
        return Bar(int(partial[0]), int(partial[1:].max(initial=0)))

    def _smallest(self, rows: int, rank_N: Ranks) -> Ranks:
        limit = self.draw.limit
        return np.append(np.uint64(rows), np.partition(rank_N, limit - 1)[:limit] if len(rank_N) > limit else rank_N)


@dataclass(frozen=True)
class Drawn:
    """Some pairs of a sample: rank `[S]` and feature `[S, D]`, float32."""

    rank_S: Ranks
    feature_SD: NDArray[np.float32]


class DrawnFold(Fold):
    """Collects the features of the pairs under the bar. A partial is what each table gave: at most `limit * (4 D + 8)` bytes in all.

    `features` is what reads the features `[N, D]` of a batch; `fit` is given those of the sample in the order of their ranks.
    """

    def __init__(
        self, draw: Draw, features: Callable[[pl.DataFrame], NDArray[np.float32]], fit: Callable[[NDArray[np.float32], Bar], Any]
    ) -> None:
        self.draw, self.features, self.fit = draw, features, fit

    def map(self, batch: pl.DataFrame, state: Bar) -> tuple[Drawn, ...]:
        """The batch's share of the sample; nothing if it has none."""
        rank_N = self.draw.ranks(batch)
        drawn_N = rank_N <= np.uint64(state.rank)
        return (Drawn(rank_N[drawn_N], self.features(batch.filter(drawn_N))),) if drawn_N.any() else ()

    def merge(self, left: tuple[Drawn, ...], right: tuple[Drawn, ...]) -> tuple[Drawn, ...]:
        """Both, one behind the other."""
        return left + right

    def finish(self, partial: Sequence[Drawn], state: Bar) -> Any:
        """What `fit` makes of the sample, in a tenth more than twice its memory."""
        return self.fit(in_order(partial), state)


def in_order(parts: Sequence[Drawn]) -> NDArray[np.float32]:
    """The features `[S, D]` of all parts by rising rank; `[0, 0]` if there are none."""
    if not parts:
        return np.empty((0, 0), dtype=np.float32)
    place_S = np.argsort(np.argsort(np.concatenate([part.rank_S for part in parts]), kind="stable"))
    feature_SD = np.empty((len(place_S), parts[0].feature_SD.shape[1]), dtype=np.float32)
    start = 0
    for part in parts:
        feature_SD[place_S[start : start + len(part.rank_S)]] = part.feature_SD
        start += len(part.rank_S)
    return feature_SD
