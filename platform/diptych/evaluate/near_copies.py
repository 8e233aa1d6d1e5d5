"""Which pictures look the same: candidates by a 56-bit hash of coarse gradients, confirmed on the grey picture at 16 x 16.

Both survive another size, another format, mild compression and brightness, and neither a crop nor a turn.

Shape legend: N pictures, M pictures to look among, S side in pixels, P = 256 grey pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE_PX = 32
GREY_PX = 16
COARSE_PX = 8
STEP = 2.0
"""Grey levels between neighbours from which a gradient counts as one: noise of compression in an even area stays below."""
BITS = 8
"""Bits of the hash that may differ in a candidate."""
ALIKE = 0.98
"""Correlation of the grey pictures from which a candidate counts as a near copy."""
FLAT = 2.0
"""Grey levels of standard deviation below which a picture shows nothing that could be recognised."""
CHUNK = 1 << 22


class Fingerprints(NamedTuple):
    """Of N pictures: `hash_N` uint64, and `grey_NP` uint8, the grey picture at 16 x 16."""

    hash_N: NDArray[np.uint64]
    grey_NP: NDArray[np.uint8]


def fingerprints(image_NCHW: NDArray[np.uint8]) -> Fingerprints:
    """The fingerprints of RGB pictures, uint8 `[N, 3, 32, 32]`."""
    grey_NSS = _means(image_NCHW.mean(axis=1, dtype=np.float32), GREY_PX)
    coarse_NSS = _means(grey_NSS, COARSE_PX)
    bit_NB = (np.diff(coarse_NSS, axis=2) > STEP).reshape(len(coarse_NSS), -1)
    weight_B = np.uint64(1) << np.arange(bit_NB.shape[1], dtype=np.uint64)
    return Fingerprints((bit_NB * weight_B).sum(axis=1, dtype=np.uint64), np.rint(grey_NSS).astype(np.uint8).reshape(len(grey_NSS), -1))


def near_copies(of: Fingerprints, among: Fingerprints) -> NDArray[np.bool_]:
    """Which of N pictures have a near copy among M; bool `[N]`. Pictures that show nothing have none.

    Every pair is looked at, a block at a time: N x M steps, in bounded memory.
    """
    found_N = np.zeros(len(of.hash_N), np.bool_)
    look_N, look_M = (np.flatnonzero(fingers.grey_NP.std(axis=1) >= FLAT) for fingers in (of, among))
    step_M = CHUNK // 64
    for start in range(0, len(look_N), 64):
        rows = look_N[start : start + 64]
        for at in range(0, len(look_M), step_M):
            columns = look_M[at : at + step_M]
            near = np.bitwise_count(of.hash_N[rows, None] ^ among.hash_N[columns]) <= BITS
            for row, candidates in zip(rows, near, strict=True):
                if not found_N[row] and candidates.any():
                    found_N[row] = _alike(of.grey_NP[row], among.grey_NP[columns[candidates]]).any()
    return found_N


def _alike(grey_P: NDArray[np.uint8], grey_MP: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether the correlation of a grey picture with each of M others reaches `ALIKE`."""
    own_P, other_MP = grey_P - grey_P.mean(), grey_MP - grey_MP.mean(axis=1, keepdims=True)
    return np.asarray(other_MP @ own_P >= ALIKE * np.linalg.norm(own_P) * np.linalg.norm(other_MP, axis=1))


def _means(image_NSS: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Means over blocks, `[N, side, side]`."""
    factor = image_NSS.shape[1] // side
    return np.asarray(image_NSS.reshape(len(image_NSS), side, factor, side, factor).mean(axis=(2, 4)))
