"""Attention in the open computes what torch's does; with fewer heads it is what is left of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from diptych.core.errors import ConfigError
from diptych.models.attention import CutAttention, attend, in_the_open


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["none", "added", "bool", "a head each", "padding"])
def test_attention_in_the_open_is_torchs(masked: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    x = torch.randn((2, 5, 12) if batch_first else (5, 2, 12))
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    options: dict[str, Any] = {
        "none": {},
        "added": {"attn_mask": torch.zeros(5, 5).masked_fill(blocked, -math.inf)},
        "bool": {"attn_mask": blocked},
        "a head each": {"attn_mask": torch.randn(6, 5, 5)},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False, False, False, True, True]])},
    }[masked]
    expected = attention(x, x, x, need_weights=False, **options)[0]
    with in_the_open(attention):
        found = attention(x, x, x, need_weights=False, **options)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    other = torch.randn_like(x)
    with in_the_open(attention), pytest.raises(ConfigError, match="plain self-attention"):
        attention(x, other, other)


def test_attention_with_all_its_heads_is_torchs_and_without_any_its_bias() -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(12, 3, batch_first=True).eval(), torch.randn(2, 5, 12)
    whole = CutAttention(12, 3, 4)
    whole.load_state_dict(attention.state_dict())
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(whole(x, x, x, attn_mask=mask)[0], attention(x, x, x, need_weights=False, attn_mask=mask)[0])
    empty = CutAttention(12, 0, 4)
    empty.out_proj.bias.data.fill_(2.0)
    assert torch.equal(empty(x, x, x)[0], torch.full((2, 5, 12), 2.0))


def test_some_heads_are_the_others_left_out() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(36, 12), torch.randn(36)
    kept = torch.tensor([True, False, True]).repeat_interleave(4)
    whole, some = attend(x, weight, bias, 3), attend(x, weight[kept.repeat(3)], bias[kept.repeat(3)], 2)
    torch.testing.assert_close(some, whole[..., kept])
