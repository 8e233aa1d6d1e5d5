"""Logistic regression on a noisy linear rule: a sum over samples, whose noise is known, so that batches may grow by it.

Labels are signs of a linear function of normal features with normal noise added. Batches are drawn without replacement; one of all samples
has no noise left. Gradients of single samples are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.core.config import Config as BaseConfig
from diptych.train.problems.problem import Named, Problem, generator


class Logistic(Problem):
    """See the module. Figures: `square_gradient`, the squared norm of the whole gradient at the end, and its decimal logarithm `log_gradient`."""

    def __init__(self, samples: int, features: int, noise: float, batch_size: int) -> None:
        self.samples, self.features, self.noise_scale, self.batch_size = samples, features, noise, batch_size

    def start(self, seed: int) -> Sequence[Named]:
        """Draws the problem of a seed."""
        self.seed = seed
        draws = generator(seed, "samples")
        self.x_ND = torch.randn(self.samples, self.features, generator=draws, dtype=torch.float64)
        rule_D = torch.randn(self.features, generator=draws, dtype=torch.float64) / self.features**0.5
        noise_N = self.noise_scale * torch.randn(self.samples, generator=draws, dtype=torch.float64)
        self.label_N = (self.x_ND @ rule_D + noise_N).sign()
        self.weight = nn.Parameter(torch.zeros(self.features, dtype=torch.float64))
        return [("weight", self.weight)]

    def batch(self, step: int, size: int) -> Mapping[str, Tensor]:
        """A step's draws."""
        rows = torch.randperm(self.samples, generator=generator(self.seed, "batch", step))[: min(size, self.samples)]
        return {"x_ND": self.x_ND[rows], "label_N": self.label_N[rows]}

    def losses(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The loss at the parameters."""
        del step
        return {"loss": nn.functional.softplus(-batch["label_N"] * (batch["x_ND"] @ self.weight)).mean()}

    @torch.no_grad()
    def noise(self, batch: Mapping[str, Tensor]) -> tuple[float, float]:
        """Of the batch's own samples."""
        grads_ND = self._gradients(batch)
        return float(grads_ND.var(dim=0).sum()), float(grads_ND.mean(dim=0).square().sum())

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """See the class."""
        mean_D = self._gradients({"x_ND": self.x_ND, "label_N": self.label_N}).mean(dim=0)
        square = mean_D.square().sum()
        return {"square_gradient": float(square), "log_gradient": float(square.clamp_min(1e-300).log10())}

    def _gradients(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of every sample, `[N, D]`."""
        margin_N = batch["label_N"] * (batch["x_ND"] @ self.weight)
        return batch["x_ND"] * (-batch["label_N"] * torch.sigmoid(-margin_N)).unsqueeze(1)


class Config(BaseConfig):
    """Logistic regression."""

    method: Literal["logistic"] = "logistic"
    samples: int = Field(4000, ge=2, description="samples in all")
    features: int = Field(20, ge=1, description="features of a sample")
    noise: float = Field(0.5, ge=0, description="standard deviation of what is added to the linear rule before its sign is taken")
    batch_size: int = Field(8, ge=1, description="samples of the first step, and of every one where nothing grows")

    def build(self) -> Logistic:
        """The problem."""
        return Logistic(self.samples, self.features, self.noise, self.batch_size)
