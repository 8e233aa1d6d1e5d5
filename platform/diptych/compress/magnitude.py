"""Magnitude pruning: the smallest weights become zero. The baseline that every other compressor is measured against.

Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks (NeurIPS 2015), section 3.
What is pruned: every weight matrix of the towers that multiplies activations, the packed q, k, v of fused attention and its output
projection included, and the projections into the shared space. Not: embeddings, positions, norms, biases, the logit scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from diptych.compress.blocks import towers
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.models.store import MASK

NOT_LINEAR = ("token_embedding", "positional_embedding", "class_embedding", "pos_embed", "cls_token", "cls_emb")
PATTERN = re.compile(r"^(\d+):(\d+)$")


class Config(BaseConfig):
    """Magnitude pruning."""

    method: Literal["magnitude"] = "magnitude"
    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero; with an n:m pattern it is 1 - n/m")
    scope: Literal["layer", "global"] = Field("layer", description="compare weights within each matrix, or over all of them")
    towers: Literal["both", "image", "text"] = Field("both", description="which towers are pruned")
    layers: Literal["all", "blocks"] = Field("all", description="`blocks`: only what is inside the transformer blocks, as other pruners do")
    pattern: str = Field("unstructured", description="`unstructured`, or n:m such as 2:4: n of every m weights along a row stay")

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        found = PATTERN.match(pattern)
        if pattern != "unstructured" and not (found and 0 < int(found[1]) < int(found[2])):
            raise ValueError("`unstructured`, or n:m with 0 < n < m, e.g. 2:4")
        return pattern

    def build(self) -> Magnitude:
        """The compressor."""
        return Magnitude(self)


class Magnitude:
    """The compressor. It looks at no data, so calibration batches are not read."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @torch.no_grad()
    def compress(self, model: nn.Module, calibration: Iterable[Mapping[str, Tensor]]) -> nn.Module:
        """Zeroes weights in place and keeps each mask as the buffer `<parameter>_mask` (bool, True stays); gives the model back.

        Raises ConfigError where a row does not divide into the pattern's groups, or a tower has none of the blocks that were asked for.
        """
        del calibration
        weights = dict(prunable(model, self.config.towers))
        if self.config.layers == "blocks":
            weights = {matrix.name: matrix.weight for tower in towers(model, self.config.towers) for matrix in tower.matrices()}
        for name, mask in self._masks(weights).items():
            weights[name].mul_(mask)
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf + MASK, mask)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """The share of zeros in each pruned matrix and in all of them."""
        return sparsity(model, self.config.towers)

    def _masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = PATTERN.match(self.config.pattern)
        if found:
            return {name: n_of_m(weight, int(found[1]), int(found[2]), name) for name, weight in weights.items()}
        if self.config.scope == "layer":
            return {name: largest(weight.abs(), self.config.sparsity) for name, weight in weights.items()}
        flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
        kept = largest(flat, self.config.sparsity)
        sizes = [weight.numel() for weight in weights.values()]
        parts = torch.split_with_sizes(kept, sizes)
        return {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}


def largest(magnitude: Tensor, sparsity: float) -> Tensor:
    """A mask, True for all but the `round(sparsity * n)` smallest; of equal ones the earlier go first, so that the count is exact."""
    mask = torch.ones(magnitude.numel(), dtype=torch.bool, device=magnitude.device)
    mask[torch.argsort(magnitude.flatten(), stable=True)[: round(sparsity * magnitude.numel())]] = False
    return mask.view_as(magnitude)


def n_of_m(weight: Tensor, n: int, m: int, name: str = "weight") -> Tensor:
    """A mask that keeps the n largest of every m weights along the last flattened dimension `[out, in…]`. Raises ConfigError if m does not divide it."""
    rows = weight.flatten(1)
    if rows.shape[1] % m:
        raise ConfigError.at("A matrix does not divide into the pattern", name, list(weight.shape), f"rows of a multiple of {m} weights")
    groups = rows.abs().view(rows.shape[0], -1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], value=True).view_as(weight)


def tower_of(name: str) -> Literal["image", "text"]:
    """The tower of a module or parameter of a dual encoder, by its dotted name."""
    return "image" if ".visual." in f".{name}" else "text"


def prunable(model: nn.Module, towers: Literal["both", "image", "text"] = "both") -> Iterator[tuple[str, nn.Parameter]]:
    """The weight matrices of a dual encoder by name: linears, convolutions, packed attention, projections."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not any(part in name for part in NOT_LINEAR) and towers in ("both", tower_of(name)):
            yield name, parameter


def sparsity(model: nn.Module, towers: Literal["both", "image", "text"] = "both") -> dict[str, Any]:
    """`overall` and, by parameter name, `matrices`: the share of exact zeros, in [0, 1]; and `weights`, how many there are."""
    weights = dict(prunable(model, towers))
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return {
        "overall": sum(zeros.values()) / max(1, total),
        "weights": total,
        "matrices": {name: zeros[name] / weight.numel() for name, weight in weights.items()},
    }


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a compressor left, by the name of their parameter."""
    parameters = {name for name, _ in model.named_parameters()}  # a text tower's causal `attn_mask` is no mask of a parameter
    found = {name.removesuffix(MASK): buffer for name, buffer in model.named_buffers() if name.endswith(MASK)}
    return {name: mask for name, mask in found.items() if name in parameters}


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Zeroes what the masks say, e.g. after an update that did not know of them."""
    parameters = dict(model.named_parameters())
    for name, mask in masks_of(model).items():
        parameters[name].mul_(mask)
