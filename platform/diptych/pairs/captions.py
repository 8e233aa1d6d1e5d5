"""Which of a pair's captions a training visit sees (LaCLIP, section 3.3): one draw a visit, the original where the pick is too short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diptych.core.chance import key_hash, uniform
from diptych.core.errors import DataError

MIN_PIECES = 2
_STREAM = key_hash("caption of a visit")  # keeps this draw apart from others of the same seed, epoch and row
_OTHERS = key_hash("further captions of a visit")


def choose_caption(captions: Sequence[str], choice: int) -> str:
    """The caption that a visit trains on: the chosen one, or the original for a pick of one piece.

    Pieces are what lies between single spaces, as in the official loader: `"word "` has two, `"two\\twords"` one.

    Args:
        captions: the original first, then its rewrites; at least one.
        choice: an index into them, e.g. from `draw`.
    """
    chosen = captions[choice]
    return chosen if len(chosen.split(" ")) >= MIN_PIECES else captions[0]


def draw(seed: int, epoch: int, row_hash: int, count: int) -> int:
    """Uniform draw from `range(count)` named by `(seed, epoch, row_hash)`: the same under any worker count and order.

    `row_hash` is the pair's `chance.key_hash`. Raises DataError for a pair without captions.
    """
    return int(draws(seed, epoch, np.asarray([row_hash], dtype=np.uint64), np.asarray([count]))[0])


def draws(
    seed: int, epoch: int, row_hash_N: NDArray[np.uint64], count_N: NDArray[np.int64], original: float | None = None
) -> NDArray[np.int64]:
    """`draw` for N pairs at once: int64 `[N]`, element i in `range(count_N[i])`.

    With `original`, 0 (the first caption) has that chance in [0, 1] and the others share the rest, where there are others.
    """
    if (count_N < 1).any():
        row = int(np.argmax(count_N < 1))
        raise DataError.at("A pair has no caption to train on", f"row {row} of the batch", int(count_N[row]), "one caption or more")
    uniform_N = uniform(seed, _STREAM, epoch, row_hash_N)
    if original is None:
        return np.floor(uniform_N * count_N).astype(np.int64)
    rest_N = (uniform_N - original) / max(1.0 - original, 2.0**-53)
    return np.where((uniform_N < original) | (count_N == 1), 0, 1 + np.floor(rest_N * (count_N - 1))).astype(np.int64)


def others(
    seed: int, epoch: int, row_hash_N: NDArray[np.uint64], count_N: NDArray[np.int64], choice_N: NDArray[np.int64], number: int
) -> list[NDArray[np.int64]]:
    """Further draws for N pairs: `number` arrays int64 `[N]`, captions other than `choice_N` and than each other.

    From a start drawn by `(seed, epoch, row_hash)` they go round the captions, leaving out the choice; so a pair that has too few
    repeats some, and a pair with one caption gets that.
    """
    rest_N = np.maximum(count_N - 1, 1)
    start_N = np.floor(uniform(seed, _OTHERS, epoch, row_hash_N) * rest_N).astype(np.int64)
    return [(choice_N + (count_N > 1) * (1 + (start_N + k) % rest_N)) % count_N for k in range(number)]
