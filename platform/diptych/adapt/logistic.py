"""L2 multinomial logistic regression for many strengths of the penalty: the solver behind the linear probe.

L-BFGS in the metric of the features' covariance. With H = h Cov(x) + I / (C N), h the mean of p (1 - p), as the first guess of the
Hessian, directions in which features hardly vary cost no more steps than the others; each C starts from the fit of the nearest
one; and a line search moves along logits that are known, so that an iteration reads the features twice whatever it tries.

Source: Nocedal, Updating Quasi-Newton Matrices with Limited Storage (Mathematics of Computation, 1980).
Shape legend: N examples, D feature width, C classes, E = D + 1 parameters a class, R directions in which features vary.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.adapt.moments import Doubles, scatter

Features = NDArray[Any]
Labels = NDArray[np.int64]

MAX_ITERATIONS = 1000
SWEEP_TOLERANCE = 1e-6
"""Choosing a strength needs predictions, not digits; yet it is 100 times stricter than what scikit-learn stops at."""
HISTORY = 10
"""Pairs of steps and gradient changes that L-BFGS remembers."""
FLAT_ENOUGH = 0.5
"""A line search ends where the slope is at most this share of the slope it started with."""
TRIALS = 20


class Weights(NamedTuple):
    """A multinomial classifier: `coef` float64 `[C, D]`, `intercept` float64 `[C]`, and the iterations it took."""

    coef_CD: Doubles
    intercept_C: Doubles
    iterations: int = 0

    def logits(self, x: Features) -> NDArray[Any]:
        """`[N, C]`, in the precision of the features."""
        return np.asarray(x @ self.coef_CD.T.astype(x.dtype) + self.intercept_C.astype(x.dtype))


class Path:
    """Fits of one problem along C; each starts from the fit of the nearest C so far, on a logarithmic scale."""

    def __init__(self, problem: Problem, tolerance: float = SWEEP_TOLERANCE, max_iterations: int = MAX_ITERATIONS) -> None:
        self.problem, self.tolerance, self.max_iterations = problem, tolerance, max_iterations
        self.fits: dict[float, Weights] = {}

    def at(self, C: float) -> Weights:
        """The fit at C, made once."""
        if C not in self.fits:
            nearest = min(self.fits, key=lambda known: abs(math.log(known / C)), default=None)
            start = None if nearest is None else self.fits[nearest]
            self.fits[C] = self.problem.fit(C, start, self.tolerance, self.max_iterations)
        return self.fits[C]


class Problem:
    """Training rows, made ready once for fits at any strength.

    Parameters are `[C, D + 1]` float64: coefficients, then the intercept that belongs to centred features, which decouples the two. Only
    products with the features run in the features' own precision.
    """

    def __init__(self, x_ND: Features, label_N: Labels) -> None:
        """Takes rows `[N, D]`, float32 or float64, and class numbers 0 to C - 1, every one of which occurs."""
        self.x_ND = np.ascontiguousarray(x_ND)
        self.label_N, self.row_N = label_N, np.arange(len(label_N))
        self.classes = int(label_N.max()) + 1
        self.mean_D = self.x_ND.mean(axis=0, dtype=np.float64)
        covariance_DD = scatter(self.x_ND, self.mean_D[None], np.zeros(len(label_N), np.int64)) / len(label_N)
        value_D, vector_DD = np.linalg.eigh(covariance_DD)
        # Where features do not vary, the penalty keeps the coefficients at 0: steps there would be rounding, blown up by a large C.
        varies_D = value_D > value_D[-1] * len(value_D) * np.finfo(np.float64).eps
        self.spread_R, self.basis_DR = value_D[varies_D], vector_DD[:, varies_D]

    def fit(
        self, C: float, start: Weights | None = None, tolerance: float = SWEEP_TOLERANCE, max_iterations: int = MAX_ITERATIONS
    ) -> Weights:
        """Minimises the mean log loss plus `|coef|^2 / (2 C N)` until no component of the gradient exceeds `tolerance`.

        With two classes the penalty is that of one row, the difference of theirs, as is usual.
        """
        penalty = (1 if self.classes > 2 else 2) / (C * len(self.x_ND))
        descent = Descent(self, penalty, start)
        iterations = 0
        while iterations < max_iterations and descent.steepness() > tolerance and descent.step():
            iterations += 1
        return self._weights(descent.parameter_CE, iterations)

    def parameters(self, weights: Weights | None) -> Doubles:
        """Weights as parameters; zeros for None."""
        if weights is None:
            return np.zeros((self.classes, self.x_ND.shape[1] + 1))
        return np.column_stack([weights.coef_CD, weights.intercept_C + weights.coef_CD @ self.mean_D])

    def _weights(self, parameter_CE: Doubles, iterations: int) -> Weights:
        coef_CD = np.ascontiguousarray(parameter_CE[:, :-1])
        return Weights(coef_CD, parameter_CE[:, -1] - coef_CD @ self.mean_D, iterations)

    def logits(self, parameter_CE: Doubles) -> Features:
        """`[C, N]`, in the features' precision."""
        coef_CD = parameter_CE[:, :-1]
        shift_C = parameter_CE[:, -1] - coef_CD @ self.mean_D
        dtype = self.x_ND.dtype
        return np.asarray(coef_CD.astype(dtype) @ self.x_ND.T + shift_C.astype(dtype)[:, None])

    def gradient(self, share_CN: Features, coef_CD: Doubles, penalty: float) -> Doubles:
        """The gradient `[C, D + 1]` in parameters; overwrites the class probabilities `share_CN`."""
        share_CN[self.label_N, self.row_N] -= 1
        intercept_C = share_CN.mean(axis=1, dtype=np.float64)
        coef_CD = (share_CN @ self.x_ND) / len(self.x_ND) + penalty * coef_CD - np.outer(intercept_C, self.mean_D)
        return np.column_stack([coef_CD, intercept_C])

    def own(self, logit_CN: Features) -> float:
        """The sum over the rows of the value of their own class."""
        return float(logit_CN[self.label_N, self.row_N].sum(dtype=np.float64))


