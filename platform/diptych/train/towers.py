"""What the settings change about the towers themselves: patch dropout, activation checkpoints, compilation, learning rates by depth."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diptych.core.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder
    from diptych.train.config import TrainConfig

BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
STAGE = re.compile(r"layer(\d)\.")
FIRST = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding", "cls_emb")
LAST = ("ln_post", "ln_final", "proj", "text_projection", "attn_pool", "attnpool")


def prepare(model: DualEncoder, config: TrainConfig) -> None:
    """Sets up patch dropout and activation checkpoints. Raises ConfigError for towers that have no such thing."""
    from open_clip.transformer import PatchDropout, VisionTransformer

    visual = model.clip.visual
    if config.patch_dropout:
        if not isinstance(visual, VisionTransformer):
            raise _unable("patch_dropout", config.patch_dropout, visual, "an image tower that is a vision transformer")
        visual.patch_dropout = PatchDropout(config.patch_dropout)
    if config.checkpoint_activations:
        for tower in (visual, getattr(model.clip, "text", model.clip)):
            if not hasattr(getattr(tower, "transformer", None), "grad_checkpointing"):
                raise _unable("checkpoint_activations", True, tower, "towers that are open_clip's transformers")
        model.clip.set_grad_checkpointing(True)
    for each in config.image_sizes:
        model.check_image_size(each.size)


def compiled(model: DualEncoder, device: str) -> None:
    """Compiles both towers in place: names, weights and whoever holds the model stay as they are. The first steps take longer.

    Raises ResourceError where the processor's code cannot be built.
    """
    compiler = os.environ.get("CXX", "g++")
    if not device.startswith("cuda") and shutil.which(compiler) is None:
        raise ResourceError.at(
            "There is no C++ compiler", "train.compile", compiler, "one that torch.compile can use", "set compile: false"
        )
    text = getattr(model.clip, "text", model.clip)
    model.clip.visual.compile()
    getattr(text, "transformer", text).compile()


def refuse_second_derivatives(config: TrainConfig, optimizer: Any) -> None:
    """Compiled towers have one derivative. Raises ConfigError for an optimizer that needs two."""
    if config.compile and getattr(optimizer, "curvature", "none") == "hutchinson":
        raise ConfigError.at(
            "Compiled towers cannot be differentiated twice", "compile", True, "false with an optimizer that uses Hutchinson probes",
            "set compile: false, or choose an optimizer such as adamw",
        )  # fmt: skip


def layer_scales(model: DualEncoder, decay: float) -> Mapping[str, float]:
    """The factor of the learning rate of each parameter, by its name in the model: `decay` to the power of its distance from the top.

    The projection and what is on no tower learn at the full rate, the last block at `decay` times it, embeddings slowest. (Clark et al.
    2020, "ELECTRA", and Bao et al. 2022, "BEiT", use it for fine-tuning.) Raises ConfigError for towers whose layers are not known.
    """
    depths = {name: _depth(name.removeprefix("clip.")) for name, _ in model.named_parameters()}
    known = [(part, depth) for part, depth in depths.values() if depth is not None]
    top = {part: 1 + max(depth for other, depth in known if other == part) for part, _ in known}
    return {name: 1.0 if depth is None else decay ** (top[part] - depth) for name, (part, depth) in depths.items()}


def _depth(name: str) -> tuple[str, int | None]:
    """The tower of a parameter, and its layer: 0 for the embeddings, blocks from 1 on, None for what follows them or is on no tower."""
    from diptych.models.clip import part_of

    part = part_of(name)
    own = name.removeprefix("visual.").removeprefix("text.")
    if block := BLOCK.match(own):
        return part, int(block[1]) + 1
    if stage := STAGE.match(own):
        return part, int(stage[1])
    if own.startswith(FIRST) or re.match(r"(conv|bn)\d\.", own):
        return part, 0
    if part == "logit" or own.startswith(LAST):
        return part, None
    raise ConfigError.at("The layers of this tower are not known", "layer_decay", name, "open_clip's transformers or its ResNets")


def _unable(field: str, value: object, tower: object, expected: str) -> ConfigError:
    error = ConfigError.at("The model has no towers for this", field, value, f"{expected}, not a {type(tower).__name__}")
    assert isinstance(error, ConfigError)
    return error
