"""Rescaling changes weights and no output, and is named by its seed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.compress.pairs import batch_of, timm_model

from diptych.compress.rescale import Config
from diptych.core.errors import ConfigError
from diptych.models import clip


@pytest.mark.parametrize("make", [lambda: clip.create("digits-16", 0).eval(), timm_model], ids=["native", "timm"])
def test_the_function_stays(make: Any) -> None:
    model = make()
    other, batch = copy.deepcopy(model), batch_of(model)
    Config(seed=1).build().compress(other, ())
    for one, two in zip(model(batch["image_NCHW"], batch["text_NL"]), other(batch["image_NCHW"], batch["text_NL"]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    changed = [name for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True) if not torch.equal(p, q)]
    assert len(changed) >= 4 * 5
    assert all(".resblocks." in name or ".blocks." in name for name in changed)


def test_seeds_name_the_draws_and_one_tower_can_be_left_alone() -> None:
    states = []
    for seed in (0, 0, 1):
        model = clip.create("digits-16", 0)
        Config(seed=seed, towers="text").build().compress(model, ())
        states.append(model.state_dict())
    name = "clip.transformer.resblocks.0.ln_1.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
    assert torch.equal(states[0]["clip.visual.transformer.resblocks.0.ln_1.weight"], torch.ones(64))


def test_one_factor_a_layer_keeps_the_order_of_its_weights() -> None:
    model, plain = clip.create("digits-16", 0), clip.create("digits-16", 0)
    Config(per="layer").build().compress(model, ())
    name = "clip.visual.transformer.resblocks.0.attn.in_proj_weight"
    ratio = model.state_dict()[name] / plain.state_dict()[name]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()))
    assert abs(ratio[0, 0].item() - 1) > 0.01


def test_a_tower_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no transformer blocks"):
        Config().build().compress(clip.create("rn-nano-64", 0), ())
