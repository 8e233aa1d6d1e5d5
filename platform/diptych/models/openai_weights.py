"""CLIP models in OpenAI's original parameter names: the sizes are read off the shapes, the activation is quick-GELU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import DataError

if TYPE_CHECKING:
    import torch

    from diptych.models.clip import DualEncoder

Weights = Mapping[str, "NDArray[np.generic] | torch.Tensor"]

HEAD_WIDTH = 64
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Entries of the published archives that are sizes and not weights."""


def build_openai(state: Weights, dtype: torch.dtype, text_heads: int | None = None, vision_heads: int | None = None) -> DualEncoder:
    """The dual encoder that a state in OpenAI's names describes, with these weights, in evaluation mode.

    Args:
        state: parameter name -> array of any float type.
        dtype: of the model's parameters.
        text_heads, vision_heads: attention heads; by default one for every 64 of the width, as in all published models. The shapes
            do not tell.

    Raises DataError if the state is no CLIP of OpenAI's layout.
    """
    import torch

    from diptych.models import clip

    tensors = {name: torch.as_tensor(value).to(dtype) for name, value in state.items() if name not in NO_WEIGHTS}
    try:
        config = architecture(tensors, text_heads, vision_heads)
        encoder = clip.build(config).to(dtype)
        encoder.clip.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise DataError.at(
            "The weights are no CLIP of OpenAI's layout", "state", str(error), "the parameter names of openai/CLIP"
        ) from error
    return encoder.eval()


def architecture(state: Mapping[str, Any], text_heads: int | None = None, vision_heads: int | None = None) -> dict[str, Any]:
    """The open_clip configuration read off the shapes of a state. Raises KeyError if a parameter is missing."""
    vocabulary_size, width = state["token_embedding.weight"].shape
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": _vit(state, vision_heads) if "visual.proj" in state else _resnet(state),
        "text_cfg": {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": vocabulary_size,
            "width": width,
            "heads": text_heads or max(1, width // HEAD_WIDTH),
            "layers": _count(state, "transformer.resblocks."),
        },
    }


def _vit(state: Mapping[str, Any], heads: int | None) -> dict[str, Any]:
    width, _, _, patch_px = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": patch_px * grid,
        "layers": _count(state, "visual.transformer.resblocks."),
        "width": width,
        "head_width": width // heads if heads else min(width, HEAD_WIDTH),
        "patch_size": patch_px,
    }


def _resnet(state: Mapping[str, Any]) -> dict[str, Any]:
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * 32,
        "layers": [_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
        "width": state["visual.layer1.0.conv1.weight"].shape[0],
    }


def _count(state: Mapping[str, Any], prefix: str) -> int:
    """How many numbered blocks follow a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
