"""Linear probe: L2 multinomial logistic regression on frozen features, its strength chosen on a validation split.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.2 and appendix A.3.
The paper's features are those before the final projection of a ViT, not normalised; any others will do.

Shape legend: N examples, D feature width, C classes (as a suffix); the argument C is the inverse of the L2 penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diptych.adapt import support as parts
from diptych.adapt.logistic import MAX_ITERATIONS, Features, Labels, Path, Problem, Weights
from diptych.adapt.moments import Doubles
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Examples, Support

NAME = "linear-probe"
STEPS_PER_DECADE = 8
DECADES = (-6, 6)
COARSE = 2 * STEPS_PER_DECADE
"""Steps between the first seven values tried: 1e-6, 1e-4, … 1e6."""


class Config(BaseConfig):
    """Linear probe on stored features."""

    method: Literal["linear-probe"] = "linear-probe"
    C: float | None = Field(
        None,
        gt=0,
        description="inverse of the L2 penalty; null: the best of 1e-6 to 1e6 on validation, 1 where there is no validation split",
    )
    max_iterations: int = Field(MAX_ITERATIONS, ge=1, description="most iterations a fit, converged or not")

    def build(self) -> LinearProbe:
        """The adapter."""
        return LinearProbe(self)


class Probe(NamedTuple):
    """A fitted probe; `predicted` are the classes `[N]` of the test rows.

    `coef` is float64 `[C, D]` and `intercept` `[C]`; with two classes there is one row, that of the second class.
    """

    accuracy: float
    coef: Doubles
    intercept: Doubles
    predicted: Labels


class Sweep(NamedTuple):
    """The chosen strength and every (C, validation accuracy) tried, in the order tried."""

    C: float
    accuracy: float
    tried: tuple[tuple[float, float], ...]


class LinearProbe:
    """The adapter. After `fit`: `C`, and `weights`. It does not use the zero-shot weights."""

    needs = frozenset({"labelled"})

    def __init__(self, config: Config) -> None:
        self.config = config
        self.C = math.nan
        self.weights: Weights | None = None

    def fit(self, support: Support) -> LinearProbe:
        """Chooses C on validation, if there is one, and fits to the labelled rows alone. Raises DataError for a class without rows."""
        x_ND, label_N = parts.labelled(support, NAME, every_class=True)
        _check(x_ND, label_N)
        path = Path(Problem(x_ND, label_N), max_iterations=self.config.max_iterations)
        held_out = parts.validation(support, NAME)
        if self.config.C is not None or held_out is None:
            self.C = self.config.C or 1.0
        else:
            held = held_out
            self.C = search(lambda C: parts.accuracy(path.at(C).logits(held.feature_ND), held.label_N)).C
        self.weights = path.at(self.C)
        return self

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """Logits `[N, C]`."""
        assert self.weights is not None, "predict before fit"
        return self.weights.logits(parts.features(test, self.weights.coef_CD.shape[1])).astype(np.float32)


# ---------------------------------------------------------------- the paper's protocol


def probe(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    *,
    C: float,
    tolerance: float = 1e-10,
    max_iterations: int = MAX_ITERATIONS,
) -> Probe:
    """Fits on the training rows, in float64, and scores the test rows.

    Args:
        train_x, test_x: `[N, D]`, float, not normalised.
        train_y, test_y: class numbers `[N]`; at least two classes to train on.
        C: inverse of the L2 penalty, > 0; the penalty is `|coef|^2 / (2 C)` beside the summed log loss, the intercept is free.
        tolerance: on the largest component of the mean loss's gradient.
        max_iterations: of L-BFGS; the paper stops at 1,000, converged or not.

    Raises:
        ConfigError: C is not positive.
        DataError: one class only, or rows and labels of different number.
    """
    if not C > 0:
        raise ConfigError.at("This is no regularisation strength", "C", C, "a number > 0")
    _check(train_x, train_y)
    _check_rows(test_x, test_y)
    classes, index = np.unique(train_y, return_inverse=True)
    weights = Problem(np.asarray(train_x, np.float64), index).fit(C, tolerance=tolerance, max_iterations=max_iterations)
    predicted = classes[weights.logits(np.asarray(test_x, np.float64)).argmax(axis=1)]
    coef, intercept = weights.coef_CD, weights.intercept_C
    if len(classes) == 2:
        coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
    return Probe(float((predicted == test_y).mean()), coef, intercept, predicted)


def strength(step: int) -> float:
    """The value of C at a step of the grid: 8 steps a decade, step 0 is 1e-6 and step 96 is 1e6."""
    return float(10.0 ** (DECADES[0] + step / STEPS_PER_DECADE))


def search(accuracy: Callable[[float], float]) -> Sweep:
    """Chooses C by accuracy: seven values two decades apart, then the interval around the best halved until 8 steps a decade.

    At most 15 values are tried, each once. Of equal accuracies the stronger penalty (lower C) wins.
    """
    tried: dict[int, float] = {}
    last = (DECADES[1] - DECADES[0]) * STEPS_PER_DECADE
    candidates = list(range(0, last + 1, COARSE))
    width = COARSE
    while width >= 1:
        tried |= {step: accuracy(strength(step)) for step in candidates if step not in tried}
        best = max(candidates, key=lambda step: (tried[step], -step))
        width //= 2
        candidates = [step for step in (best - width, best, best + width) if 0 <= step <= last]
    return Sweep(strength(best), tried[best], tuple((strength(step), value) for step, value in tried.items()))


def sweep_c(train_x: Features, train_y: Labels, validation_x: Features, validation_y: Labels) -> Sweep:
    """`search` by validation accuracy of fits in float32. Arguments and errors as for `probe`."""
    _check(train_x, train_y)
    _check_rows(validation_x, validation_y)
    classes, index = np.unique(train_y, return_inverse=True)
    path = Path(Problem(np.asarray(train_x, np.float32), index))
    held_x = np.asarray(validation_x, np.float32)
    return search(lambda C: float((classes[path.at(C).logits(held_x).argmax(axis=1)] == validation_y).mean()))


def _check(x: Features, y: Labels) -> None:
    _check_rows(x, y)
    if len(np.unique(y)) < 2:
        raise DataError.at("A probe needs something to tell apart", "labels", np.unique(y), "at least two classes")


def _check_rows(x: Features, y: Labels) -> None:
    if len(x) != len(y):
        raise DataError.at("Features and labels do not match", "features, labels", [len(x), len(y)], "a label a row")
    parts.refuse_not_finite(np.asarray(x), "features")
