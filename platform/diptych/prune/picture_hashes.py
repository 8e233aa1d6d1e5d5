"""What tells two pictures alike: a digest of the content, and 64-bit perceptual hashes that survive size, format and mild compression.

Source: pHash is the sign of the low frequencies against their median (Zauner, Implementation and Benchmarking of Perceptual Image Hash
Functions, 2010); dHash the sign of neighbouring differences. Both agree bit for bit with what is commonly computed by these names.

Shape legend: N pictures, B bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.core import digest
from diptych.core.errors import DataError
from diptych.pairs.image import Fault, to_rgb

Kind = Literal["phash", "dhash"]
Words = NDArray[np.uint64]

BITS = 64
SIDE_PX, LOW = 32, 8
LONG = 48
"""Rows of a run from which it is compared in blocks."""
FLAT = 2.0
"""Grey levels of standard deviation below which a picture shows nothing: the signs that a hash is made of would be noise."""


def content(data: bytes, of: Literal["pixels", "file"], where: str = "picture") -> int:
    """63 bits of the SHA-256 of a picture's RGB pixels and their size, or of its file. Raises DataError naming `where` if it is broken."""
    if of == "pixels":
        picture = _opened(data, where)
        data = f"{picture.width}x{picture.height}:".encode() + picture.tobytes()
    return int(digest.of_bytes(data).removeprefix("sha256:")[:16], 16) >> 1


def perceptual(data: bytes, kind: Kind, where: str = "picture") -> int | None:
    """The hash of a picture as an unsigned 64-bit integer; None for a flat one. Raises DataError naming `where` if it is broken."""
    grey = _opened(data, where).convert("L")
    small = np.asarray(grey.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS), np.float64)
    if small.std() < FLAT:
        return None
    bits = _phash(small) if kind == "phash" else _dhash(grey)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _opened(data: bytes, where: str) -> Image.Image:
    try:
        return to_rgb(data)
    except Fault as fault:
        raise DataError.at("A picture cannot be compared", where, f"<{fault.reason}>", "a whole picture") from None


def _phash(grey_HW: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The signs of the 8 x 8 lowest frequencies against their median, row by row."""
    from scipy.fft import dctn

    low = dctn(grey_HW, type=2)[:LOW, :LOW]
    return np.asarray(low > np.median(low)).ravel()


def _dhash(grey: Image.Image) -> NDArray[np.bool_]:
    """Whether each of 8 x 8 points is darker than its right neighbour, row by row."""
    small = np.asarray(grey.resize((LOW + 1, LOW), Image.Resampling.LANCZOS))
    return np.asarray(small[:, 1:] > small[:, :-1]).ravel()


def band_bounds(radius: int) -> Sequence[tuple[int, int]]:
    """`radius + 1` runs of bits (first, number) that make up the hash: of two hashes that differ in at most `radius` bits, one run is equal."""
    cuts = [BITS * band // (radius + 1) for band in range(radius + 2)]
    return [(first, last - first) for first, last in itertools.pairwise(cuts)]


def band_of(hash_N: Words, radius: int, band: int) -> NDArray[np.int64]:
    """The value of one run of bits of every hash, int64 `[N]` >= 0; of a run of all 64 bits the lower 63."""
    first, number = band_bounds(radius)[band]
    return np.asarray((hash_N >> np.uint64(first)) & np.uint64((1 << min(number, 63)) - 1)).astype(np.int64)


def nearest_before(hash_N: Words, radius: int, block: int = 512) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every hash the nearest one before it within `radius` bits: its place (the first among equally near; -1: none), and the distance.

    `N^2 / 2` comparisons of one instruction each, `16 N block` bytes at once.
    """
    place_N, distance_N = np.full(len(hash_N), -1), np.full(len(hash_N), BITS + 1)
    for start in range(0, len(hash_N), block):
        rows = hash_N[start : start + block]
        apart = np.bitwise_count(rows[:, None] ^ hash_N[None, : start + len(rows)]).astype(np.int16)
        apart[:, start:][np.triu_indices(len(rows))] = BITS + 1  # nothing is before itself
        best = apart.argmin(axis=1)
        nearest = apart[np.arange(len(rows)), best]
        near = nearest <= radius
        place_N[start : start + len(rows)][near] = best[near]
        distance_N[start : start + len(rows)][near] = nearest[near]
    return place_N, distance_N


def nearest_in_runs(hash_N: Words, run_N: NDArray[np.int64], radius: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`nearest_before` within runs: rows of one value of `run_N`, which stand together. Places are rows of the whole.

    Runs are mostly short: each row is compared with the one before it, then with the one before that, all runs at once. What stands in a
    run longer than `LONG` is compared in blocks, only the first of equal hashes with the others.
    """
    place_N, distance_N = np.full(len(hash_N), -1), np.full(len(hash_N), BITS + 1)
    if not len(hash_N):
        return place_N, distance_N
    start_R = np.flatnonzero(np.append(True, np.diff(run_N) != 0))
    size_R = np.diff(np.append(start_R, len(hash_N)))
    for start, size in zip(start_R[size_R > LONG].tolist(), size_R[size_R > LONG].tolist(), strict=True):
        run = slice(start, start + size)
        before_M, distance_N[run] = _nearest_of_many(hash_N[run], radius)
        place_N[run] = np.where(before_M >= 0, before_M + start, -1)
    first_N = np.repeat(start_R, size_R)
    at_M = np.flatnonzero(np.repeat(size_R <= LONG, size_R))
    for back in range(1, LONG):
        at_M = at_M[at_M - back >= first_N[at_M]]
        if not len(at_M):
            break
        apart_M = np.bitwise_count(hash_N[at_M] ^ hash_N[at_M - back])
        # Of equally near ones the first counts, so the farthest back: it is looked at last.
        near_M = at_M[(apart_M <= radius) & (apart_M <= distance_N[at_M])]
        place_N[near_M] = near_M - back
        distance_N[near_M] = np.bitwise_count(hash_N[near_M] ^ hash_N[near_M - back])
    return place_N, distance_N


def _nearest_of_many(hash_M: Words, radius: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`nearest_before` over hashes in which equal ones are frequent."""
    _, first_U, inverse_M = np.unique(hash_M, return_index=True, return_inverse=True)
    first_M = first_U[inverse_M]
    before_M, distance_M = np.where(first_M < np.arange(len(hash_M)), first_M, -1), np.zeros(len(hash_M), dtype=np.int64)
    lead_U = np.sort(first_U)
    place_U, distance_M[lead_U] = nearest_before(hash_M[lead_U], radius)
    before_M[lead_U] = np.where(place_U >= 0, lead_U[np.maximum(place_U, 0)], -1)
    return before_M, distance_M
