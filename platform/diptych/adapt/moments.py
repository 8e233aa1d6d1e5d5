"""First and second moments of features, in float64 whatever the features are, without a float64 copy of them.

Shape legend: N rows, D feature width, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]

BLOCK_ROWS = 4096
"""Rows of a block: 16 MiB of float64 at 512 features, long enough for the matrix product to run at full speed."""


def class_means(feature_ND: Floats, label_N: NDArray[np.int64], classes: int) -> Doubles:
    """The mean of the rows of every class, float64 `[C, D]`, not normalised again; NaN for a class without rows."""
    one_hot_NC = np.zeros((len(label_N), classes), feature_ND.dtype)
    one_hot_NC[np.arange(len(label_N)), label_N] = 1
    total_CD = np.zeros((classes, feature_ND.shape[1]))
    for start in range(0, len(label_N), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        total_CD += one_hot_NC[rows].T.astype(np.float64) @ feature_ND[rows].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(total_CD / np.bincount(label_N, minlength=classes)[:, None])


def scatter(feature_ND: Floats, mean_CD: Doubles, label_N: NDArray[np.int64], weight_N: Doubles | None = None) -> Doubles:
    """`sum_i w_i (x_i - m_i)(x_i - m_i)'`, float64 `[D, D]`, with m_i the mean of row i's label and w_i >= 0, 1 by default."""
    width = feature_ND.shape[1]
    total_DD = np.zeros((width, width))
    for start in range(0, len(feature_ND), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        centred_BD = feature_ND[rows].astype(np.float64) - mean_CD[label_N[rows]]
        if weight_N is not None:
            centred_BD *= np.sqrt(weight_N[rows, None])
        total_DD += centred_BD.T @ centred_BD  # NumPy sees the same matrix twice and computes one triangle
    return total_DD


def pseudo_inverse(matrix_DD: Doubles) -> Doubles:
    """The Moore-Penrose inverse of a symmetric positive semidefinite matrix; eigenvalues below `D * eps` of the largest count as 0."""
    value_D, vector_DD = np.linalg.eigh(matrix_DD)
    kept_D = value_D > value_D[-1] * len(value_D) * np.finfo(np.float64).eps
    basis = vector_DD[:, kept_D]
    return np.asarray((basis / value_D[kept_D]) @ basis.T)
