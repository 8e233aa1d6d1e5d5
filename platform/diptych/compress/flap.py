"""FLAP: whole attention heads and MLP neurons go where their input fluctuates least, and a bias makes up for its mean. Nothing is retrained.

Source: An, Zhao, Yu, Tang, Wang, Fluctuation-based Adaptive Structured Pruning for Large Language Models (AAAI 2024), sections 3.2 to 3.4.
Statistics are of the inputs of the attention's output projection and of the MLP's second layer, on the dense model, a sample at a time;
the pieces are in `compress/fluctuation.py`.

For a dual encoder, where the source is silent: an MLP of two matrices makes a head of W features cost 2 W neurons; the biases of q, k, v and of
the MLP's first layer go with their rows; the new bias is added to the one that is there; padded text positions are left out; each tower
is pruned to the ratio on its own unless `jointly`. A block may lose all its heads or neurons: its bias then stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diptych.compress.blocks import Batch, Inputs, Tower, collect, evaluating, towers, walk
from diptych.compress.calibration import Calibrated, required
from diptych.compress.fluctuation import (
    Kept,
    Metric,
    Moments,
    adaptive,
    compensation,
    feature_scores,
    pooled,
    standardised,
    thresholded,
    uniform,
)
from diptych.compress.footprint import Footprint, measure
from diptych.compress.masks import put_on
from diptych.core.errors import ConfigError
from diptych.models import structure
from diptych.models.structure import Parts, parts

Structure = Literal["al-am", "al-mm", "ul-mm", "ul-um"]
MLP_MATRICES = 2


class Config(Calibrated):
    """FLAP."""

    method: Literal["flap"] = "flap"
    ratio: float = Field(0.2, gt=0, lt=1, description="share of the blocks' weights that goes")
    metric: Metric = Field("wifv", description="fluctuation (ifv), times the squared weights (wifv), or Wanda's score, pooled (wifn)")
    structure: Structure = Field(
        "al-am",
        description="`al-am` ranks heads and neurons of all layers together; `al-mm` each kind; `ul-*` take equal shares of all layers",
    )
    remove_heads: int | None = Field(None, ge=0, description="al-mm and ul-mm: heads to remove a tower; by default the ratio's share")
    jointly: bool = Field(False, description="al-am: rank the units of both towers together, by their parameters, rather than each tower's")
    compensate: bool = Field(True, description="add the bias that restores the mean of what was removed")
    square_heads: bool = Field(
        True, description="square the scores of attention features, as the published code does and the paper does not"
    )
    form: Literal["cut", "masked"] = Field(
        "cut", description="`cut` makes the model smaller; `masked` keeps its shape, with zeros and masks, and opens in open_clip"
    )
    calibration_pairs: int = Field(1024, ge=2, description="training pairs it looks at, the first by key hash")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.remove_heads is not None and self.structure not in ("al-mm", "ul-mm"):
            raise ValueError("remove_heads is of the structures al-mm and ul-mm")
        if self.jointly and self.structure != "al-am":
            raise ValueError("jointly is of the structure al-am")
        return self

    def build(self) -> FLAP:
        """The compressor."""
        return FLAP(self)


@dataclass
class Layer:
    """A block with the moments of what is removed from it. `width` is the model's, in features."""

    name: str
    block: nn.Module
    parts: Parts
    attention: Moments
    mlp: Moments

    @property
    def width(self) -> int:
        """Outputs of the block."""
        return self.parts.out.out_features


