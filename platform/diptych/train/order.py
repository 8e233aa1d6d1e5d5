"""Which rows make which batch: a pure function of `(seed, epoch, index)`.

An epoch's order is a keyed permutation, computed for the indices asked for and never stored. So the state of the data stream
is one integer, a run resumes in the middle of an epoch, and any number of ranks sees the same global batches.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core import chance
from diptych.core.errors import ConfigError

ROUNDS = 6


class BatchOrder:
    """The batches of every epoch over `rows` rows. An epoch is `rows // batch_size` full batches.

    The `rows % batch_size` rows left over are not seen in that epoch; the permutation makes them others in every epoch. With
    `avoid` (any column of `rows` values) no two rows of a batch share a value; nulls share with none. That composition is
    made once an epoch in O(rows) memory; without `avoid` memory does not grow with the rows.

    Raises ConfigError if the rows do not fill a batch, or if some value is too frequent for `avoid`.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, avoid: pl.Series | None = None) -> None:
        if rows < batch_size:
            raise ConfigError.at(
                "The data set is smaller than one batch",
                "batch_size",
                batch_size,
                f"at most {rows}, the number of pairs",
                "lower batch_size",
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = rows // batch_size
        self._value_of_row = None if avoid is None else _codes(avoid, self.steps_per_epoch)
        self._composed: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """The rows int64 `[batch_size / world]` of a rank at a step counted over all epochs: its slice of the global batch."""
        assert self.batch_size % world == 0, f"batch_size {self.batch_size} over {world} ranks"
        share = self.batch_size // world
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.batch_size + rank * share
        if self._value_of_row is None:
            return permute(np.arange(start, start + share), self.rows, self.seed, epoch)
        return self._compose(epoch)[start : start + share]

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def visit_keys(self, key_N: NDArray[np.uint64], step: int, world: int = 1) -> NDArray[np.uint64]:
        """What names a visit's draws beside its epoch, uint64 `[N]`: the hashes of the rows' keys, as no row comes twice in an epoch."""
        del step, world
        return key_N

    def _compose(self, epoch: int) -> NDArray[np.int64]:
        """An epoch's rows in an order whose batches hold no value twice.

        Rows are laid out value by value, both in random order, and dealt to the batches like cards: equal values are neighbours,
        so they fall on different batches as long as none is more frequent than there are batches.
        """
        if self._composed is None or self._composed[0] != epoch:
            assert self._value_of_row is not None
            batches = self.steps_per_epoch
            row = permute(np.arange(batches * self.batch_size), self.rows, self.seed, epoch)
            value = self._value_of_row[row]
            place_of_value = chance.mix(self.seed, epoch, value.astype(np.uint64))
            hands = row[np.lexsort((value, place_of_value))].reshape(self.batch_size, batches)
            batch_order = permute(np.arange(batches), batches, self.seed, epoch, 1)
            self._composed = epoch, np.ascontiguousarray(hands.T[batch_order]).ravel()
        return self._composed[1]


class MixedOrder:
    """Batches of two kinds of rows in fixed shares: `round(share * batch_size)` marked ones, then the others.

    Each kind goes round in epochs of its own (`BatchOrder`); an epoch of the whole is one of the unmarked rows. That is how
    semi-supervised recipes mix a few labelled rows with many unlabelled ones. Ranks get equal parts of both kinds.

    Args:
        marked: bool `[rows]`.
        share: of marked rows in a batch, in (0, 1).

    Raises ConfigError if either kind does not fill its part of a batch.
    """

    def __init__(self, marked: NDArray[np.bool_], batch_size: int, share: float, seed: int) -> None:
        wanted = round(share * batch_size)
        sizes = {"with a label": (int(marked.sum()), wanted), "without one": (int((~marked).sum()), batch_size - wanted)}
        for kind, (there, needed) in sizes.items():
            if not 0 < needed <= there:
                raise ConfigError.at(f"A batch cannot have that many pairs {kind}", "labelled", needed, f"1 to {there}, all there are")
        self._marked, self._others = np.flatnonzero(marked), np.flatnonzero(~marked)
        self._first = BatchOrder(len(self._marked), wanted, int(chance.mix(seed, 1)))
        self._second = BatchOrder(len(self._others), batch_size - wanted, int(chance.mix(seed, 2)))
        self.steps_per_epoch = self._second.steps_per_epoch

    def batch(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """The rows int64 `[batch_size / world]` of a rank at a step, marked ones first. Raises ConfigError if they do not divide by `world`."""
        if self._first.batch_size % world:
            raise ConfigError.at(
                "The labelled pairs of a batch do not divide by the workers", "labelled", self._first.batch_size, f"a multiple of {world}"
            )
        first, second = self._first.batch(step, rank, world), self._second.batch(step, rank, world)
        return np.concatenate([self._marked[first], self._others[second]])

    def epoch(self, step: int) -> int:
        """The epoch of the unmarked rows that a step belongs to."""
        return self._second.epoch(step)

    def visit_keys(self, key_N: NDArray[np.uint64], step: int, world: int = 1) -> NDArray[np.uint64]:
        """The hashes of the rows' keys, those of marked rows mixed with their own epoch: they come several times in one of the others."""
        marked = self._first.batch_size // world
        return np.concatenate([chance.mix(key_N[:marked], self._first.epoch(step)), key_N[marked:]])


def permute(index: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """The images of `index` (int64, each in [0, size)) under the permutation of range(size) named by `key`.

    A Feistel network on pairs `(left, right)` of a grid of `a x b >= size` cells; an image outside the range walks on until it
    is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). O(1) memory an index.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    image = index.astype(np.uint64)
    outside = np.ones(len(image), dtype=np.bool_)
    while outside.any():
        image[outside] = _feistel(image[outside], np.uint64(a), np.uint64(b), key)
        outside = image >= size
    return image.astype(np.int64)


def _feistel(cell: NDArray[np.uint64], a: np.uint64, b: np.uint64, key: tuple[int, ...]) -> NDArray[np.uint64]:
    left, right = cell // b, cell % b
    for round in range(0, ROUNDS, 2):
        left = (left + chance.mix(*key, round, right) % a) % a
        right = (right + chance.mix(*key, round + 1, left) % b) % b
    return left * b + right


def _codes(values: pl.Series, batches: int) -> NDArray[np.int64]:
    """A number a distinct value, int64 `[rows]`; every null gets its own. Refuses a value that must come twice in a batch."""
    known = values.cast(pl.String).cast(pl.Categorical).to_physical().cast(pl.Int64)
    codes = np.where(known.is_null().to_numpy(), -1 - np.arange(len(values)), known.fill_null(0).to_numpy())
    value, count = np.unique(codes, return_counts=True)
    worst = int(count.argmax())
    if count[worst] > batches:
        example = values[int(np.argmax(codes == value[worst]))]
        raise ConfigError.at(
            "One value is too frequent to be kept apart",
            f"avoid: {values.name}",
            f"{example!r} in {count[worst]} of {len(codes)} pairs, but an epoch has {batches} batches",
            f"batch_size at most {max(1, len(codes) // int(count[worst]))}",
            "lower batch_size, or drop avoid",
        )
    return codes
