"""Masks that are learnt: hard-concrete variables over a transformer's width, heads and neurons, and what holds them to a sparsity.

Source: Wu et al., TinyCLIP (ICCV 2023), section 3.2, "automatic inheritance", and its code; the variables are of Louizos et al., Learning Sparse
Neural Networks through L0 Regularization (ICLR 2018). As in the code, a tower that is smaller than asked is not penalised.

Shape legend: D model width, h heads of a block, m neurons of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LOW, HIGH, TEMPERATURE, EPSILON = -0.1, 1.1, 2 / 3, 1e-6
SHARPNESS = 0.8
"""What log-alphas are multiplied with when masks are settled."""
FIRST, BOUNDS = 10.0, (math.log(1e-2), math.log(1e2))
"""Log-alphas at first, and between what they are kept after every update."""


def score(log_alpha: Tensor) -> Tensor:
    """How likely an entry is not 0, in [1e-6, 1 - 1e-6], of the shape given."""
    zero = -LOW / (HIGH - LOW)
    logit = TEMPERATURE * math.log(zero / (1 - zero)) - log_alpha
    return 1 - logit.sigmoid().clamp(EPSILON, 1 - EPSILON)


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """A mask for training, in [0, 1], with a gradient; `uniform` in (0, 1) and of the same shape."""
    logit = (uniform.log() - (-uniform).log1p() + log_alpha) / TEMPERATURE
    return (logit.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


@torch.no_grad()
def settle(log_alpha: Tensor, least: int = 0) -> Tensor:
    """The mask for use, `[size]`: in (0, 1), and 0 for the smallest, as many as are expected to be; of equal ones the earlier.

    At least `least` entries stay.
    """
    zeros = min(round(len(log_alpha) - float(score(log_alpha).sum())), len(log_alpha) - least)
    soft = (SHARPNESS * log_alpha / TEMPERATURE).sigmoid()
    return soft.index_fill(0, soft.argsort(stable=True)[:zeros], 0.0)


@dataclass(frozen=True)
class Sizes:
    """Of a tower: its width D, and of each block the heads, their width, and the neurons."""

    hidden: int
    heads: tuple[int, ...]
    head_width: int
    neurons: tuple[int, ...]

    def per_head(self, layer: int) -> int:
        """Parameters that a head has a share of, rounded down; 0 where there is none."""
        inner = self.heads[layer] * self.head_width
        return (4 * self.hidden * inner + 3 * inner + self.hidden) // self.heads[layer] if inner else 0

    @property
    def total(self) -> int:
        """Parameters of the blocks that can be pruned."""
        attention = sum(heads * self.per_head(layer) for layer, heads in enumerate(self.heads))
        return attention + sum(2 * self.hidden * neurons + self.hidden + neurons for neurons in self.neurons)


class Masks(NamedTuple):
    """Of a tower: `[D]`, and of each block `[h]` and `[m]`."""

    hidden: Tensor
    heads: Sequence[Tensor]
    neurons: Sequence[Tensor]


class TowerMasks(nn.Module):
    """The log-alphas of a tower.

    Args:
        sizes: of the tower.
        width: learn which of the D features stay; they are the same in all blocks. Otherwise all of them do.
    """

    def __init__(self, sizes: Sizes, width: bool = True) -> None:
        super().__init__()
        self.sizes, self.width = sizes, width
        self.hidden = nn.Parameter(torch.full((sizes.hidden,), FIRST), requires_grad=width)
        self.heads = nn.ParameterList(nn.Parameter(torch.full((count,), FIRST)) for count in sizes.heads)
        self.neurons = nn.ParameterList(nn.Parameter(torch.full((count,), FIRST)) for count in sizes.neurons)

    def sampled(self, uniform: Mapping[str, Sequence[Tensor]]) -> Masks:
        """Masks for one forward pass; `uniform` holds numbers in (0, 1) under `hidden`, `heads` and `neurons`, shaped like the log-alphas."""
        hidden = sample(self.hidden, uniform["hidden"][0]) if self.width else torch.ones_like(self.hidden)
        heads, neurons = ([sample(*pair) for pair in zip(getattr(self, name), uniform[name], strict=True)] for name in ("heads", "neurons"))
        return Masks(hidden, heads, neurons)

    def drawn(self, generator: torch.Generator) -> Masks:
        """`sampled`, fresh."""

        def uniform(like: Tensor) -> Tensor:
            drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype)
            return (drawn * (1 - 2 * EPSILON) + EPSILON).to(like.device)

        groups: dict[str, list[Tensor]] = {"hidden": [self.hidden], "heads": list(self.heads), "neurons": list(self.neurons)}
        return self.sampled({name: [uniform(each) for each in group] for name, group in groups.items()})

    @torch.no_grad()
    def settled(self) -> Masks:
        """The masks for use."""
        hidden = settle(self.hidden, least=1) if self.width else torch.ones_like(self.hidden)
        return Masks(hidden, [settle(each) for each in self.heads], [settle(each) for each in self.neurons])

    def expected(self) -> Tensor:
        """Parameters expected to stay: a scalar with a gradient."""
        hidden = score(self.hidden) if self.width else torch.ones_like(self.hidden)
        heads = [score(each).sum() * (self.sizes.per_head(layer) / self.sizes.hidden) for layer, each in enumerate(self.heads)]
        neurons = [2 * score(each).sum() for each in self.neurons]
        return hidden.sum() * torch.stack([*heads, *neurons]).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the log-alphas between their bounds."""
        for each in self.parameters():
            each.clamp_(*BOUNDS)


def sparsity(towers: Sequence[TowerMasks]) -> Tensor:
    """The share of the parameters of all towers together that is expected to go: a scalar with a gradient."""
    return 1 - torch.stack([tower.expected() for tower in towers]).sum() / sum(tower.sizes.total for tower in towers)


def target(step: int, start: float, end: float, warmup: int) -> float:
    """The sparsity asked for after `step` updates: linearly from `start` to `end` over `warmup` of them."""
    return start + (end - start) * (min(1.0, step / warmup) if warmup else 1.0)


class Lagrangian(nn.Module):
    """The penalty on too little sparsity, with multipliers that climb what the masks descend."""

    def __init__(self, first: float = 10.0) -> None:
        super().__init__()
        self.linear, self.square = nn.Parameter(torch.tensor(first)), nn.Parameter(torch.tensor(first))

    def forward(self, wanted: float, found: Tensor) -> Tensor:
        """The penalty, a scalar; 0 where `found` is at least `wanted`."""
        short = (wanted - found).clamp(min=0)
        return self.linear * short + self.square * short**2

    def ascend(self) -> None:
        """Turns the multipliers' gradients, so that an optimizer's descent climbs; for between the backward pass and the update."""
        for multiplier in self.parameters():
            if multiplier.grad is not None:
                multiplier.grad.neg_()


def mask_optimizer(
    towers: Sequence[TowerMasks], lagrangian: Lagrangian, lr: float = 0.02, multiplier_lr: float | None = None
) -> torch.optim.AdamW:
    """AdamW over all masks and the multipliers, without decay; `multiplier_lr` is `lr` unless it is given."""
    masks = [each for tower in towers for each in tower.parameters() if each.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": masks},
        {"params": list(lagrangian.parameters()), "lr": lr if multiplier_lr is None else multiplier_lr},
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
