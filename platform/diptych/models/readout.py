"""Transformers that are read at one token: the last block works for that token alone.

A text tower's feature is taken at the end token, an image tower's at the class token. What the last block computes for the others is read by
nobody and has no gradient, so its queries, its output projection and its MLP can be left out there: ten twelfths of the block's products at
an MLP ratio of 4. Features and gradients are those of the whole block but for the rounding of sums.

Shape legend: N sequences, L tokens, H heads, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def at_token(transformer: Any, x_NLD: Tensor, place_N: Tensor, mask_LL: Tensor | None = None) -> Tensor:
    """What open_clip's `Transformer` gives at one token of each sequence, `[N, D]`.

    Transformers that are compiled, sharded, watched by hooks or built of other blocks work whole, to the same effect.

    Args:
        transformer: an `open_clip.transformer.Transformer`.
        x_NLD: its input.
        place_N: int64, the token that is read, in [0, L).
        mask_LL: added to the logits of attention; row l is what token l may look at.
    """
    if not can_be_cut(transformer):
        return _at(transformer(x_NLD, attn_mask=mask_LL), place_N)
    *earlier, last = transformer.resblocks
    for block in earlier:
        if transformer.grad_checkpointing:
            x_NLD = checkpoint(block, x_NLD, None, None, mask_LL, use_reentrant=False)
        else:
            x_NLD = block(x_NLD, attn_mask=mask_LL)
    mask_NL = None if mask_LL is None else mask_LL[place_N].to(x_NLD.dtype)
    if transformer.grad_checkpointing:
        read_ND: Tensor = checkpoint(_last, last, x_NLD, place_N, mask_NL, use_reentrant=False)
        return read_ND
    return _last(last, x_NLD, place_N, mask_NL)


def class_token(visual: Any, token_NLD: Tensor) -> Tensor:
    """The features `[N, D]` of an image tower for which `reads_class_token` holds, from its tokens in front of the blocks, the class first."""
    first_N = token_NLD.new_zeros(len(token_NLD), dtype=torch.int64)
    x_ND = visual.ln_post(at_token(visual.transformer, token_NLD, first_N))
    feature_ND: Tensor = x_ND if visual.proj is None else x_ND @ visual.proj
    return feature_ND


def reads_class_token(visual: Any) -> bool:
    """Whether the tower is a plain vision transformer of open_clip, whose feature is its class token and whose forward is its own."""
    from open_clip.transformer import VisionTransformer

    return (
        type(visual) is VisionTransformer
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
        and not _is_watched(visual)
    )


def can_be_cut(transformer: Any) -> bool:
    """Whether the last block can work for one token: it is open_clip's own block, and nobody looks at what happens inside."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    if type(transformer) is not Transformer or not transformer.batch_first or not len(transformer.resblocks):
        return False
    last = transformer.resblocks[-1]
    return (
        type(last) is ResidualAttentionBlock
        and isinstance(last.attn, nn.MultiheadAttention)
        and not any(_is_watched(module) for module in transformer.modules())
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module is more than its class's `forward`: hooks, a compiled form, a `forward` of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl or "forward" in vars(module))


def _last(block: Any, x_NLD: Tensor, place_N: Tensor, mask_NL: Tensor | None) -> Tensor:
    """The block for one token of each sequence, `[N, D]`. `mask_NL`: what that token may look at."""
    seen_NLD = block.ln_1(x_NLD)
    x_N1D, asking_N1D = _at(x_NLD, place_N)[:, None], _at(seen_NLD, place_N)[:, None]
    mask = None if mask_NL is None else mask_NL.repeat_interleave(block.attn.num_heads, dim=0)[:, None]  # [N * H, 1, L]
    mixed_N1D, _ = block.attn(asking_N1D, seen_NLD, seen_NLD, need_weights=False, attn_mask=mask)
    x_N1D = x_N1D + block.ls_1(mixed_N1D)
    read_N1D: Tensor = x_N1D + block.ls_2(block.mlp(block.ln_2(x_N1D)))
    return read_N1D[:, 0]


def _at(x_NLD: Tensor, place_N: Tensor) -> Tensor:
    """One token of each sequence, `[N, D]`."""
    return x_NLD[torch.arange(len(x_NLD), device=x_NLD.device), place_N]
