"""Pictures of another size than the model's: the tower's position embeddings are interpolated, differentiably, and stay as they are.

The same interpolation as open_clip's when it loads weights for another size: bicubic with antialiasing over the grid of patches, the class
token's own embedding untouched.

Shape legend: L places (class token first), W width of an embedding, G H grid sides.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn


class Grid(NamedTuple):
    """The learnt position embeddings of an image tower: the parameter's name, and pixels between two places."""

    name: str
    stride: int


def grid_of(visual: nn.Module) -> Grid | None:
    """The square grid of open_clip's vision transformers and ResNets; None for towers without one."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        patch: Any = visual.patch_size
        return Grid("positional_embedding", int(patch[0])) if patch[0] == patch[1] else None
    if isinstance(visual, ModifiedResNet):
        return Grid("attnpool.positional_embedding", 32)
    return None


def features(visual: nn.Module, image_NCHW: torch.Tensor) -> torch.Tensor:
    """The tower's features `[N, D]` of pictures whose sides are multiples of the grid's stride."""
    grid = grid_of(visual)
    assert grid is not None
    height, width = (side // grid.stride for side in image_NCHW.shape[-2:])
    embedding_LW = interpolated(visual.get_parameter(grid.name), (height, width))
    found = torch.func.functional_call(visual, {grid.name: embedding_LW}, (image_NCHW,))
    feature_ND: torch.Tensor = found if isinstance(found, torch.Tensor) else found[0]
    return feature_ND


def interpolated(embedding_LW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Position embeddings `[1 + G * G, W]` for a grid of another size, `[1 + height * width, W]`; itself for its own size."""
    side = math.isqrt(len(embedding_LW) - 1)
    assert side * side == len(embedding_LW) - 1, f"{len(embedding_LW) - 1} places are no square"
    if size == (side, side):
        return embedding_LW
    grid_1WGG = embedding_LW[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    other_1WHH = nn.functional.interpolate(grid_1WGG, size=size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding_LW[:1], other_1WHH.permute(0, 2, 3, 1).reshape(size[0] * size[1], -1)])
