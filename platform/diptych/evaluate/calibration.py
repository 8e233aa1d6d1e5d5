"""Calibration: does a confidence of 0.8 mean right in 80 of 100 cases? Gaps by bins, proper scores, and temperature scaling.

Sources: Guo, Pleiss, Sun & Weinberger, On Calibration of Modern Neural Networks (ICML 2017), sections 2 and 4.2, for ECE, MCE and
temperature scaling; Nixon et al., Measuring Calibration in Deep Learning (2019), section 3, for bins of equal mass; Brier, Verification of
forecasts expressed in terms of probability (1950).

Confidences are taken to float64 before they are binned, and bins are (lo, hi]: a confidence on an edge belongs to the bin below.

Shape legend: N examples, C classes, B bins, R replicates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import DataError
from diptych.evaluate import resampling
from diptych.evaluate.resampling import bias_corrected
from diptych.evaluate.zero_shot import log_loss

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

BINS = 15
TEMPERATURES = (0.05, 20.0)


# ---------------------------------------------------------------- probabilities


def softmax(logit_NC: NDArray[Any], temperature: float = 1.0) -> Floats:
    """`softmax(logits / temperature)` over the classes, float64 `[N, C]`."""
    shifted = logit_NC.astype(np.float64) / temperature
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def brier(prob_NC: Floats, label_N: Labels) -> Floats:
    """The squared distance of the probabilities from the truth, summed over the classes, `[N]`, in [0, 2]."""
    rows = np.arange(len(label_N))
    return np.asarray((prob_NC**2).sum(axis=1) - 2 * prob_NC[rows, label_N] + 1)


# ---------------------------------------------------------------- gaps by bins


def equal_width(confidence_N: NDArray[Any], bins: int = BINS) -> Labels:
    """The bin of each confidence among `bins` of width 1 / bins, (lo, hi], int64 `[N]`; 0 belongs to the first.

    Raises DataError for a confidence outside [0, 1].
    """
    confidence = _confidences(confidence_N)
    edges = np.arange(bins + 1) / bins
    return np.asarray(np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0), np.int64)


def equal_mass(confidence_N: NDArray[Any], bins: int = BINS) -> Labels:
    """The bin of each confidence among `bins` that hold equally many, int64 `[N]`; equal confidences share a bin, whatever their order.

    Raises DataError for a confidence outside [0, 1].
    """
    from scipy.stats import rankdata

    confidence = _confidences(confidence_N)
    return np.asarray((rankdata(confidence) - 0.5) * bins / max(1, len(confidence)), np.int64)


def gaps(confidence_N: NDArray[Any], correct_N: NDArray[Any], bin_N: Labels) -> tuple[Floats, Labels]:
    """The signed gap `accuracy - confidence` of every bin that is not empty, `[B]`, and the examples in each, `[B]`."""
    signed = np.asarray(correct_N, np.float64) - np.asarray(confidence_N, np.float64)
    count = np.bincount(bin_N)
    filled = count > 0
    return np.bincount(bin_N, weights=signed)[filled] / count[filled], count[filled]


def expected_error(confidence_N: NDArray[Any], correct_N: NDArray[Any], bin_N: Labels) -> float:
    """ECE: the mean over examples of their bin's |accuracy - confidence|, in [0, 1] (Guo et al., equation 3)."""
    gap, count = gaps(confidence_N, correct_N, bin_N)
    return float(np.abs(gap) @ count / count.sum())


def maximum_error(confidence_N: NDArray[Any], correct_N: NDArray[Any], bin_N: Labels) -> float:
    """MCE: the largest |accuracy - confidence| of a bin that is not empty, in [0, 1] (Guo et al., equation 4)."""
    return float(np.abs(gaps(confidence_N, correct_N, bin_N)[0]).max())


class GapIntervals(NamedTuple):
    """95 % bootstrap intervals `(low, high)` of ECE and MCE."""

    expected: tuple[float, float]
    maximum: tuple[float, float]


def gap_intervals(confidence_N: NDArray[Any], correct_N: NDArray[Any], bin_N: Labels, seed: int) -> GapIntervals:
    """How far ECE and MCE can be trusted: examples are resampled and keep the bins that they are in."""
    member_NB = (bin_N[:, None] == np.unique(bin_N)).astype(np.float64)
    signed_N = np.asarray(correct_N, np.float64) - np.asarray(confidence_N, np.float64)
    sum_RB, count_RB = np.split(resampling.sums(np.hstack([member_NB * signed_N[:, None], member_NB]), seed), 2, axis=1)
    return GapIntervals(
        bias_corrected(expected_error(confidence_N, correct_N, bin_N), np.abs(sum_RB).sum(axis=1) / len(bin_N)),
        bias_corrected(maximum_error(confidence_N, correct_N, bin_N), (np.abs(sum_RB) / np.maximum(count_RB, 1)).max(axis=1)),
    )


# ---------------------------------------------------------------- temperature scaling


def fit_temperature(logit_NC: NDArray[Any], label_N: Labels, bounds: tuple[float, float] = TEMPERATURES) -> float:
    """The one temperature that minimises the mean cross-entropy of `logits / T` (Guo et al., section 4.2).

    Args:
        logit_NC: float, scaled as the model scales them; from examples on which no figure will be reported.
        label_N: class numbers.
        bounds: the range of T; the search is over log T, in which the loss has a single valley. Where every example is right the loss
            falls all the way to the lower bound, or until it is zero, and that is where the search ends.

    Raises:
        DataError: no examples, or a logit that is not finite.
    """
    from scipy.optimize import minimize_scalar

    if not len(label_N) or not np.isfinite(logit_NC).all():
        raise DataError.at("No temperature can be fitted", "logits", logit_NC.shape, "finite logits of at least one example")
    logit = logit_NC.astype(np.float64)
    found = minimize_scalar(
        lambda log_t: log_loss(logit / math.exp(log_t), label_N).mean(),
        bounds=(math.log(bounds[0]), math.log(bounds[1])),
        method="bounded",
        options={"xatol": 1e-9, "maxiter": 500},
    )
    return math.exp(found.x)


def temperature_interval(
    logit_NC: NDArray[Any], label_N: Labels, temperature: float, seed: int, bounds: tuple[float, float] = TEMPERATURES
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a fitted temperature, within `bounds`.

    Each replicate takes one Newton step in 1 / T from the fit to all examples, so that the loss is differentiated once and not 1,000 times.
    Source: Shao & Tu, The Jackknife and Bootstrap (1995), section 5.4 (one-step bootstrap).
    """
    logit = logit_NC.astype(np.float64)
    prob_NC = softmax(logit, temperature)
    mean_N = (prob_NC * logit).sum(axis=1)
    slope_N = mean_N - logit[np.arange(len(label_N)), label_N]
    bend_N = (prob_NC * (logit - mean_N[:, None]) ** 2).sum(axis=1)
    slope_R, bend_R = resampling.sums(np.stack([slope_N, bend_N], axis=1), seed).T
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse_R = np.clip(1 / temperature - slope_R / bend_R, 1 / bounds[1], 1 / bounds[0])
    return bias_corrected(temperature, 1 / inverse_R)


def _confidences(confidence_N: NDArray[Any]) -> Floats:
    confidence = np.asarray(confidence_N, np.float64)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise DataError.at("A confidence is no probability", "confidence", confidence, "numbers in [0, 1]")
    return confidence
