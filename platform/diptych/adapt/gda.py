"""Gaussian discriminant analysis: class means and one shared covariance, in closed form, beside the zero-shot classifier.

The symbols are the paper's: mu_k, Sigma, its inverse P, w_k = P mu_k, b_k = log pi_k - mu_k' P mu_k / 2, and the logits
`scale * x T + alpha * (x W + b)`. Three fitters: few-shot, base-to-new, and expectation maximisation without labels.
Every augmented view of a picture is a row of its own, never averaged. All algebra is float64.

With one picture a class in one view nothing scatters around the means: Sigma = 0, so W = 0, and the zero-shot classifier stands alone.

Source: Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation (ICLR 2024), sections 3.2 to 3.4.
Shape legend: N rows, D feature width, C classes, Q neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diptych.adapt import support as parts
from diptych.adapt.moments import Doubles, class_means, pseudo_inverse, scatter
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

NAME = "gda"
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
ALPHA_UNTRIED = 0.1
"""Where the published search starts: what stands if no candidate gets any row right, or there is no validation split."""
ALPHA_UNLABELLED = 1.0
LEAST_MASS = 1e-8
"""Floor of a class's mass in EM: a class that lost all its rows must not divide by 0."""
LEAST_SPREAD = 1e-24
"""Mean squared distance to the class means, relative to the mean squared norm, that is rounding and counts as 0."""


class Config(BaseConfig):
    """Gaussian discriminant analysis on stored features."""

    method: Literal["gda"] = "gda"
    fitter: Literal["few-shot", "em"] = Field("few-shot", description="learn from labelled examples, or from unlabelled ones by EM")
    alpha: float | None = Field(
        None,
        gt=0,
        description="weight of the Gaussian's logits; null: few-shot, the best of `alphas` on validation (0.1 without); em, 1, which for N rows "
        "of D values weighs the Gaussians at D / N of their own scale",
    )
    alphas: tuple[float, ...] = Field(
        ALPHAS, min_length=1, description="values of alpha to try on validation; of equal ones the first wins"
    )
    prior: Literal["uniform", "empirical"] = Field("uniform", description="pi_k in the few-shot fit: 1 / C, or the share of labelled rows")
    neighbours: int = Field(64, ge=2, description="base-to-new: labelled rows nearest to a new class's text that stand in for its own")
    text_copies: int = Field(16, ge=0, description="base-to-new: times the text feature counts in the mean of a new class")
    rounds: int = Field(20, ge=1, description="em: most rounds")
    tolerance: float = Field(1e-4, ge=0, description="em: stop when no responsibility, in [0, 1], moved by as much")

    def build(self) -> GDA:
        """The adapter."""
        return GDA(self)


class Linear(NamedTuple):
    """A linear classifier: `x W + b`, float64 `[D, C]` and `[C]`."""

    weight_DC: Doubles
    bias_C: Doubles

    def logits(self, feature_ND: Floats) -> Doubles:
        """`[N, C]`, float64."""
        return np.asarray(feature_ND @ self.weight_DC + self.bias_C)

    def beside(self, text_CD: Floats, logit_scale: float, alpha: float) -> Linear:
        """The ensemble with the zero-shot classifier, `logit_scale * x T + alpha * (x W + b)`, as one linear classifier."""
        return Linear(logit_scale * np.asarray(text_CD, np.float64).T + alpha * self.weight_DC, alpha * self.bias_C)


class Gaussians(NamedTuple):
    """Class means, float64 `[C, D]`, and the inverse of their shared covariance, float64 `[D, D]`."""

    mean_CD: Doubles
    precision_DD: Doubles

    def classifier(self, prior_C: Doubles | None = None) -> Linear:
        """The discriminant, by Bayes' rule; `prior_C` sums to 1 and is uniform by default."""
        weight_DC = self.precision_DD @ self.mean_CD.T
        prior_C = np.full(len(self.mean_CD), 1 / len(self.mean_CD)) if prior_C is None else prior_C
        return Linear(weight_DC, np.log(prior_C) - 0.5 * np.einsum("cd,dc->c", self.mean_CD, weight_DC))


class Chosen(NamedTuple):
    """An alpha and its accuracy on validation, in [0, 1]."""

    alpha: float
    accuracy: float


class Mixture(NamedTuple):
    """What the M-step estimates: class means, float64 `[C, D]`, and the shared covariance, float64 `[D, D]`."""

    mean_CD: Doubles
    covariance_DD: Doubles


