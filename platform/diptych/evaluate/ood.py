"""Out-of-distribution detection: scores that should be larger for pictures of known classes, and how well they tell the two apart.

Sources: Hendrycks & Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples (ICLR 2017), for MSP; Hendrycks et al.,
Scaling Out-of-Distribution Detection for Real-World Settings (ICML 2022), for the maximum logit; Liu et al., Energy-based
Out-of-distribution Detection (NeurIPS 2020); Ming et al., Delving into Out-of-Distribution Detection with Vision-Language Representations
(NeurIPS 2022), for MCM.

Shape legend: N in-distribution examples, M others, C classes, T distinct scores, R replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import DataError
from diptych.evaluate import resampling
from diptych.evaluate.calibration import softmax

Floats = NDArray[np.float64]
Score = Literal["mcm", "msp", "max_logit", "energy", "negative_entropy"]

TRUE_POSITIVE_RATE = 0.95


# ---------------------------------------------------------------- scores


def score(name: Score, cosine_NC: NDArray[Any], logit_scale: float) -> Floats:
    """A score by name, float64 `[N]`, from the cosines of pictures and classes and the checkpoint's factor of the cosine."""
    if name == "mcm":
        return mcm(cosine_NC)
    logit_NC = logit_scale * cosine_NC.astype(np.float64)
    return {"msp": msp, "max_logit": max_logit, "energy": energy, "negative_entropy": negative_entropy}[name](logit_NC)


def mcm(cosine_NC: NDArray[Any], temperature: float = 1.0) -> Floats:
    """The largest softmax probability of the raw cosines, at temperature 1 and not at the logit scale, which would rank as `msp` does."""
    return msp(cosine_NC.astype(np.float64) / temperature)


def msp(logit_NC: NDArray[Any]) -> Floats:
    """The largest softmax probability."""
    return np.asarray(softmax(logit_NC).max(axis=1))


def max_logit(logit_NC: NDArray[Any]) -> Floats:
    """The largest logit."""
    return np.asarray(logit_NC.max(axis=1), np.float64)


def energy(logit_NC: NDArray[Any]) -> Floats:
    """`log sum exp` of the logits: the negative free energy at temperature 1."""
    logit = logit_NC.astype(np.float64)
    top_N = logit.max(axis=1)
    return np.asarray(np.log(np.exp(logit - top_N[:, None]).sum(axis=1)) + top_N)


def negative_entropy(logit_NC: NDArray[Any]) -> Floats:
    """`sum p log p` of the softmax probabilities, in nats, in [-log C, 0]."""
    from scipy.special import xlogy

    prob_NC = softmax(logit_NC)
    return np.asarray(xlogy(prob_NC, prob_NC).sum(axis=1))


# ---------------------------------------------------------------- how well a score separates


class Separation(NamedTuple):
    """Figures of one score, all in [0, 1].

    Attributes:
        auroc: the chance that an in-distribution example scores above another one; a tie counts half.
        fpr95: the smallest share of others let through by a threshold that lets through 95 % of the in-distribution examples.
        aupr_in: average precision with the in-distribution examples as positives.
        aupr_out: average precision with the others as positives, by the negative score.
    """

    auroc: float
    fpr95: float
    aupr_in: float
    aupr_out: float


def separation(id_N: NDArray[Any], out_M: NDArray[Any]) -> Separation:
    """How well a score tells in-distribution examples `[N]` from others `[M]`. Raises DataError for an empty side or a score that is NaN."""
    cell_N, cell_M, cells = _cells(id_N, out_M)
    return Separation(*map(float, _figures(np.bincount(cell_N, minlength=cells), np.bincount(cell_M, minlength=cells))))


def separation_intervals(id_N: NDArray[Any], out_M: NDArray[Any], seed: int) -> tuple[tuple[float, float], ...]:
    """The 95 % bootstrap intervals `(low, high)` of the four figures; both sides are resampled apart. Raises as `separation`."""
    cell_N, cell_M, cells = _cells(id_N, out_M)
    draws = zip(_replicates(cell_N, cells, seed, "in"), _replicates(cell_M, cells, seed, "out"), strict=True)
    replicates = [_figures(in_T, out_T) for in_T, out_T in draws]
    value = separation(id_N, out_M)
    return tuple(resampling.bias_corrected(figure, np.array([r[place] for r in replicates])) for place, figure in enumerate(value))


def _replicates(cell_N: NDArray[np.int64], cells: int, seed: int, what: str) -> Iterator[NDArray[np.int64]]:
    return (row_T for block_RT in resampling.counts(cell_N, cells, seed, what) for row_T in block_RT)


def _cells(id_N: NDArray[Any], out_M: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The place of every score among the distinct scores, the highest first, and how many distinct ones there are."""
    both = np.concatenate([np.asarray(id_N, np.float64), np.asarray(out_M, np.float64)])
    if not len(id_N) or not len(out_M) or np.isnan(both).any():
        raise DataError.at("These scores cannot be told apart", "scores", (len(id_N), len(out_M)), "numbers, at least one on either side")
    distinct, place = np.unique(-both, return_inverse=True)
    return place[: len(id_N)], place[len(id_N) :], len(distinct)


def _figures(in_T: NDArray[np.int64], out_T: NDArray[np.int64]) -> tuple[np.float64, np.float64, np.float64, np.float64]:
    """The figures of `Separation` from the examples at each distinct score, the highest first."""
    above_in, above_out = np.cumsum(in_T), np.cumsum(out_T)
    n, m = above_in[-1], above_out[-1]
    auroc = (out_T * (above_in - 0.5 * in_T)).sum() / (n * m)
    fpr95 = above_out[np.argmax(above_in / n >= TRUE_POSITIVE_RATE)] / m
    below_in, below_out = n - above_in + in_T, m - above_out + out_T
    return auroc, fpr95, _average_precision(in_T, above_in, above_out), _average_precision(out_T, below_out, below_in)


def _average_precision(found_T: NDArray[np.int64], right_T: NDArray[np.int64], wrong_T: NDArray[np.int64]) -> np.float64:
    """The mean over positives of the precision at their own score; the first argument counts the positives at each score."""
    precision_T = right_T / np.maximum(right_T + wrong_T, 1)
    return np.float64((found_T * precision_T).sum() / found_T.sum())
