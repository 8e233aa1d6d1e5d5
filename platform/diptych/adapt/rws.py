"""Robust weight signatures: what fine-tuning on a corruption changed beside fine-tuning on clean data, as a patch for any model of the backbone.

Source: Cai, Zhang, Wang, Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights? (ICML 2023), section 3.
Per tensor, flattened: d = theta_std - theta0, g = theta_c - theta0, signature = g - (<g, d> / <d, d>) d. A patch adds strength * signature.

Where the paper is silent: a tensor that clean fine-tuning left alone (d = 0) has the signature g; in a vision transformer the shallow
layers are the patch embedding and the first blocks with their norms. A classification head, the projections and the text tower belong to
no shallow layer and are never patched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diptych.adapt import codes, norms, states
from diptych.adapt.layers import RESIDUAL, block_of, in_stem, of_image_tower
from diptych.adapt.states import State
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError

Architecture = Literal["convolutions", "resnet", "transformer"]
Signature = dict[str, Tensor]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NORM = re.compile(r"(?:^|\.)(?:bn\d*|downsample)(?:\.|$)")
PATCH_EMBEDDING = re.compile(r"(?:^|\.)(?:conv1|patch_embed|ln_pre|norm_pre)\.")


class Config(BaseConfig):
    """Patches the workflow's model with the signatures of one or more corruptions."""

    directories: ClassVar[tuple[str, ...]] = ("pretrained", "standard", "robust")

    method: Literal["rws"] = "rws"
    pretrained: str = Field(min_length=1, description="directory of the model that all others were fine-tuned from")
    standard: str | None = Field(None, description="directory of the model fine-tuned on clean data; the workflow's own model by default")
    robust: tuple[str, ...] = Field(min_length=1, description="directories of the models fine-tuned on corrupted data, one a corruption")
    keep: int = Field(2, ge=1, description="shallow layers to patch: transformer or residual blocks beside the stem, or convolutions")
    architecture: Literal["auto", "convolutions", "resnet", "transformer"] = Field("auto", description="how layers are counted")
    strength: tuple[float, ...] = Field((1.0,), min_length=1, description="factor of the signatures: one for all, or one each")
    official_square: bool = Field(False, description="square the strengths, as the published code does by applying them twice")
    quantise: Literal["none", "linear", "tanh", "log"] = Field("none", description="grid on which the signatures are stored")
    levels: int = Field(16, ge=2, le=65536, description="points of that grid (levels, not bits)")
    statistics: float = Field(
        0.0, ge=0, le=1, description="batch norms only: share of running statistics recomputed over the calibration pictures"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if len(self.strength) not in (1, len(self.robust)):
            raise ValueError("one strength for all robust models, or one for each")
        if self.official_square and min(self.strength) < 0:
            raise ValueError("a squared strength has no sign: strengths >= 0, or official_square: false")
        if self.quantise == "log" and self.levels < 6:
            raise ValueError("log spends half of the levels on each sign: levels >= 6")
        return self

    def build(self) -> Patching:
        """The compressor."""
        return Patching(self)


# ---------------------------------------------------------------- shallow layers


def select(state: State, keep: int, architecture: Architecture | Literal["auto"] = "auto") -> tuple[str, ...]:
    """The names of the shallow layers' weights, in the order of the state.

    Args:
        state: of a dual encoder, whose image tower alone is looked at, or of an image network.
        keep: layers, >= 1. `convolutions` counts 4-D weights with their biases; `resnet` counts the stem as one and then each residual
            block with its norms and down-sampling; `transformer` counts blocks and adds the patch embedding with its norm.
        architecture: `auto` looks at the names.

    Raises ConfigError if there are fewer layers than that. Running statistics are not selected: see `average_norms`.
    """
    tower = [name for name, tensor in state.items() if tensor.is_floating_point() and not name.endswith(STATISTICS)]
    if any(map(of_image_tower, tower)):
        tower = list(filter(of_image_tower, tower))
    kind = _architecture(tower) if architecture == "auto" else architecture
    layers = _convolutions(tower, state) if kind == "convolutions" else _blocks(tower, kind)
    least = keep + (kind == "transformer")
    if len(layers) < least:
        have = len(layers) - (kind == "transformer")
        raise ConfigError.at("The model has fewer layers", "keep", keep, f"at most {have} {kind}", "look at `architecture`")
    return tuple(name for layer in layers[:least] for name in layer)


def _architecture(names: Sequence[str]) -> Architecture:
    if any(map(RESIDUAL.search, names)):
        return "resnet"
    return "transformer" if any(map(block_of, names)) else "convolutions"


def _convolutions(names: Sequence[str], state: State) -> list[list[str]]:
    weights = [name for name in names if state[name].ndim == 4 and name.endswith("weight")]
    known = set(names)
    return [[name, *({name.removesuffix("weight") + "bias"} & known)] for name in weights]


def _blocks(names: Sequence[str], kind: Architecture) -> list[list[str]]:
    """The stem first (the patch embedding alone, of a transformer), then the blocks."""
    stem = [name for name in names if (PATCH_EMBEDDING.search(name) if kind == "transformer" else in_stem(name)) and block_of(name) is None]
    blocks: dict[str, list[str]] = {}
    for name in names:
        if block := block_of(name):
            blocks.setdefault(block, []).append(name)
    return [stem, *blocks.values()]


# ---------------------------------------------------------------- signatures


def project(change: Tensor, clean: Tensor) -> Tensor:
    """The part of `change` that is orthogonal to `clean`, both of any one shape; `change` itself where `clean` is zero."""
    length = (clean * clean).sum()
    return change if length == 0 else change - (change * clean).sum() / length * clean


def extract(pretrained: State, standard: State, robust: State, names: Iterable[str]) -> Signature:
    """The signature of a corruption, float64, tensor by tensor.

    Args:
        pretrained: theta0.
        standard, robust: fine-tuned from it on clean and on corrupted data.
        names: what to patch, from `select`.

    Raises DataError where a state lacks a name or has it in another shape.
    """
    chosen = list(names)
    states.require_alike(pretrained, standard, "standard", chosen)
    states.require_alike(pretrained, robust, "robust", chosen)
    origin = {name: pretrained[name].detach().double() for name in chosen}
    return {
        name: project(robust[name].detach().double() - start, standard[name].detach().double() - start) for name, start in origin.items()
    }


def apply(
    destination: State, signatures: Sequence[State], strengths: Sequence[float] | None = None, official_square: bool = False
) -> dict[str, Tensor]:
    """The destination with `sum strength * signature` added, rounded once to its dtypes; other tensors are handed through.

    Args:
        destination: the weights to patch, not changed.
        signatures: one a corruption.
        strengths: a factor each, by default 1.
        official_square: multiply by the square, as the published code does.

    Raises DataError where a signature's name or shape is not in the destination, ConfigError for another number of strengths.
    """
    return _shifted(destination, signatures, _factors(signatures, strengths, official_square))


def remove(
    patched: State, signatures: Sequence[State], strengths: Sequence[float] | None = None, official_square: bool = False
) -> dict[str, Tensor]:
    """Takes a patch off again: the inverse of `apply` with the same arguments, up to the rounding of the weights' dtype."""
    return _shifted(patched, signatures, [-factor for factor in _factors(signatures, strengths, official_square)])


def _factors(signatures: Sequence[State], strengths: Sequence[float] | None, official_square: bool) -> list[float]:
    factors = [1.0] * len(signatures) if strengths is None else [float(strength) for strength in strengths]
    if len(factors) != len(signatures):
        raise ConfigError.at("Strengths and signatures do not match", "strength", factors, f"{len(signatures)} numbers")
    return [factor**2 if official_square else factor for factor in factors]


def _shifted(state: State, signatures: Sequence[State], factors: Sequence[float]) -> dict[str, Tensor]:
    wide: dict[str, Tensor] = {}
    for signature, factor in zip(signatures, factors, strict=True):
        states.require_alike(signature, state, "the model to patch", signature)
        for name, delta in signature.items():
            wide[name] = wide.get(name, state[name].detach().double()) + factor * delta
    return {**state, **{name: tensor.to(state[name].dtype) for name, tensor in wide.items()}}


def average_norms(destination: State, robust: Sequence[State]) -> dict[str, Tensor]:
    """The destination with every batch norm and down-sampling tensor replaced by its mean over the robust models, at any depth.

    `num_batches_tracked` stays. Unlike a signature this cannot be subtracted: keep the destination to take it back. Source: the published
    code's rule for residual networks. Raises DataError where a robust model lacks such a tensor or has it in another shape.
    """
    names = [name for name, tensor in destination.items() if NORM.search(name) and tensor.is_floating_point()]
    for number, state in enumerate(robust):
        states.require_alike(destination, state, f"robust.{number}", names)
    mean = {name: torch.stack([state[name].detach().double() for state in robust]).mean(dim=0) for name in names}
    return {**destination, **{name: tensor.to(destination[name].dtype) for name, tensor in mean.items()}}


# ---------------------------------------------------------------- the compressor


class Patching:
    """The compressor. After `compress`, `report` says what was patched and how small the signatures are."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._figures: dict[str, Any] = {}

    def compress(self, model: nn.Module, calibration: Iterable[Mapping[str, Tensor]]) -> nn.Module:
        """Patches the model in place; gives it back. Pruned weights stay zero. Raises DataError for another architecture."""
        config, destination = self.config, states.of_module(model)
        pretrained = states.of_directory(config.pretrained, model)
        standard = destination if config.standard is None else states.of_directory(config.standard, model)
        robust = [states.of_directory(directory, model) for directory in config.robust]
        names = select(destination, config.keep, config.architecture)
        signatures = self._stored([extract(pretrained, standard, state, names) for state in robust])
        strengths = config.strength * (len(robust) if len(config.strength) == 1 else 1)
        patched = apply(destination, signatures, strengths, config.official_square)
        states.install(model, average_norms(patched, robust) if norms.tracked(model) else patched)
        pictures = (batch["image_NCHW"] for batch in calibration)
        norms.recompute(model, pictures, getattr(model, "encode_image", None), config.statistics)
        self._figures |= {"tensors": list(names), "weights_bytes": sum(tensor.nbytes for tensor in destination.values())}
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """`tensors`: what was patched; `signature_bytes` of all signatures together, beside `weights_bytes` of one whole model."""
        del model
        return dict(self._figures)

    def _stored(self, signatures: list[Signature]) -> list[Signature]:
        if self.config.quantise == "none":
            self._figures = {"signature_bytes": sum(4 * delta.numel() for signature in signatures for delta in signature.values())}
            return signatures
        coded = codes.quantise(signatures, self.config.levels, self.config.quantise)
        self._figures = {"signature_bytes": sum(signature.size_bytes for signature in coded)}
        return [signature.decode() for signature in coded]
