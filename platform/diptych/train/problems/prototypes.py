"""A classifier of points around prototypes, with or without weights whose length does not matter.

Every class has several prototypes, drawn from a standard normal distribution; a sample is one of them and noise. The network has three
layers without biases and ReLU between them. With `scale_invariant`, a layer multiplies by w / |w| (row by row) times `gain`: its output does
not depend on the length of any row of w, so that length is only what the optimizer makes of it (Heo et al., "AdamP", section 2).
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

HELD_OUT = 8192
WIDTHS = (32, 64, 64)


class Prototypes(Problem):
    """See the module.

    Figures: `loss`, the cross-entropy of 8,192 new samples, its decimal logarithm `log_loss`, and `growth`, how much longer the
    weights became, mean of the layers.
    """

    def __init__(self, classes: int, prototypes: int, noise: float, gain: float, batch_size: int, *, scale_invariant: bool) -> None:
        self.classes, self.prototypes, self.noise_scale, self.gain = classes, prototypes, noise, gain
        self.batch_size, self.scale_invariant = batch_size, scale_invariant

    def start(self, seed: int) -> Sequence[Named]:
        """Draws the problem of a seed."""
        self.seed = seed
        draws = generator(seed, "prototypes")
        self.centres = torch.randn(self.classes, self.prototypes, WIDTHS[0], generator=draws)
        sizes = zip((*WIDTHS[1:], self.classes), WIDTHS, strict=True)
        weights = [(torch.rand(rows, columns, generator=draws) * 2 - 1) * columns**-0.5 for rows, columns in sizes]  # as nn.Linear begins
        self.layers = [nn.Parameter(weight) for weight in weights]
        self.first = [float(weight.norm()) for weight in weights]
        return [(f"layers.{index}.weight", layer) for index, layer in enumerate(self.layers)]

    def batch(self, step: int, size: int) -> Mapping[str, Tensor]:
        """A step's draws."""
        draws = generator(self.seed, "samples", step)
        label_N = torch.randint(0, self.classes, (size,), generator=draws)
        which_N = torch.randint(0, self.prototypes, (size,), generator=draws)
        x_ND = self.centres[label_N, which_N] + self.noise_scale * torch.randn(size, WIDTHS[0], generator=draws)
        return {"x_ND": x_ND, "label_N": label_N}

    def losses(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The loss at the parameters."""
        del step
        x_ND = batch["x_ND"]
        for index, layer in enumerate(self.layers):
            weight = self.gain * layer / layer.norm(dim=1, keepdim=True) if self.scale_invariant else layer
            x_ND = nn.functional.linear(x_ND if index == 0 else x_ND.relu(), weight)
        return {"loss": nn.functional.cross_entropy(x_ND, batch["label_N"])}

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """See the class."""
        loss = float(self.losses(self.batch(-1, HELD_OUT), 0)["loss"])
        ratios = [float(layer.norm()) / first for layer, first in zip(self.layers, self.first, strict=True)]
        return {"loss": loss, "log_loss": math.log10(loss), "growth": sum(ratios) / len(ratios) - 1}


class Config(BaseConfig):
    """Points around prototypes, and a network of three layers."""

    method: Literal["prototypes"] = "prototypes"
    classes: int = Field(10, ge=2, description="number of classes")
    prototypes: int = Field(8, ge=1, description="prototypes a class")
    noise: float = Field(0.9, ge=0, description="standard deviation around a prototype, whose own coordinates have 1")
    scale_invariant: bool = Field(True, description="normalise the rows of every layer's weight")
    gain: float = Field(1.4, gt=0, description="length of a normalised row")
    batch_size: int = Field(64, ge=1, description="samples a step")

    def build(self) -> Prototypes:
        """The problem."""
        shape = (self.classes, self.prototypes, self.noise, self.gain, self.batch_size)
        return Prototypes(*shape, scale_invariant=self.scale_invariant)
