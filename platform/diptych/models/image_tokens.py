"""Vision transformers token by token: some of a picture's tokens left out, and what the class token attends to.

Shape legend: N pictures, P patches, L = 1 + P tokens (class token first), K patches that are kept, H heads, W the tower's width, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych.core.errors import ConfigError
from diptych.models import preprocess
from diptych.models.clip import DualEncoder


class Seen(NamedTuple):
    """What a vision transformer makes of pictures: features `[N, D]` as they are, and before the projection `[N, W]`, both of the class
    token, and the patches `[N, K, W]` after the last norm.
    """

    feature_ND: Tensor
    class_NW: Tensor
    patch_NKW: Tensor


def transformer_of(model: DualEncoder) -> Any:
    """The image tower, if it is a vision transformer whose features are its class token's. Raises ConfigError for others."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    tower: Any = model.clip.visual
    fits = isinstance(tower, VisionTransformer) and tower.attn_pool is None and tower.pool_type == "tok"
    if not fits or not all(isinstance(block, ResidualAttentionBlock) for block in tower.transformer.resblocks):
        expected = "a vision transformer of open_clip with a class token"
        raise ConfigError.at("The image tower has no class token to follow", "model", type(tower).__name__, expected)
    return tower


def side_of(tower: Any) -> int:
    """Patches along each side of the square grid. Raises ConfigError for a grid that is not square."""
    height, width = tower.grid_size
    if height != width:
        raise ConfigError.at("The grid of patches is not square", "model", f"{height} x {width}", "as many rows as columns")
    return int(height)


def normalized(model: DualEncoder, image_NCHW: Tensor) -> Tensor:
    """Pictures as the tower takes them. Raises ConfigError for another size than the model's own."""
    if image_NCHW.shape[-1] != model.image_size:
        got, fix = image_NCHW.shape[-1], "leave out train.image_sizes"
        raise ConfigError.at("Tokens are selected at the model's own size", "image_sizes", got, f"{model.image_size} pixels", fix)
    return preprocess.normalize(image_NCHW, model.mean, model.std) if image_NCHW.dtype == torch.uint8 else image_NCHW


def see(tower: Any, image_NCHW: Tensor, kept_NK: Tensor | None = None) -> Seen:
    """One pass over normalised pictures. `kept_NK`: places of the patches that the tower sees, int64; None: all of them.

    Tokens are left out after the position embeddings were added; the class token stays.
    """

    def leave_out(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        assert kept_NK is not None
        (x_NLW,) = inputs
        return (torch.cat([x_NLW[:, :1], gather_tokens(x_NLW[:, 1:], kept_NK)], dim=1),)

    handle = None if kept_NK is None else tower.ln_pre.register_forward_pre_hook(leave_out)
    try:
        x_NLW = tower._embeds(image_NCHW)
    finally:
        if handle is not None:
            handle.remove()
    class_NW, patch_NKW = tower._pool(tower.transformer(x_NLW))
    return Seen(class_NW if tower.proj is None else class_NW @ tower.proj, class_NW, patch_NKW)


def gather_tokens(token_NPW: Tensor, kept_NK: Tensor) -> Tensor:
    """The tokens at some places, `[N, K, W]`."""
    return token_NPW.gather(1, kept_NK[..., None].expand(-1, -1, token_NPW.shape[2]))


@torch.no_grad()
def attended(tower: Any, image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """What the class token attends to, `[N, P]` (`class_attention` of all layers), and that token at the end, `[N, W]`.

    The tower works as in evaluation or in training, as it is; the class token is taken before the projection, after the last norm.
    """
    x_NLW = tower._embeds(image_NCHW)
    maps = []
    for block in tower.transformer.resblocks:
        y_NLW = block.ln_1(x_NLW)
        mixed_NLW, map_NHLL = block.attn(y_NLW, y_NLW, y_NLW, need_weights=True, average_attn_weights=False)
        x_NLW = x_NLW + block.ls_1(mixed_NLW)
        x_NLW = x_NLW + block.ls_2(block.mlp(block.ln_2(x_NLW)))
        maps.append(map_NHLL)
    return class_attention(maps), tower._pool(x_NLW)[0]


def class_attention(maps: Sequence[Tensor]) -> Tensor:
    """The weight of each patch for the class token, `[N, P]`: the mean over layers and heads of maps `[N, H, L, L]` after the softmax."""
    return torch.stack([map_NHLL[:, :, 0, 1:].mean(dim=1) for map_NHLL in maps]).mean(dim=0)
