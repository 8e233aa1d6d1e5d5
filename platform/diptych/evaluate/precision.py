"""Average precision, and its interval where pairs of captions are told apart.

Shape legend: N examples or pairs, B bootstrap replicates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diptych.core.chance import generator
from diptych.evaluate.intervals import RESAMPLES
from diptych.evaluate.ranks import chunks

Floats = NDArray[np.float64]


def average_precision(score_N: ArrayLike, positive_N: ArrayLike, weight_BN: ArrayLike | None = None) -> Floats:
    """Average precision, step-wise and with equal scores taken together: `sum (R_k - R_{k-1}) P_k` over falling thresholds.

    Args:
        score_N: the larger, the likelier positive.
        positive_N: bool.
        weight_BN: how often each example counts, `[B, N]` or `[N]`; once by default.

    Returns float64 `[B]` or a scalar array; NaN where nothing positive counts.
    """
    score, positive = np.asarray(score_N, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    weight = np.ones(len(score)) if weight_BN is None else np.asarray(weight_BN, dtype=np.float64)
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    above = np.cumsum(weight[..., order], axis=-1)[..., last]
    found = np.cumsum((weight * positive)[..., order], axis=-1)[..., last]
    with np.errstate(invalid="ignore"):
        precision = found / np.where(above > 0, above, 1)
        return np.asarray((np.diff(found, prepend=0, axis=-1) * precision).sum(axis=-1) / found[..., -1])


def average_precision_interval(score_2N: Floats, positive_2N: NDArray[np.bool_], seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the average precision over N pairs, each of which brings two captions, `[2, N]`."""
    rng = generator(seed, "average precision")
    pairs = score_2N.shape[1]
    parts = []
    for part in chunks(RESAMPLES, 2 * pairs):
        count_BN = rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=part.stop - part.start)
        parts.append(average_precision(score_2N.ravel(), positive_2N.ravel(), np.tile(count_BN, 2)))
    low, high = np.quantile(np.concatenate(parts), [0.025, 0.975])
    return float(low), float(high)
