"""Weights of a large model as the first weights of a small one: some of its layers, and of each tensor the leading slice.

Source: Wu et al., TinyCLIP (ICCV 2023), section 3.2, "manual inheritance", and its code: of T layers the S of a student are 0, k, 2k, … with
k = floor(T / S), so that 12 to 10 are the first 10; stacked q, k and v are cut head by head, since a leading slice would mix the three.
Everything outside the layers is cut to its leading slice too; scalars are copied. Residual networks go stage by stage.

Shape legend: E inputs, H heads, W width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

LAYER = re.compile(r"^(?P<stack>(?:.*\.)?(?:resblocks|layer[1-4])\.)(?P<index>\d+)\.(?P<rest>.+)$")
"""A tensor in a stack of layers: transformer blocks, or a stage of a residual network."""
STACKED = ("attn.in_proj_weight", "attn.in_proj_bias")
WHOLE = ("token_embedding.weight", "visual.positional_embedding", "visual.attnpool.positional_embedding")
"""Tensors whose rows mean the same in both models, or nothing: words, places of a picture."""


def depth_map(teacher: int, student: int) -> list[int]:
    """Which of the teacher's layers, counted from 0, become the student's, in order. Raises ConfigError for a deeper student."""
    if not 0 < student <= teacher:
        raise ConfigError.at("A student cannot inherit more layers than there are", "layers", student, f"at least 1, at most {teacher}")
    return [place * (teacher // student) for place in range(student)]


def sliced(name: str, value: Tensor, shape: Sequence[int], head_width: int | None = None) -> Tensor:
    """The leading slice of a tensor, of stacked q, k and v that of each; a copy.

    Args:
        name: the tensor's; tells whether q, k and v are stacked in it.
        value: the teacher's.
        shape: the student's, as many dimensions, none larger.
        head_width: W, where they are.

    Raises ConfigError where the student is larger, or where rows that must all be there would be lost.
    """
    fits = value.ndim == len(shape) and all(ours <= theirs for ours, theirs in zip(shape, value.shape, strict=True))
    if not fits or (name.endswith(WHOLE) and value.shape[0] != shape[0]) or value.shape[2:] != tuple(shape[2:]):
        got, expected = f"{tuple(shape)} from {tuple(value.shape)}", "no dimension larger, and the same words, patches and kernels"
        raise ConfigError.at("A tensor of the student is no slice of the teacher's", name, got, expected, "choose another architecture")
    if name.endswith(STACKED):
        assert head_width is not None, f"{name} has heads"
        heads_3HWE = value.view(3, -1, head_width, *value.shape[1:])
        kept = heads_3HWE[:, : shape[0] // (3 * head_width)]
        return (kept[..., : shape[1]] if len(shape) == 2 else kept).reshape(*shape).clone()
    return value[tuple(slice(size) for size in shape)].clone()


def inherited(teacher: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], head_widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The student's tensors out of the teacher's.

    Args:
        teacher: its state.
        shapes: of the student's state, by name.
        head_widths: W of each stack of transformer blocks, by what stands before the block's number, e.g. `visual.transformer.resblocks.`.

    Raises ConfigError for a tensor that the teacher does not have or that is no slice of its own.
    """
    depths = (_depths(teacher), _depths(shapes))
    maps = {stack: depth_map(depths[0].get(stack, 0), depth) for stack, depth in depths[1].items()}
    found = {}
    for name, shape in shapes.items():
        source, head_width = name, None
        if layer := LAYER.match(name):
            stack, index, rest = layer["stack"], int(layer["index"]), layer["rest"]
            source, head_width = f"{stack}{maps[stack][index]}.{rest}", head_widths.get(stack)
        if source not in teacher:
            raise ConfigError.at("The teacher has no such tensor", name, "nothing", source, "choose a teacher of the student's kind")
        found[name] = sliced(name, teacher[source], shape, head_width)
    return found


def _depths(names: Mapping[str, Any]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for name in names:
        if layer := LAYER.match(name):
            depths[layer["stack"]] = max(depths.get(layer["stack"], 0), int(layer["index"]) + 1)
    return depths


@torch.no_grad()
def inherit(teacher: DualEncoder, student: DualEncoder) -> None:
    """Gives a student slices of its teacher's weights, in place.

    Towers: vision and text transformers of open_clip, and its modified ResNet. Pictures and patches must be of one size.
    Raises ConfigError for other towers, other widths of heads, and students that are larger in any respect.
    """
    for model, who in ((teacher, "teacher"), (student, "student")):
        _require_known(model, who)
    widths, theirs = _head_widths(student.clip), _head_widths(teacher.clip)
    for stack, width in widths.items():
        if theirs.get(stack, width) != width:
            raise ConfigError.at(
                "Heads are inherited whole", stack, f"width {width}", f"the teacher's {theirs[stack]}", "keep the head's width"
            )
    own = student.clip.state_dict()
    found = inherited(teacher.clip.state_dict(), {name: tuple(value.shape) for name, value in own.items()}, widths)
    for name, value in own.items():
        value.copy_(found[name])


def _head_widths(clip: nn.Module) -> dict[str, int]:
    """W of every stack of blocks, and of the pooling of a residual network, by name."""
    from open_clip.modified_resnet import AttentionPool2d

    widths = {}
    for name, module in clip.named_modules():
        layer = LAYER.match(name)
        if layer and hasattr(module, "in_proj_weight"):
            widths[layer["stack"]] = int(module.head_dim)
        elif isinstance(module, AttentionPool2d):
            widths[name] = module.q_proj.out_features // module.num_heads
    return widths


def _require_known(model: DualEncoder, who: str) -> None:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import TextTransformer, VisionTransformer

    image, text = model.clip.visual, getattr(model.clip, "text", None)
    known = isinstance(image, VisionTransformer | ModifiedResNet) and isinstance(text, TextTransformer | None)
    if not known or hasattr(model.clip, "text_decoder"):
        got = f"{type(image).__name__}, {type(text or model.clip).__name__}"
        raise ConfigError.at(f"The {who} has towers that cannot be inherited", who, got, "open_clip's transformers, or its modified ResNet")
