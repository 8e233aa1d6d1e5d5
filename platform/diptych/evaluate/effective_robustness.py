"""Effective robustness: accuracy under shift beyond what accuracy without lets expect, from a line through baseline models.

Source: Taori et al., Measuring Robustness to Natural Distribution Shifts in Image Classification (NeurIPS 2020), section 3; probit axes as in
Miller et al., Accuracy on the Line (ICML 2021). Accuracies are fractions in [0, 1].
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Space = Literal["logit", "probit"]


class Line(NamedTuple):
    """How accuracy under shift follows accuracy without, in transformed space; `r` is Pearson's."""

    slope: float
    intercept: float
    r: float


def transformed(accuracy: ArrayLike, space: Space, n: int | None = None) -> Floats:
    """The logit or probit of accuracies; with `n` examples behind each they are first kept within [1/(2n), 1 - 1/(2n)]."""
    from scipy.special import logit, ndtri

    bound = 0.0 if n is None else 1 / (2 * n)
    return np.asarray({"logit": logit, "probit": ndtri}[space](np.clip(np.asarray(accuracy, np.float64), bound, 1 - bound)))


def fit_line(base_id: ArrayLike, base_ood: ArrayLike, space: Space, n: int | None = None) -> Line:
    """The least-squares line through baseline models' accuracies without and under shift, at least two different ones."""
    from scipy.stats import linregress

    fit = linregress(transformed(base_id, space, n), transformed(base_ood, space, n))
    return Line(float(fit.slope), float(fit.intercept), float(fit.rvalue))


def expected(line: Line, accuracy_id: ArrayLike, space: Space, n: int | None = None) -> Floats:
    """Accuracy under shift that the line expects of models with some accuracy without, as fractions."""
    from scipy.special import expit, ndtr

    back = {"logit": expit, "probit": ndtr}[space]
    return np.asarray(back(line.slope * transformed(accuracy_id, space, n) + line.intercept))


def effective_robustness(line: Line, accuracy_id: ArrayLike, accuracy_ood: ArrayLike, space: Space, n: int | None = None) -> Floats:
    """Accuracy under shift beyond what the line predicts from accuracy without, in accuracy."""
    return np.asarray(np.asarray(accuracy_ood, np.float64) - expected(line, accuracy_id, space, n))


class Correlations(NamedTuple):
    """Of two figures across models."""

    pearson: float
    spearman: float
    kendall: float


def correlations(a: ArrayLike, b: ArrayLike) -> Correlations:
    """Three correlations of two figures `[models]`; Kendall's is tau-b."""
    from scipy.stats import kendalltau, pearsonr, spearmanr

    return Correlations(*(float(test(a, b).statistic) for test in (pearsonr, spearmanr, kendalltau)))
