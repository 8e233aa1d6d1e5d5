"""Bootstrap of figures that are not means over examples: ratios, sums within bins, areas under curves.

Examples are drawn with replacement; every figure is a function of how often each example, or each cell of examples that are alike, was drawn.

Shape legend: N examples, K summands an example, T cells, R replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.core.chance import generator

Floats = NDArray[np.float64]

RESAMPLES = 1000
CHUNK = 1 << 21
"""Draws held at a time: 16 MiB of indices."""


def counts(cell_N: NDArray[np.int64], cells: int, seed: int, what: str, resamples: int = RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """How often each cell was drawn, int64 `[r, cells]`, in blocks of replicates that add up to `resamples`.

    Args:
        cell_N: the cell of each example, in [0, cells).
        cells: T.
        seed, what: name the draws; two sets of draws under different names are independent.
        resamples: R.
    """
    rng = generator(seed, "resample", what)
    step = max(1, CHUNK // max(1, len(cell_N), cells))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn_RN = cell_N[rng.integers(0, len(cell_N), size=(rows, len(cell_N)))]
        drawn_RN += cells * np.arange(rows)[:, None]
        yield np.bincount(drawn_RN.ravel(), minlength=rows * cells).reshape(rows, cells)


def sums(summand_NK: NDArray[Any], seed: int, what: str = "rows", resamples: int = RESAMPLES) -> Floats:
    """The bootstrapped sums of K summands over the same draws of N examples, float64 `[R, K]`; `seed, what` name the draws."""
    n = len(summand_NK)
    summand = np.asarray(summand_NK, np.float64)
    return np.concatenate([block_RN.astype(np.float64) @ summand for block_RN in counts(np.arange(n), n, seed, what, resamples)])


def bias_corrected(value: float, replicate_R: Floats, level: float = 0.95) -> tuple[float, float]:
    """The bias-corrected percentile interval of a figure.

    Unlike the plain percentiles, it allows for figures that resampling moves to one side, as it does the gaps of a calibration curve. It is
    widened to hold `value` where the replicates lie all on one side of it. Replicates that are NaN (an empty denominator) are left out.

    Args:
        value: the figure on the examples themselves; if it is NaN, so are the bounds.
        replicate_R: the figure on each resample.
        level: coverage in (0, 1).

    Source: Efron, Nonparametric standard errors and confidence intervals (1981), section 7.
    """
    from scipy.special import ndtr, ndtri

    known = replicate_R[~np.isnan(replicate_R)]
    if np.isnan(value) or not len(known):
        return np.nan, np.nan
    below = ((known < value).sum() + 0.5 * (known == value).sum() + 0.5) / (len(known) + 1)
    tail = np.array([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(known, ndtr(2 * ndtri(below) + ndtri(tail)))
    return min(float(low), value), max(float(high), value)