class FLAP:
    """The compressor. After `compress`, `report` says what is left, and what that does to size, arithmetic and time."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._figures: dict[str, Any] = {}

    @torch.no_grad()
    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Removes heads and neurons and adds the biases, in place; gives the model back.

        Raises ConfigError for blocks of an unknown kind or more heads to remove than there are; DataError without calibration pairs.
        """
        batches = required(calibration, "flap")
        with evaluating(model):
            before = measure(model, batches[0])
            by_tower = [(tower, self._layers(model, tower, batches)) for tower in towers(model, self.config.towers)]
            layers = [layer for _, found in by_tower for layer in found]
            kept = self._select(layers) if self.config.jointly else [one for _, found in by_tower for one in self._select(found)]
            for layer, one in zip(layers, kept, strict=True):
                if self.config.compensate:
                    _compensate(layer, one)
            self._remove(model, layers, kept)
            self._note(by_tower, kept, before, measure(model, batches[0]), model)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """`kept` heads and neurons by block, `kept_share` of the blocks' weights by tower; `before` and `after`: see `Footprint`; `open_clip`."""
        del model
        return dict(self._figures)

    def _layers(self, model: nn.Module, tower: Tower, batches: Sequence[Batch]) -> list[Layer]:
        layers = []
        for name, block, states in walk(model, tower, batches):
            found = parts(block, name)
            layer = Layer(name, block, found, Moments(found.heads * found.head_width), Moments(found.neurons))
            _gather(layer, states)
            layers.append(layer)
        return layers

    def _select(self, layers: Sequence[Layer]) -> list[Kept]:
        config = self.config
        scores = [self._scores(layer) for layer in layers]
        widths = [layer.parts.head_width for layer in layers]
        if config.structure == "al-am":
            heads = [pooled(standardised(attention), width, "mean") for (attention, _), width in zip(scores, widths, strict=True)]
            neurons = [standardised(mlp) for _, mlp in scores]
            costs = [(4 * layer.parts.head_width * layer.width, MLP_MATRICES * layer.width) for layer in layers]
            return adaptive(heads, neurons, costs, config.ratio)
        counts = [layer.parts.heads for layer in layers]
        removed = round(config.ratio * sum(counts)) if config.remove_heads is None else config.remove_heads
        if removed > sum(counts):
            raise ConfigError.at("There are not so many heads", "remove_heads", removed, f"at most {sum(counts)}")
        if config.structure == "al-mm":
            return thresholded(scores, widths, removed, config.ratio, MLP_MATRICES, layers[0].width)
        share = removed if config.structure == "ul-mm" else None
        return uniform(scores, widths, share, config.ratio, MLP_MATRICES, layers[0].width)

    def _scores(self, layer: Layer) -> tuple[Tensor, Tensor]:
        attention = feature_scores(self.config.metric, layer.parts.out.weight, layer.attention)
        mlp = feature_scores(self.config.metric, layer.parts.outer.weight, layer.mlp)
        return attention.square() if self.config.square_heads else attention, mlp

    def _remove(self, model: Any, layers: Sequence[Layer], kept: Sequence[Kept]) -> None:
        if self.config.form == "masked":
            for layer, one in zip(layers, kept, strict=True):
                mask(layer.parts, one)
            return
        outer = "clip." if hasattr(model, "clip") else ""
        structure.cut_encoder(
            model, {layer.name.removeprefix(outer): (one.heads, one.neurons) for layer, one in zip(layers, kept, strict=True)}
        )

    def _note(
        self, by_tower: Sequence[tuple[Tower, Sequence[Layer]]], kept: Sequence[Kept], before: Footprint, after: Footprint, model: Any
    ) -> None:
        one, shares, counts = iter(kept), {}, {}
        for tower, layers in by_tower:
            left = total = 0
            for layer in layers:
                chosen = next(one)
                left += (4 * layer.parts.head_width * int(chosen.heads.sum()) + MLP_MATRICES * int(chosen.neurons.sum())) * layer.width
                total += (4 * layer.parts.head_width * len(chosen.heads) + MLP_MATRICES * len(chosen.neurons)) * layer.width
                counts[layer.name] = {"heads": int(chosen.heads.sum()), "neurons": int(chosen.neurons.sum())}
            shares[tower.kind] = left / max(1, total)
        opens = "yes" if self.config.form == "masked" else structure.open_clip_says(model)
        self._figures = {
            "kept": counts,
            "kept_share": shares,
            "before": before.plain(),
            "after": after.plain(),
            "open_clip": opens,
        }


def _gather(layer: Layer, states: Sequence[Inputs]) -> None:
    wanted = {}
    for name, module in layer.block.named_modules():
        if module is layer.parts.out:
            wanted[f"{layer.name}.{name}.weight"] = layer.attention
        elif module is layer.parts.outer:
            wanted[f"{layer.name}.{name}.weight"] = layer.mlp

    def add(name: str, inputs: Inputs, x_NLI: Tensor) -> None:
        if name in wanted:
            wanted[name].add(x_NLI, inputs.valid_NL)

    collect(layer.block, layer.name, states, add)


def _compensate(layer: Layer, kept: Kept) -> None:
    """Adds to the output biases what the removed features contribute on average; a layer without a bias gets one."""
    removed = ~kept.heads.repeat_interleave(layer.parts.head_width)
    for linear, moments, gone in ((layer.parts.out, layer.attention, removed), (layer.parts.outer, layer.mlp, ~kept.neurons)):
        bias = compensation(linear.weight, moments.mean, gone)
        has_bias = getattr(linear, "bias", None) is not None
        if has_bias:
            linear.bias.add_(bias)
        else:
            linear.bias = nn.Parameter(bias)


def mask(found: Parts, kept: Kept) -> None:
    """Zeroes what is not kept, with its biases, and keeps the masks with the model."""
    features = kept.heads.repeat_interleave(found.head_width)
    module, weight, bias = found.qkv
    stacked = features.repeat(3)
    for owner, leaf, rows in ((module, weight, stacked), (found.inner, "weight", kept.neurons)):
        put_on(owner, leaf, rows[:, None].expand_as(getattr(owner, leaf)).clone())
    for owner, leaf, rows in ((module, bias, stacked), (found.inner, "bias", kept.neurons)):
        if getattr(owner, leaf) is not None:
            put_on(owner, leaf, rows.clone())
    for linear, columns in ((found.out, features), (found.outer, kept.neurons)):
        put_on(linear, "weight", columns[None, :].expand_as(linear.weight).clone())
