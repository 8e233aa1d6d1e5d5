"""Three functions of one variable, given by their slopes: valleys that momentum runs past (Dubey et al., "diffGrad", section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.core.config import Config as BaseConfig
from diptych.train.problems.problem import Named, Problem


def _two_valleys(x: float) -> float:
    return 2 * x + 0.6 if x <= 0 else 2 * x - 0.4


def _cliff(x: float) -> float:
    return -40.0 if x <= -0.9 else x * math.cos(8 * x) + math.sin(8 * x) + 3 * x**2


def _steps(x: float) -> float:
    for end, slope in ((-0.5, None), (-0.4, 1.0), (0.0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0)):
        if x <= end:
            return 2 * x if slope is None else slope
    return 2 * x


SLOPES: Mapping[str, Callable[[float], float]] = {"two-valleys": _two_valleys, "cliff": _cliff, "steps": _steps}


class OneDimensional(Problem):
    """See the module. Figures: `end` and `furthest`, the last and the largest x; the way starts at -1."""

    def __init__(self, function: str) -> None:
        self.slope = SLOPES[function]

    def start(self, seed: int) -> Sequence[Named]:
        """Draws the problem of a seed."""
        del seed
        self.x = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.furthest = self.x.item()
        return [("x", self.x)]

    def batch(self, step: int, size: int) -> Mapping[str, Tensor]:
        """A step's draws."""
        del step, size
        return {}

    def losses(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Slope times x: of the function it has the gradient, not the value."""
        del batch, step
        return {"loss": self.slope(self.x.item()) * self.x}

    def after_step(self) -> None:
        """Notes how far it came."""
        self.furthest = max(self.furthest, self.x.item())

    def figures(self) -> dict[str, float]:
        """See the class."""
        return {"end": self.x.item(), "furthest": self.furthest}


class Config(BaseConfig):
    """A function of one variable; every seed is the same."""

    method: Literal["one-dimensional"] = "one-dimensional"
    function: Literal["two-valleys", "cliff", "steps"] = Field("two-valleys", description="which function")

    def build(self) -> OneDimensional:
        """The problem."""
        return OneDimensional(self.function)