class GDA:
    """The adapter. After `fit`: `alpha`, and `classifier`, the ensemble with the zero-shot classifier."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = frozenset({"labelled"} if config.fitter == "few-shot" else {"unlabelled"})
        self.alpha = float("nan")
        self.classifier: Linear | None = None

    def fit(self, support: Support) -> GDA:
        """Fits the Gaussians, then chooses alpha. Raises DataError: a part is missing, or a class has no labelled row."""
        if self.config.fitter == "em":
            x_ND = parts.unlabelled(support, NAME)
            self.alpha = self.config.alpha or ALPHA_UNLABELLED
            gaussian = expectation_maximisation(
                x_ND, support.text_CD, support.logit_scale, self.alpha, self.config.rounds, self.config.tolerance
            )
        else:
            x_ND, label_N = parts.labelled(support, NAME, every_class=True)
            prior_C = np.bincount(label_N) / len(label_N) if self.config.prior == "empirical" else None
            gaussian = fit_few_shot(x_ND, label_N, len(support.text_CD)).classifier(prior_C)
            self.alpha = self._alpha(support, gaussian)
        self.classifier = gaussian.beside(support.text_CD, support.logit_scale, self.alpha)
        return self

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """Logits `[N, C]` of the ensemble."""
        assert self.classifier is not None, "predict before fit"
        x_ND = parts.features(test, len(self.classifier.weight_DC))
        return self.classifier.logits(x_ND).astype(np.float32)

    def base_to_new(self, support: Support, new_text_CD: Floats) -> tuple[Linear, Linear]:
        """Ensembles for the classes of the support and for new ones known by their text `[C_new, D]` alone.

        Alpha is chosen on the base classes and reused. Raises DataError as `fit` does, and if a base class has a single row.
        """
        x_ND, label_N = parts.labelled(support, NAME, every_class=True)
        base = fit_base(x_ND, label_N, len(support.text_CD)).classifier()
        new = fit_new(x_ND, new_text_CD, self.config.neighbours, self.config.text_copies).classifier()
        self.alpha = self._alpha(support, base)
        return (
            base.beside(support.text_CD, support.logit_scale, self.alpha),
            new.beside(new_text_CD, support.logit_scale, self.alpha),
        )

    def _alpha(self, support: Support, gaussian: Linear) -> float:
        held_out = parts.validation(support, NAME)
        if self.config.alpha is not None or held_out is None:
            return self.config.alpha or ALPHA_UNTRIED
        zero_shot_NC = support.logit_scale * (held_out.feature_ND @ np.asarray(support.text_CD, np.float64).T)
        return choose_alpha(zero_shot_NC, gaussian.logits(held_out.feature_ND), held_out.label_N, self.config.alphas).alpha


# ---------------------------------------------------------------- the fits


def fit_few_shot(feature_ND: Floats, label_N: Labels, classes: int) -> Gaussians:
    """Means, and the shrunk precision of the covariance (divisor N - 1) pooled over the classes. Every class needs a row."""
    mean_CD = class_means(feature_ND, label_N, classes)
    covariance_DD = scatter(feature_ND, mean_CD, label_N) / max(1, len(label_N) - 1)
    if np.trace(covariance_DD) <= LEAST_SPREAD * np.mean(np.square(mean_CD).sum(axis=1)):
        # Equal views differ from their mean by rounding alone, which an inverse would blow up into a classifier.
        covariance_DD = np.zeros_like(covariance_DD)
    return Gaussians(mean_CD, shrunk_precision(covariance_DD, len(label_N)))


def shrunk_precision(covariance_DD: Doubles, rows: int) -> Doubles:
    """`D * pinv((rows - 1) S + tr(S) I)`: ridge-type shrinkage of Kubokawa and Srivastava, usable for fewer rows than features."""
    width = len(covariance_DD)
    return width * pseudo_inverse((rows - 1) * covariance_DD + np.trace(covariance_DD) * np.eye(width))


def fit_base(feature_ND: Floats, label_N: Labels, classes: int) -> Gaussians:
    """Base classes of base-to-new: the pseudo-inverse of the mean of the class covariances (divisor n_k - 1), not shrunk.

    Raises DataError for a class of less than two rows, which has no covariance.
    """
    size_C = np.bincount(label_N, minlength=classes)
    if size_C.min() < 2:
        raise DataError.at(
            "A class has no covariance", f"{NAME}: labelled", f"{size_C.min()} rows of class {size_C.argmin()}", "at least two",
            "raise shots, or encode several augmented views a picture",
        )  # fmt: skip
    mean_CD = class_means(feature_ND, label_N, classes)
    return Gaussians(mean_CD, pseudo_inverse(scatter(feature_ND, mean_CD, label_N, (1 / (classes * (size_C - 1)))[label_N])))


def fit_new(feature_ND: Floats, text_CD: Floats, neighbours: int, text_copies: int) -> Gaussians:
    """New classes of base-to-new, known by their text alone: its nearest support rows, of whatever class, stand in for examples.

    The mean is over these rows and `text_copies` copies of the text; the covariance is centred on the text; the precision is the mean
    of the shrunk precisions. With fewer rows than `neighbours` all are taken. Raises DataError for less than two rows.
    """
    if len(feature_ND) < 2:
        raise DataError.at("There are no neighbours", f"{NAME}: labelled", f"{len(feature_ND)} rows", "at least two")
    text_CD = text_CD.astype(np.float64)
    count, width = min(neighbours, len(feature_ND)), text_CD.shape[1]
    near_CQ = np.argsort(-(text_CD @ feature_ND.T), axis=1, kind="stable")[:, :count]
    mean_CD, precision_DD = np.empty((len(text_CD), width)), np.zeros((width, width))
    for index, (near_Q, text_D) in enumerate(zip(near_CQ, text_CD, strict=True)):
        near_QD = feature_ND[near_Q].astype(np.float64)
        mean_CD[index] = (near_QD.sum(axis=0) + text_copies * text_D) / (count + text_copies)
        precision_DD += _precision_around(near_QD - text_D) / len(text_CD)
    return Gaussians(mean_CD, precision_DD)


def _precision_around(offset_QD: Doubles) -> Doubles:
    """`shrunk_precision` of the covariance `A'A / (Q - 1)` of few rows A, by Woodbury's identity: a solve of Q, not D, unknowns."""
    count, width = offset_QD.shape
    ridge = np.square(offset_QD).sum() / (count - 1)
    if ridge == 0:
        return np.zeros((width, width))
    inner_QQ = offset_QD @ offset_QD.T + ridge * np.eye(count)
    return np.asarray((np.eye(width) - offset_QD.T @ np.linalg.solve(inner_QQ, offset_QD)) * (width / ridge))


