"""Self-attention in the open: torch's fused attention step by step, and a form of it whose heads may be fewer than the width holds.

Torch's `nn.MultiheadAttention` never calls `out_proj` as a module and requires heads * head width = width. Both stand in the way of
compression: the first hides the input of the output projection, the second forbids to remove a head.

Shape legend: N sequences, L tokens, D model width, H heads, W width of a head, E = H * W.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from diptych.core.errors import ConfigError


def attend(x_NLD: Tensor, weight: Tensor, bias: Tensor | None, heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """What the output projection is multiplied with: `[N, L, E]`, the heads side by side.

    Args:
        x_NLD: `[N, L, D]`.
        weight, bias: q, k and v stacked, `[3 * E, D]` and `[3 * E]`.
        heads: H >= 1; divides E.
        mask: added to the logits, broadcast to `[N, H, L, L]`; bool: True may be looked at.
        dropout: of the attention weights, in [0, 1).
    """
    packed = linear(x_NLD, weight, bias)
    width = packed.shape[-1] // (3 * heads)
    query, key, value = packed.view(*packed.shape[:-1], 3, heads, width).permute(2, 0, 3, 1, 4)
    mixed_NHLW = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return mixed_NHLW.transpose(1, 2).flatten(2)


class CutAttention(nn.Module):
    """Self-attention with any number of heads, none included; takes the place, the call and the names of `nn.MultiheadAttention`.

    Args:
        width: D.
        heads: H, 0 where nothing but the bias is left.
        head_width: W.
        bias: whether the stacked projection has one.
    """

    def __init__(self, width: int, heads: int, head_width: int, bias: bool = True) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, heads, head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * head_width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * heads * head_width)) if bias else None
        self.out_proj = narrow_linear(heads * head_width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """`(output [N, L, D], None)` for query, key and value that are one and the same `[N, L, D]`."""
        del key, value, need_weights
        if not self.num_heads:
            return self.out_proj(query[..., :0]), None
        merged_NLE = attend(query, self.in_proj_weight, self.in_proj_bias, self.num_heads, _additive(attn_mask, query, self.num_heads))
        return self.out_proj(merged_NLE), None


def narrow_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer, not initialised; unlike torch's own it may have no inputs, and then gives its bias, or no outputs."""
    layer = nn.Linear(1, 1, bias=bias)
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight = nn.Parameter(torch.empty(outputs, inputs))
    if bias:
        layer.bias = nn.Parameter(torch.empty(outputs))
    return layer


@contextmanager
def in_the_open(root: nn.Module) -> Iterator[None]:
    """While open, every `nn.MultiheadAttention` under `root` computes step by step and calls its `out_proj`, so that hooks see all inputs.

    Raises ConfigError, when such a module is called, if it attends to another sequence than its own.
    """
    patched = [module for module in root.modules() if isinstance(module, nn.MultiheadAttention)]
    for module in patched:
        module.forward = partial(_open_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _open_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    if not (query is key and key is value) or module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise ConfigError.at("This attention is not plain self-attention", type(module).__name__, "other keys or values", "one sequence")
    x_NLD = query if module.batch_first else query.transpose(0, 1)
    mask = _additive(options.get("attn_mask"), x_NLD, module.num_heads)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, x_NLD, module.num_heads)
        padding_N11L = cast(Tensor, padding)[:, None, None, :]
        mask = padding_N11L if mask is None else mask + padding_N11L
    dropout = module.dropout if module.training else 0.0
    merged_NLE = attend(x_NLD, module.in_proj_weight, module.in_proj_bias, module.num_heads, mask, dropout)
    y_NLD = module.out_proj(merged_NLE)
    return y_NLD if module.batch_first else y_NLD.transpose(0, 1), None


def _additive(mask: Tensor | None, like: Tensor, heads: int) -> Tensor | None:
    """Torch's mask of attention as one that is added; torch's bool masks say True where one must not look."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(like.dtype)
    return mask.view(-1, heads, *mask.shape[1:]) if mask.ndim == 3 else mask
