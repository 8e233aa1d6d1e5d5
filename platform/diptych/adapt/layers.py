"""Which layer a tensor of a state dict belongs to: a transformer or residual block, what stands before the blocks, or what stands behind."""

from __future__ import annotations

import re
from collections.abc import Iterable

BLOCK = re.compile(r"^((?:.*\.)?(?:(?:resblocks|blocks|layers?)\.\d+|layer\d+\.\d+))\.")
RESIDUAL = re.compile(r"(?:^|\.)layer\d+\.\d+\.")
STEM = frozenset({
    "conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "stem", "patch_embed", "ln_pre", "norm_pre",
    "class_embedding", "positional_embedding", "cls_token", "cls_emb", "pos_embed", "token_embedding",
})  # fmt: skip
POOLING = frozenset({"attnpool", "attn_pool"})
"""Stands behind the blocks, yet has positions of its own."""
HEAD, LOGIT_SCALE = "head", "logit_scale"


def block_of(name: str) -> str | None:
    """The block that holds a tensor, e.g. `visual.transformer.resblocks.3` or `visual.layer1.0`; None outside all blocks."""
    found = BLOCK.match(name)
    return found[1] if found else None


def in_stem(name: str) -> bool:
    """Whether a tensor outside all blocks stands before them: patch or token embedding, positions, first convolutions and norms."""
    parts = name.split(".")
    return block_of(name) is None and not STEM.isdisjoint(parts) and POOLING.isdisjoint(parts)


def of_image_tower(name: str) -> bool:
    """Whether a tensor belongs to the image tower of a dual encoder."""
    return ".visual." in f".{name}"


def layer_of(name: str) -> str:
    """The block, else `stem`, `projection` (both with `visual.` before them in the image tower), or `head` (classifier and logit scale)."""
    if name in (HEAD, LOGIT_SCALE):
        return HEAD
    tower = "visual." if of_image_tower(name) else ""
    return block_of(name) or tower + ("stem" if in_stem(name) else "projection")


def layers_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layer -> its tensors, both in the order given."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_of(name), []).append(name)
    return {layer: tuple(members) for layer, members in found.items()}