def choose_alpha(zero_shot_NC: Floats, gaussian_NC: Floats, label_N: Labels, alphas: Sequence[float] = ALPHAS) -> Chosen:
    """The alpha of the best top-1 accuracy of `zero_shot + alpha * gaussian`. A later one must be better than all before it."""
    best = Chosen(ALPHA_UNTRIED, 0.0)
    for alpha in alphas:
        accuracy = parts.accuracy(zero_shot_NC + alpha * gaussian_NC, label_N)
        if accuracy > best.accuracy:
            best = Chosen(alpha, accuracy)
    return best


# ---------------------------------------------------------------- without labels


def expectation_maximisation(
    feature_ND: Floats, text_CD: Floats, logit_scale: float, alpha: float, rounds: int = 20, tolerance: float = 1e-4
) -> Linear:
    """The Gaussians' classifier `x W + b` after EM on unlabelled rows, started from the zero-shot responsibilities; equal priors.

    Stops after `rounds`, or when no responsibility moved by `tolerance`.
    """
    gamma_NC = softmax(logit_scale * (feature_ND @ np.asarray(text_CD, np.float64).T))
    for _ in range(rounds):
        gaussian = mixture_classifier(m_step(feature_ND, gamma_NC), len(feature_ND))
        before_NC, gamma_NC = gamma_NC, softmax(gaussian.beside(text_CD, logit_scale, alpha).logits(feature_ND))
        if np.abs(gamma_NC - before_NC).max() < tolerance:
            break
    return gaussian


def m_step(feature_ND: Floats, gamma_NC: Doubles) -> Mixture:
    """Means and shared covariance under responsibilities `gamma_NC`; classes weigh equally in it, whatever their mass.

    `sum_i gamma_ik (x_i - mu_k)(x_i - mu_k)' / n_k = sum_i gamma_ik x_i x_i' / n_k - (2 - s_k) mu_k mu_k'`, s_k = sum_i gamma_ik / n_k,
    so one weighted product of the rows does for all classes; s_k is 1 unless n_k is at its floor.
    """
    classes, width = gamma_NC.shape[1], feature_ND.shape[1]
    mass_C = gamma_NC.sum(axis=0)
    share_NC = gamma_NC / np.maximum(mass_C, LEAST_MASS)
    mean_CD = share_NC.T @ feature_ND
    second_DD = scatter(feature_ND, np.zeros((1, width)), np.zeros(len(feature_ND), np.int64), share_NC.mean(axis=1))
    left_C = (2 - share_NC.sum(axis=0)) / classes
    return Mixture(mean_CD, second_DD - (mean_CD.T * left_C) @ mean_CD)


def mixture_classifier(mixture: Mixture, rows: int) -> Linear:
    """The discriminant of what the M-step gave, with the precision shrunk as in the few-shot fit."""
    return Gaussians(mixture.mean_CD, shrunk_precision(mixture.covariance_DD, rows)).classifier()


def softmax(logit_NC: Floats) -> Doubles:
    """Softmax over classes, float64 `[N, C]`."""
    weight_NC = np.exp(np.asarray(logit_NC, np.float64) - logit_NC.max(axis=1, keepdims=True))
    return np.asarray(weight_NC / weight_NC.sum(axis=1, keepdims=True))
