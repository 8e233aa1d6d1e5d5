"""A noisy quadratic bowl whose curvatures span many decades: what a diagonal of the Hessian should be good for.

L = 1/2 sum_i a_i x_i^2, a_i evenly spaced on a logarithmic scale, x_i(0) = +-a_i^(-1/2), so that every coordinate holds as much of the loss; the
gradient of a step has noise of standard deviation `noise` sqrt(a_i) added. The noise is linear in x, so the Hessian has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.core.config import Config as BaseConfig
from diptych.train.problems.problem import Named, Problem, generator


class Quadratic(Problem):
    """See the module. Figures: `loss`, the last loss as a share of the first, without noise; its decimal logarithm, `log_loss`."""

    def __init__(self, curvature_from: float, curvature_to: float, coordinates: int, noise: float) -> None:
        self.curvature = torch.logspace(0, 1, coordinates, base=curvature_to / curvature_from, dtype=torch.float64) * curvature_from
        self.noise_scale = noise

    def start(self, seed: int) -> Sequence[Named]:
        """Draws the problem of a seed."""
        self.seed = seed
        signs = torch.randint(0, 2, self.curvature.shape, generator=generator(seed, "signs")) * 2.0 - 1.0
        self.x = nn.Parameter(signs * self.curvature**-0.5)
        self.first = self._loss().item()
        return [("x", self.x)]

    def batch(self, step: int, size: int) -> Mapping[str, Tensor]:
        """A step's draws."""
        del size
        draws = torch.randn(self.curvature.shape, generator=generator(self.seed, "noise", step), dtype=torch.float64)
        return {"noise": self.noise_scale * self.curvature.sqrt() * draws}

    def losses(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The loss at the parameters."""
        del step
        return {"loss": self._loss() + batch["noise"] @ self.x}

    def figures(self) -> dict[str, float]:
        """See the class."""
        share = self._loss().item() / self.first
        return {"loss": share, "log_loss": math.log10(share) if 0 < share < math.inf else share}

    def _loss(self) -> Tensor:
        return (self.curvature * self.x.square()).sum() / 2


class Config(BaseConfig):
    """The quadratic bowl."""

    method: Literal["quadratic"] = "quadratic"
    curvature_from: float = Field(1e-3, gt=0, description="smallest curvature")
    curvature_to: float = Field(1e3, gt=0, description="largest curvature")
    coordinates: int = Field(50, ge=2, description="number of coordinates")
    noise: float = Field(0.1, ge=0, description="standard deviation of the gradient's noise, in roots of the curvature")

    def build(self) -> Quadratic:
        """The problem."""
        return Quadratic(self.curvature_from, self.curvature_to, self.coordinates, self.noise)
