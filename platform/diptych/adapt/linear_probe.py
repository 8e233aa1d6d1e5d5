"""Linear probe: L2 multinomial logistic regression on frozen features, its strength chosen on a validation split.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.2 and appendix A.3.
Features are those before the final projection of a ViT, not normalised.

Shape legend: N examples, D feature width, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.evaluate.rows import Rows

Features = NDArray[Any]
Labels = NDArray[np.int64]

TASK = "linear-probe"
MAX_ITERATIONS = 1000
STEPS_PER_DECADE = 8
DECADES = (-6, 6)
COARSE = 2 * STEPS_PER_DECADE
"""Steps between the first seven values tried: 1e-6, 1e-4, … 1e6."""


class Split(NamedTuple):
    """Features `[N, D]`, float, not normalised, and class numbers `[N]`."""

    x: Features
    y: Labels


class Probe(NamedTuple):
    """A fitted probe; `predicted` are the classes `[N]` of the test rows.

    `coef` is float64 `[C, D]` and `intercept` `[C]`; with two classes there is one row, that of the second class.
    """

    accuracy: float
    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    predicted: Labels


class Sweep(NamedTuple):
    """The chosen strength and every (C, validation accuracy) tried, in the order tried."""

    C: float
    accuracy: float
    tried: tuple[tuple[float, float], ...]


def probe(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    *,
    C: float,
    tolerance: float = 1e-8,
    max_iterations: int = MAX_ITERATIONS,
) -> Probe:
    """Fits on the training rows and scores the test rows.

    Args:
        train_x, test_x: `[N, D]`, float, not normalised.
        train_y, test_y: class numbers `[N]`; at least two classes to train on.
        C: inverse of the L2 penalty, > 0; the penalty is `|coef|^2 / (2 C)` beside the summed log loss, the intercept is free.
        tolerance: on the largest component of the gradient.
        max_iterations: of L-BFGS; the paper stops at 1,000, converged or not.

    Raises:
        ConfigError: C is not positive.
        DataError: one class only, or rows and labels of different number.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    _check(train_x, train_y, test_x, test_y, C)
    model = LogisticRegression(C=C, tol=tolerance, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.asarray(train_x, np.float64), train_y)
    predicted = np.asarray(model.predict(np.asarray(test_x, np.float64)))
    return Probe(float((predicted == test_y).mean()), model.coef_, model.intercept_, predicted)


def strength(step: int) -> float:
    """The value of C at a step of the grid: 8 steps a decade, step 0 is 1e-6 and step 96 is 1e6."""
    return float(10.0 ** (DECADES[0] + step / STEPS_PER_DECADE))


def sweep_c(train_x: Features, train_y: Labels, validation_x: Features, validation_y: Labels) -> Sweep:
    """Chooses C by validation accuracy: seven values two decades apart, then the interval around the best halved until 8 steps a decade.

    At most 15 fits. Of equal accuracies the stronger penalty (lower C) wins. Arguments and errors as for `probe`.
    """
    tried: dict[int, float] = {}

    def accuracy(step: int) -> float:
        if step not in tried:
            # Choosing needs predictions, not digits: scikit-learn's own default tolerance is enough.
            tried[step] = probe(train_x, train_y, validation_x, validation_y, C=strength(step), tolerance=1e-4).accuracy
        return tried[step]

    last = (DECADES[1] - DECADES[0]) * STEPS_PER_DECADE
    candidates = list(range(0, last + 1, COARSE))
    width = COARSE
    while width >= 1:
        best = max(candidates, key=lambda step: (accuracy(step), -step))
        width //= 2
        candidates = [step for step in (best - width, best, best + width) if 0 <= step <= last]
    return Sweep(strength(best), tried[best], tuple((strength(step), value) for step, value in tried.items()))


def run(train: Split, validation: Split, test: Split, rows: Rows) -> list[Metric]:
    """The paper's protocol as a row of the evaluation matrix: sweep on validation, refit on train + validation, `acc1` on test.

    `rows` names the set, the task (`TASK`), the test rows' keys, the bootstrap's seed, and in its settings what features these are. The
    chosen C is no setting, since every checkpoint has its own: see `sweep_c`. Errors as for `probe`.
    """
    chosen = sweep_c(train.x, train.y, validation.x, validation.y)
    both = Split(np.concatenate([train.x, validation.x]), np.concatenate([train.y, validation.y]))
    fitted = probe(both.x, both.y, test.x, test.y, C=chosen.C)
    settings = {**rows.settings, "train_rows": len(train.y), "validation_rows": len(validation.y)}
    return [replace(rows, settings=settings).mean("acc1", fitted.predicted == test.y)]


def _check(train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, C: float) -> None:
    if not C > 0:
        raise ConfigError.at("This is no regularisation strength", "C", C, "a number > 0")
    if len(train_x) != len(train_y) or len(test_x) != len(test_y):
        lengths = [len(train_x), len(train_y), len(test_x), len(test_y)]
        raise DataError.at("Features and labels do not match", "features, labels", lengths, "a label a row")
    if len(np.unique(train_y)) < 2:
        raise DataError.at("A probe needs something to tell apart", "labels", np.unique(train_y), "at least two classes")
