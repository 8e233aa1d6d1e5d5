"""The attention of a text tower with the gradient of the caption's cosine: fused kernels give neither, so the last layers are written out.

Shape legend: N pairs, L tokens, H heads, D feature width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import cosine_similarity, linear

from diptych.core.errors import ConfigError, DataError
from diptych.models.clip import DualEncoder


class AttentionGradients(NamedTuple):
    """What the text tower did with a batch of captions.

    Attributes:
        cosine_N: the cosines of picture and caption, without the temperature.
        attention, gradient: `[N, H, L, L]` a layer, first kept layer first: the maps after the softmax, and d cosine / d map.
    """

    cosine_N: torch.Tensor
    attention: list[torch.Tensor]
    gradient: list[torch.Tensor]


def attention_gradients(model: DualEncoder, image_ND: torch.Tensor, text_NL: torch.Tensor, start_layer: int) -> AttentionGradients:
    """The attention of the last layers of the text tower, and the gradient of each caption's cosine with its picture.

    The layers before run as they are, without gradient; the kept ones with the softmax written out, because fused attention gives no maps.
    A caption's cosine depends on its own maps only, so one backward pass from the sum serves the batch. The weights get no gradient.

    Args:
        model: a dual encoder with a causal text tower of open_clip, in float32 or float64.
        image_ND: image features, of any length.
        text_NL: token ids with the end token in each row, L <= the context.
        start_layer: first layer to keep, from the end if negative; 0, or beyond the first, keeps all.

    Raises DataError for another kind of text tower, or half precision; ConfigError if no layer is kept.
    """
    tower = _explainable(model)
    blocks = list(tower.transformer.resblocks)
    kept = blocks[start_layer:]
    if not kept:
        raise ConfigError.at("No layer is left to explain", "start_layer", start_layer, f"less than the tower's {len(blocks)} layers")
    mask_LL = tower.attn_mask[: text_NL.shape[1], : text_NL.shape[1]]
    with torch.no_grad():
        x_NLD = tower.token_embedding(text_NL) + tower.positional_embedding[: text_NL.shape[1]]
        for block in blocks[: len(blocks) - len(kept)]:
            x_NLD = block(x_NLD, attn_mask=mask_LL)
    with torch.enable_grad():
        attention = []
        for block in kept:
            x_NLD, map_NHLL = _explicit(block, x_NLD, mask_LL)
            attention.append(map_NHLL)
        feature_ND = _pooled(tower, x_NLD, text_NL)
        cosine_N = cosine_similarity(feature_ND, image_ND.to(feature_ND), dim=-1)
        gradient = torch.autograd.grad(cosine_N.sum(), attention)
    return AttentionGradients(cosine_N.detach(), [map_NHLL.detach() for map_NHLL in attention], list(gradient))


def _explainable(model: DualEncoder) -> Any:
    """The text tower, if its attention can be written out."""
    tower = getattr(model.clip, "text", model.clip)
    fault = ""
    if getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None or _pool(tower) not in ("argmax", "eos"):
        fault = f"{type(tower).__name__} does not end in a causal end token"
    elif odd := {type(block.attn).__name__ for block in tower.transformer.resblocks if type(block.attn) is not torch.nn.MultiheadAttention}:
        fault = f"attention of the kind {sorted(odd)}"
    elif tower.positional_embedding.dtype in (torch.float16, torch.bfloat16):
        fault = "half precision, whose steps are as large as the attributions"
    if fault:
        raise DataError.at("The text tower cannot be explained", "model", fault, "a causal text tower of open_clip in float32")
    return tower


def _explicit(block: Any, x_NLD: torch.Tensor, mask_LL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual block with its attention written out: its output, and the maps `[N, H, L, L]` that the output was made of."""
    attn = block.attn
    stacked = linear(block.ln_1(x_NLD), attn.in_proj_weight, attn.in_proj_bias)
    query, key, value = stacked.reshape(*x_NLD.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    map_NHLL = (query @ key.mT * query.shape[-1] ** -0.5 + mask_LL.to(query.dtype)).softmax(dim=-1)
    if not map_NHLL.requires_grad:  # the weights are frozen
        map_NHLL.requires_grad_()
    x_NLD = x_NLD + block.ls_1(attn.out_proj((map_NHLL @ value).transpose(1, 2).flatten(2)))
    return x_NLD + block.ls_2(block.mlp(block.ln_2(x_NLD))), map_NHLL


def _pooled(tower: Any, x_NLD: torch.Tensor, text_NL: torch.Tensor) -> torch.Tensor:
    """The end token's feature in the joint space, not normalised."""
    from diptych.models.clip import end_of, projected

    row_N = torch.arange(len(x_NLD), device=x_NLD.device)
    return projected(tower, x_NLD[row_N, end_of(tower, text_NL)])


def _pool(tower: Any) -> str:
    """How the tower picks a caption's token; `CLIP` and `TextTransformer` call it differently."""
    pool: str = getattr(tower, "text_pool_type", "") or getattr(tower, "pool_type", "")
    return pool
