"""What a student inherits: which layers, which heads, which slices, and from whom it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.errors import ConfigError
from diptych.models import clip
from diptych.models.inherit import depth_map, inherit, inherited, sliced

SMALL = {"vision_cfg": {"layers": 2, "width": 32}, "text_cfg": {"layers": 2, "width": 24, "heads": 2}}


def encoder(seed: int, **overrides: Any) -> clip.DualEncoder:
    return clip.create("shapes-16", seed, overrides).eval()


def features(model: clip.DualEncoder) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image_NCHW = torch.randint(0, 256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    text_NL = torch.from_numpy(model.tokenizer.encode_cut(["a red circle", "two stars", "nothing"]))
    with torch.no_grad():
        return model.encode_image(image_NCHW), model.encode_text(text_NL)


def test_layers_are_the_first_multiples() -> None:
    assert depth_map(12, 6) == [0, 2, 4, 6, 8, 10]
    assert depth_map(12, 10) == list(range(10))
    assert depth_map(12, 5) == [0, 2, 4, 6, 8]
    for student in (0, 13):
        with pytest.raises(ConfigError, match="more layers"):
            depth_map(12, student)


def test_stacked_projections_are_cut_head_by_head() -> None:
    query, key, value = (torch.full((6, 4), float(number)) + torch.arange(6)[:, None] / 10 for number in (1, 2, 3))
    found = sliced("resblocks.0.attn.in_proj_weight", torch.cat([query, key, value]), (6, 3), head_width=2)
    assert torch.equal(found, torch.cat([query[:2, :3], key[:2, :3], value[:2, :3]]))
    plain = sliced("resblocks.0.mlp.c_fc.weight", query, (2, 3))
    assert torch.equal(plain, query[:2, :3])
    plain.zero_()
    assert query.all(), "slices are copies"


def test_a_student_of_the_same_shape_is_the_teacher() -> None:
    teacher, student = encoder(1), encoder(2)
    assert not torch.allclose(features(teacher)[0], features(student)[0])
    inherit(teacher, student)
    for one, other in zip(features(teacher), features(student), strict=True):
        torch.testing.assert_close(one, other)


def test_half_the_layers_suffice_where_the_others_do_nothing() -> None:
    teacher, student = encoder(1, vision_cfg={"layers": 4}), encoder(2, vision_cfg={"layers": 2}, text_cfg={"layers": 2})
    for blocks in (teacher.clip.visual.transformer.resblocks, teacher.clip.transformer.resblocks):
        for block in list(blocks)[1::2]:
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
    inherit(teacher, student)
    for one, other in zip(features(teacher), features(student), strict=True):
        torch.testing.assert_close(one, other)


def test_a_narrow_student_gets_leading_slices_everywhere() -> None:
    teacher, student = encoder(1), encoder(2, **SMALL)
    inherit(teacher, student)
    theirs, ours = teacher.clip.state_dict(), student.clip.state_dict()
    assert torch.equal(ours["token_embedding.weight"], theirs["token_embedding.weight"][:, :24])
    assert torch.equal(ours["visual.proj"], theirs["visual.proj"][:32])
    assert torch.equal(ours["transformer.resblocks.1.mlp.c_fc.weight"], theirs["transformer.resblocks.2.mlp.c_fc.weight"][:96, :24])
    assert torch.equal(
        ours["transformer.resblocks.0.attn.in_proj_weight"][24:48], theirs["transformer.resblocks.0.attn.in_proj_weight"][48:72, :24]
    )
    assert torch.equal(ours["logit_scale"], theirs["logit_scale"])


def test_residual_networks_inherit_stage_by_stage() -> None:
    teacher = clip.create("shapes-rn-32", 1, {"vision_cfg": {"layers": [2, 1, 2, 1]}})
    student = clip.create("shapes-rn-32", 2, {"vision_cfg": {"layers": [1, 1, 2, 1], "width": 6}})
    teacher.clip.visual.bn1.running_mean.fill_(3.0)
    inherit(teacher, student)
    theirs, ours = teacher.clip.state_dict(), student.clip.state_dict()
    for name in (
        "visual.layer3.1.conv2.weight",
        "visual.layer1.0.downsample.0.weight",
        "visual.bn1.running_mean",
        "visual.attnpool.q_proj.weight",
    ):
        assert torch.equal(ours[name], theirs[name][tuple(slice(size) for size in ours[name].shape)]), name
    assert "visual.layer1.1.conv1.weight" not in ours


def test_what_cannot_be_inherited_is_refused() -> None:
    for overrides, hint in (
        ({"vision_cfg": {"width": 128}}, "no slice"),
        ({"vision_cfg": {"layers": 4}}, "more layers"),
        ({"vision_cfg": {"head_width": 32}}, "Heads are inherited whole"),
        ({"vision_cfg": {"patch_size": 2}}, "no slice"),
        ({"vision_cfg": {"image_size": 8}}, "no slice"),
    ):
        with pytest.raises(ConfigError, match=hint):
            inherit(encoder(1), encoder(2, **overrides))
    with pytest.raises(ConfigError, match="at most 0"):
        inherit(clip.create("shapes-rn-32", 1), encoder(2))
    with pytest.raises(ConfigError, match="no such tensor"):
        inherited({}, {"extra": (1,)}, {})
