"""Random choices that depend on `(seed, key)` alone, so that order, shards and workers cannot change them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_U64 = np.uint64


def key_hash(key: str) -> int:
    """A stable 64-bit hash of a key: the first 8 bytes of BLAKE2b."""
    return int.from_bytes(_digest(key), "little")


def key_hashes(keys: Iterable[str]) -> NDArray[np.uint64]:
    """`key_hash` of every key, uint64 `[n]`. About a microsecond a key."""
    return np.frombuffer(b"".join(map(_digest, keys)), dtype="<u8").astype(_U64)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()


def mix(*parts: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """Mixes integers (broadcast against each other) into well-spread uint64 words; SplitMix64's finaliser a part."""
    with np.errstate(over="ignore"):
        word = np.zeros((), dtype=_U64)
        for part in parts:
            value = part if isinstance(part, np.ndarray) else np.asarray(part & 0xFFFFFFFFFFFFFFFF, dtype=_U64)
            word = (word ^ value) + _U64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> _U64(27))) * _U64(0x94D049BB133111EB)
            word = word ^ (word >> _U64(31))
    return np.asarray(word, dtype=_U64)


def uniform(*parts: NDArray[np.uint64] | int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), one a broadcast element of `parts`, e.g. `uniform(seed, key_hashes(keys), entry_ids)`."""
    return (mix(*parts) >> _U64(11)).astype(np.float64) * 2.0**-53


def generator(seed: int, *parts: int | str) -> np.random.Generator:
    """A NumPy generator named by `(seed, parts…)`: for draws that are not one number an element."""
    words = [seed & 0xFFFFFFFFFFFFFFFF, *(key_hash(part) if isinstance(part, str) else part & 0xFFFFFFFFFFFFFFFF for part in parts)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
