"""A tower under masks, the smaller tower that computes the same, and that one on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.pairs import batch_of, timm_model

from diptych.compress.hard_concrete import Masks
from diptych.compress.masked import Form, fuse, masked
from diptych.compress.masks import put_on
from diptych.core.errors import ConfigError
from diptych.models import clip, store, structure
from diptych.models.structure import Kind

OVERRIDES: dict[str, Any] = {
    "plain": {},
    "custom": {"custom_text": True},
    "scaled": {"vision_cfg": {"ls_init_value": 0.5}, "text_cfg": {"ls_init_value": 0.5}},
    "pooled": {"vision_cfg": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
}


def masks_for(form: Form, seed: int = 0) -> Masks:
    """Random masks with zeros among them."""
    generator, sizes = torch.Generator().manual_seed(seed), form.sizes()

    def draw(size: int) -> torch.Tensor:
        mask = torch.rand(size, generator=generator) + 0.1
        return mask.index_fill(0, torch.randperm(size, generator=generator)[: size // 3], 0.0)

    return Masks(draw(sizes.hidden), [draw(count) for count in sizes.heads], [draw(count) for count in sizes.neurons])


@torch.no_grad()
def feature(model: clip.DualEncoder, kind: Kind) -> torch.Tensor:
    batch = batch_of(model)
    return model.encode_image(batch["image_NCHW"], False) if kind == "image" else model.encode_text(batch["text_NL"], False)


@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_cut_tower_computes_what_the_masked_one_did(name: str, kind: Kind, tmp_path: Path) -> None:
    model = clip.create("digits-16" if name == "custom" else "shapes-16", 0, OVERRIDES[name]).eval()
    form = Form.of_tower(model, kind)
    masks, before, plain = masks_for(form), sum(each.numel() for each in model.parameters()), feature(model, kind)
    with masked(form, lambda: masks):
        expected = feature(model, kind)
    assert not torch.allclose(expected, plain, atol=1e-2), "the masks do something"
    torch.testing.assert_close(feature(model, kind), plain)  # and leave nothing behind
    fuse(model, kind, masks)
    torch.testing.assert_close(feature(model, kind), expected, rtol=1e-4, atol=1e-5)
    assert sum(each.numel() for each in model.parameters()) < before
    sizes = Form.of_tower(model, kind).sizes()
    assert sizes.hidden == int((masks.hidden != 0).sum())
    assert sizes.heads == tuple(int((each != 0).sum()) for each in masks.heads)
    store.save(model, tmp_path / "model", {})
    torch.testing.assert_close(feature(store.load(tmp_path / "model").eval(), kind), feature(model, kind))


def test_a_tower_may_be_cut_again() -> None:
    model = clip.create("shapes-16", 0).eval()
    for seed in range(2):
        form = Form.of_tower(model, "image")
        masks = masks_for(form, seed)
        with masked(form, lambda masks=masks: masks):
            expected = feature(model, "image")
        fuse(model, "image", masks)
        torch.testing.assert_close(feature(model, "image"), expected, rtol=1e-4, atol=1e-5)


def test_masks_and_weights_get_gradients() -> None:
    model = clip.create("shapes-16", 0)
    form = Form.of_tower(model, "image")
    masks = masks_for(form)
    for each in (masks.hidden, *masks.heads, *masks.neurons):
        each.requires_grad_()
    with masked(form, lambda: masks):
        model.encode_image(batch_of(model)["image_NCHW"]).square()[:, 0].sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in (masks.hidden, *masks.heads, *masks.neurons))
    dead = masks.hidden.detach() == 0
    assert not model.clip.visual.ln_post.weight.grad[dead].any()
    assert model.clip.visual.ln_post.weight.grad[~dead].any()


def test_the_width_is_cut_with_masks_of_weights_and_noted() -> None:
    model = clip.create("shapes-16", 0)
    block = model.clip.transformer.resblocks[0]
    mask = torch.rand(block.mlp.c_proj.weight.shape) > 0.5
    put_on(block.mlp.c_proj, "weight", mask)
    keep = torch.arange(48) % 3 > 0
    structure.cut_width(model, "text", keep)
    assert torch.equal(model.clip.transformer.resblocks[0].mlp.c_proj.weight_mask, mask[keep])
    assert model.structure == {"text": {"width": 32}}
    assert "widths" in structure.open_clip_says(model)
    structure.cut_width(model, "image", torch.ones(64, dtype=torch.bool))
    assert model.structure == {"text": {"width": 32}}


def test_other_towers_are_refused() -> None:
    timm = timm_model()
    with pytest.raises(ConfigError, match="image tower cannot be told apart"):
        Form.of_tower(timm, "image")
    with pytest.raises(ConfigError, match="own blocks"):
        Form.of_blocks(list(timm.clip.visual.trunk.blocks))
    with pytest.raises(ConfigError, match="cannot be cut"):
        structure.cut_block_width(timm.clip.visual.trunk.blocks[0], torch.ones(64, dtype=torch.bool))
