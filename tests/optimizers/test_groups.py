"""Which parameters decay, on a real CLIP and on what must be refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych.core.errors import ConfigError
from diptych.optimizers.groups import decay_groups


@pytest.fixture
def clip() -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16)
    return CLIP(8, vision, CLIPTextCfg(context_length=6, vocab_size=20, width=16, heads=2, layers=1))


def test_every_parameter_of_a_clip_is_in_the_right_group(clip: nn.Module) -> None:
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    decaying, others = ({names[id(p)] for p in group["params"]} for group in decay_groups(clip.named_parameters(), 0.2))
    assert decaying | others == set(names.values())
    assert not decaying & others
    assert {"visual.proj", "text_projection", "token_embedding.weight", "visual.conv1.weight"} <= decaying
    assert {"logit_scale", "visual.class_embedding", "visual.ln_pre.weight", "transformer.resblocks.0.attn.in_proj_bias"} <= others
    assert all(clip.get_parameter(name).ndim < 2 for name in others)


def test_decay_is_zero_where_it_must_be(clip: nn.Module) -> None:
    assert [group["weight_decay"] for group in decay_groups(clip.named_parameters(), 0.2)] == [0.2, 0.0]


def test_names_rule_over_shapes() -> None:
    matrix = torch.ones(2, 2)
    decaying, others = decay_groups([("stem.bn.gain", matrix), ("head.weight", matrix.clone())], 0.1)
    assert others["params"][0] is matrix
    assert len(decaying["params"]) == 1


def test_frozen_parameters_are_kept_for_later() -> None:
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    assert decay_groups([("weight", frozen)], 0.1)[0]["params"] == [frozen]


def test_refusals() -> None:
    shared = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="listed twice"):
        decay_groups([("a.weight", shared), ("b.weight", shared)], 0.1)
    with pytest.raises(ConfigError, match="nothing to train"):
        decay_groups([], 0.1)
    with pytest.raises(ConfigError, match="negative"):
        decay_groups([("a.weight", shared)], -0.1)
