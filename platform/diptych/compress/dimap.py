"""DIMAP: weights are ranked by what they are of their own layer, and one threshold a kind of layer runs through the whole depth. No data.

Source: He, Zhou, Data-independent Module-Aware Pruning for Hierarchical Vision Transformers (ICLR 2024), section 3. The score is LAMP's.
Where the source is silent: all modules lose the same share; packed q, k, v are one layer; biases, embeddings, norms, down-sampling
matrices and the projections into the shared space stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.compress import lamp
from diptych.compress.magnitude import prunable, sparsity, tower_of
from diptych.compress.masks import put_on
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError

Module = Literal["qkv", "prj", "mlp", "aux"]

NAMES: Mapping[Module, re.Pattern[str]] = {
    "qkv": re.compile(r"(^|\.)(attn\.(in_proj_weight|(qkv|q|k|v|[qkv]_proj|kv)\.weight)|attention\.self\.(query|key|value)\.weight)$"),
    "prj": re.compile(r"(^|\.)(attn\.(out_proj|proj)\.weight|attention\.output\.dense\.weight)$"),
    "mlp": re.compile(
        r"(^|\.)(mlp\.(fc1|fc2|fc1_g|fc1_x|w12|w3|c_fc|c_proj)\.weight|intermediate\.dense\.weight|\d+\.output\.dense\.weight)$"
    ),
}
"""Ends of the names of weights: open_clip's own towers, timm's, and text encoders of the BERT family."""


class Config(BaseConfig):
    """DIMAP."""

    method: Literal["dimap"] = "dimap"
    ratio: float = Field(0.5, ge=0, lt=1, description="share of each module's weights that becomes zero")
    module: Literal["kind", "model", "layer"] = Field(
        "kind",
        description="one threshold for q, k, v, one for attention's output, one for the MLP; or one for all of them; or one a matrix,"
        " which is uniform magnitude pruning of the same matrices",
    )
    towers: Literal["both", "image", "text"] = Field("both", description="which towers are pruned")
    jointly: bool = Field(False, description="a module runs through both towers; false: each tower has its own")

    def build(self) -> DIMAP:
        """The compressor."""
        return DIMAP(self)


class DIMAP:
    """The compressor. It looks at no data, so calibration batches are not read."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @torch.no_grad()
    def compress(self, model: nn.Module, calibration: Iterable[Mapping[str, Tensor]]) -> nn.Module:
        """Zeroes weights in place, keeps the masks with the model and gives it back. Raises ConfigError if nothing belongs to a module."""
        del calibration
        weights = {name: weight for name, weight in prunable(model, self.config.towers) if module_of(name) != "aux"}
        if not weights:
            expected = "a transformer: attention and MLP matrices by their usual names"
            raise ConfigError.at("No weights belong to a module", "towers", self.config.towers, expected, "choose magnitude")
        for names in self._groups(weights).values():
            group = {name: weights[name] for name in names}
            for name, mask in masks(group, self.config.ratio).items():
                owner, _, leaf = name.rpartition(".")
                put_on(model.get_submodule(owner), leaf, mask)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """The share of zeros in each matrix, in all of them, and in each module (`modules`)."""
        weights = dict(prunable(model, self.config.towers))
        found: dict[str, list[Tensor]] = {}
        for name, weight in weights.items():
            found.setdefault(module_of(name), []).append((weight == 0).flatten())
        modules = {module: float(torch.cat(zeros).float().mean()) for module, zeros in found.items()}
        return {**sparsity(model, self.config.towers), "modules": modules}

    def _groups(self, weights: Mapping[str, Tensor]) -> dict[tuple[str, str], list[str]]:
        """The names of the weights that share a threshold."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name in weights:
            tower = "both" if self.config.jointly else tower_of(name)
            module = {"kind": module_of(name), "model": "all", "layer": name}[self.config.module]
            groups.setdefault((tower, module), []).append(name)
        return groups


def module_of(name: str) -> Module:
    """The module of a parameter by its name; `aux`, never pruned, for all that is neither attention's nor the MLP's matrix."""
    return next((module for module, pattern in NAMES.items() if pattern.search(name)), "aux")


def masks(weights: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Masks, True stays, of the weights that share a threshold: the `round(ratio * n)` smallest scores go, and all that equal the largest of them."""

    def score(name: str) -> Tensor:
        return lamp.scores(weights[name])  # made anew: the scores of all layers are twice the model

    limit = lamp.threshold_of(score, list(weights), round(ratio * sum(weight.numel() for weight in weights.values())))
    return {name: score(name) > limit for name in weights}