class Descent:
    """L-BFGS from a start, one `step` at a time."""

    def __init__(self, problem: Problem, penalty: float, start: Weights | None) -> None:
        self.problem, self.penalty = problem, penalty
        self.parameter_CE = problem.parameters(start)
        self.logit_CN = problem.logits(self.parameter_CE)
        share_CN = _softmax(self.logit_CN)
        # Uniform p give exactly 1 / C, the curvature of the softmax there.
        curvature = max(float(np.sum(share_CN * (1 - share_CN), dtype=np.float64)) / share_CN.shape[1] / (problem.classes - 1), 1e-6)
        self.inverse_R, self.inverse_intercept = 1 / (curvature * problem.spread_R + penalty), 1 / curvature
        self.pairs: deque[tuple[Doubles, Doubles, float]] = deque(maxlen=HISTORY)
        self.gradient_CE = problem.gradient(share_CN, self.parameter_CE[:, :-1], penalty)

    def steepness(self) -> float:
        """The largest component of the gradient in coefficients and intercepts as a user sees them, not centred."""
        intercept_C = self.gradient_CE[:, -1]
        coef_CD = self.gradient_CE[:, :-1] + np.outer(intercept_C, self.problem.mean_D)
        return float(max(np.abs(coef_CD).max(), np.abs(intercept_C).max()))

    def step(self) -> bool:
        """One update; False if rounding leaves nothing to gain."""
        problem = self.problem
        direction_CE = self._direction()
        slope = float(np.vdot(self.gradient_CE, direction_CE))
        if slope >= 0:
            return False
        move_CN = problem.logits(direction_CE)
        found = self._line_search(direction_CE, move_CN, slope)
        if found is None:
            return False
        length, self.logit_CN, share_CN = found
        step_CE = length * direction_CE
        self.parameter_CE = self.parameter_CE + step_CE
        before_CE, self.gradient_CE = self.gradient_CE, problem.gradient(share_CN, self.parameter_CE[:, :-1], self.penalty)
        change_CE = self.gradient_CE - before_CE
        if (bend := float(np.vdot(step_CE, change_CE))) > 0:
            self.pairs.append((step_CE, change_CE, bend))
        return True

    def _direction(self) -> Doubles:
        """The two-loop recursion of Nocedal (1980), around our own first guess of the Hessian."""
        q_CE, weights = self.gradient_CE.copy(), []
        for step_CE, change_CE, bend in reversed(self.pairs):
            weights.append(float(np.vdot(step_CE, q_CE)) / bend)
            q_CE -= weights[-1] * change_CE
        r_CE = self._precondition(q_CE)
        if self.pairs:
            _, change_CE, bend = self.pairs[-1]
            r_CE *= bend / float(np.vdot(change_CE, self._precondition(change_CE)))
        for (step_CE, change_CE, bend), weight in zip(self.pairs, reversed(weights), strict=True):
            r_CE += (weight - float(np.vdot(change_CE, r_CE)) / bend) * step_CE
        return -r_CE

    def _precondition(self, gradient_CE: Doubles) -> Doubles:
        basis_DR = self.problem.basis_DR
        coef_CD = ((gradient_CE[:, :-1] @ basis_DR) * self.inverse_R) @ basis_DR.T
        return np.column_stack([coef_CD, gradient_CE[:, -1] * self.inverse_intercept])

    def _line_search(self, direction_CE: Doubles, move_CN: Features, slope: float) -> tuple[float, Features, Features] | None:
        """A length where the slope is flat, the logits and probabilities there; by secants inside a bracket, for slopes only rise."""
        problem, coef_CD = self.problem, direction_CE[:, :-1]
        own = problem.own(move_CN)
        pull, stretch = self.penalty * float(np.vdot(self.parameter_CE[:, :-1], coef_CD)), self.penalty * float(np.vdot(coef_CD, coef_CD))
        low, low_slope, high, high_slope, length = 0.0, slope, math.inf, math.inf, 1.0
        for _ in range(TRIALS):
            logit_CN = self.logit_CN + problem.x_ND.dtype.type(length) * move_CN
            share_CN = _softmax(logit_CN)
            here = (float(np.vdot(share_CN, move_CN)) - own) / len(problem.x_ND) + pull + length * stretch
            if abs(here) <= FLAT_ENOUGH * -slope:
                return length, logit_CN, share_CN
            if here < 0:
                low, low_slope = length, here
            else:
                high, high_slope = length, here
            length = _next_length(low, low_slope, high, high_slope, slope)
        return None


def _next_length(low: float, low_slope: float, high: float, high_slope: float, first_slope: float) -> float:
    """The next trial of a line search: a secant inside the bracket, kept off its ends; outwards, at most four times as far."""
    if high == math.inf:
        rise = (low_slope - first_slope) / low
        return min(low - low_slope / rise, 4 * low) if rise > 0 else 4 * low
    secant = low - low_slope * (high - low) / (high_slope - low_slope)
    margin = 0.1 * (high - low)
    return min(max(secant, low + margin), high - margin)


def _softmax(logit_CN: Features) -> Features:
    """Softmax over classes, `[C, N]`: classes first, so that its sums run along whole rows of memory."""
    share_CN = logit_CN - logit_CN.max(axis=0)
    np.exp(share_CN, out=share_CN)
    share_CN /= share_CN.sum(axis=0)
    return np.asarray(share_CN)
