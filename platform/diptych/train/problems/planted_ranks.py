"""Linear maps that have to change by matrices of known ranks: a budget of ranks must find the maps that need it.

L parallel maps W_l of a start, targets W_l + D_l with rank(D_l) as planted, Gaussian inputs; the loss is the mean squared error over all maps. With
`lora`, the maps are frozen and have a plain low-rank adapter each (Hu et al., "LoRA", ICLR 2022), which any optimizer trains; without, the
optimizer sees the maps themselves.
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

HELD_OUT = 2048


class PlantedRanks(Problem):
    """See the module. Figures: `error`, of new inputs; `ranks`, the change's rank in all; `ranks_planted`, that of maps where something was planted."""

    def __init__(self, side: int, ranks: Sequence[int], inputs: int, batch_size: int, lora: int | None, lora_alpha: float) -> None:
        self.side, self.ranks, self.inputs, self.batch_size, self.lora, self.lora_alpha = side, ranks, inputs, batch_size, lora, lora_alpha

    def start(self, seed: int) -> Sequence[Named]:
        """Draws the problem of a seed."""
        self.seed = seed
        draws = generator(seed, "maps")
        shape = (len(self.ranks), self.side, self.side)
        start_LMM = torch.randn(shape, generator=draws, dtype=torch.float64) / math.sqrt(self.side)
        planted = [
            torch.randn(self.side, rank, generator=draws, dtype=torch.float64)
            @ torch.randn(rank, self.side, generator=draws, dtype=torch.float64)
            / math.sqrt(self.side)
            for rank in self.ranks
        ]
        self.start_LMM, self.target_LMM = start_LMM, start_LMM + torch.stack(planted)
        self.x_NM = torch.randn(self.inputs, self.side, generator=draws, dtype=torch.float64)
        self.maps = [nn.Parameter(each.clone()) for each in start_LMM]
        if self.lora is None:
            return [(f"maps.{index}.weight", each) for index, each in enumerate(self.maps)]
        bound = 1 / math.sqrt(self.side)
        self.A = [
            nn.Parameter(torch.empty(self.lora, self.side, dtype=torch.float64).uniform_(-bound, bound, generator=draws))
            for _ in self.ranks
        ]
        self.B = [nn.Parameter(torch.zeros(self.side, self.lora, dtype=torch.float64)) for _ in self.ranks]
        return [(f"maps.{index}.{name}", each) for name in "AB" for index, each in enumerate(getattr(self, name))]

    def batch(self, step: int, size: int) -> Mapping[str, Tensor]:
        """A step's draws."""
        rows = torch.randint(0, self.inputs, (size,), generator=generator(self.seed, "batch", step))
        return {"x_NM": self.x_NM[rows]}

    def losses(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The loss at the parameters."""
        del step
        return {"loss": (batch["x_NM"] @ (self._weights() - self.target_LMM).mT).square().mean()}

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """See the class."""
        x_NM = torch.randn(HELD_OUT, self.side, generator=generator(self.seed, "held out"), dtype=torch.float64)
        found = torch.linalg.matrix_rank(self._weights() - self.start_LMM, atol=1e-6).tolist()
        planted = sum(rank for rank, own in zip(found, self.ranks, strict=True) if own)
        return {"error": float(self.losses({"x_NM": x_NM}, 0)["loss"]), "ranks": float(sum(found)), "ranks_planted": float(planted)}

    def _weights(self) -> Tensor:
        if self.lora is None:
            return torch.stack(tuple(self.maps))
        return self.start_LMM + self.lora_alpha / self.lora * (torch.stack(tuple(self.B)) @ torch.stack(tuple(self.A)))


class Config(BaseConfig):
    """Maps with planted changes of low rank."""

    method: Literal["planted-ranks"] = "planted-ranks"
    side: int = Field(24, ge=2, description="inputs and outputs of a map")
    ranks: tuple[int, ...] = Field((8, 0, 0, 0, 4, 0, 4, 0), min_length=1, description="rank that each map has to change by")
    inputs: int = Field(4096, ge=1, description="inputs in all")
    batch_size: int = Field(64, ge=1, description="inputs a step")
    lora: int | None = Field(None, ge=1, description="rank of a plain adapter at each frozen map; null: the maps are what is trained")
    lora_alpha: float = Field(16.0, gt=0, description="adapters count lora_alpha / lora")

    def build(self) -> PlantedRanks:
        """The problem."""
        return PlantedRanks(self.side, self.ranks, self.inputs, self.batch_size, self.lora, self.lora_alpha)
