"""Magnitude pruning reaches every linear of both towers, prunes exactly what it says, and its model still opens in open_clip."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from diptych.compress.magnitude import Config, apply_masks, largest, masks_of, n_of_m, prunable, sparsity
from diptych.core.errors import ConfigError
from diptych.models import clip


@pytest.fixture
def model() -> clip.DualEncoder:
    return clip.create("digits-16", 0)


def test_every_linear_of_both_towers_is_named_and_reached(model: clip.DualEncoder) -> None:
    names = {name.removeprefix("clip.") for name, _ in prunable(model)}
    vision, text = model.config["vision_cfg"]["layers"], model.config["text_cfg"]["layers"]
    parts = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    expected = {f"visual.transformer.resblocks.{i}.{part}" for i in range(vision) for part in parts}
    expected |= {f"transformer.resblocks.{i}.{part}" for i in range(text) for part in parts}
    expected |= {"visual.conv1.weight", "visual.proj", "text_projection"}
    assert names == expected
    Config(sparsity=0.6).build().compress(model, ())
    for name, share in sparsity(model)["matrices"].items():
        assert share == pytest.approx(0.6, abs=1e-3), name


def test_a_resnet_tower_is_reached_too() -> None:
    resnet = clip.create("rn-nano-64", 0)
    convolutions = {f"{name}.weight" for name, module in resnet.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert convolutions <= {name for name, _ in prunable(resnet)}


def test_what_goes_is_the_smallest_and_the_count_is_exact(model: clip.DualEncoder) -> None:
    before = {name: weight.detach().clone() for name, weight in prunable(model)}
    others = {name: p.detach().clone() for name, p in model.named_parameters() if name not in before}
    Config(sparsity=0.3).build().compress(model, ())
    for name, weight in prunable(model):
        mask = masks_of(model)[name]
        assert int((~mask).sum()) == round(0.3 * weight.numel())
        assert before[name][~mask].abs().max() <= before[name][mask].abs().min()
        assert torch.equal(weight[mask], before[name][mask])
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in others.items())


def test_blocks_alone(model: clip.DualEncoder) -> None:
    Config(sparsity=0.5, layers="blocks").build().compress(model, ())
    outside = {"clip.visual.conv1.weight", "clip.visual.proj", "clip.text_projection"}
    assert {name for name, _ in prunable(model)} - masks_of(model).keys() == outside
    with pytest.raises(ConfigError, match="no transformer blocks"):
        Config(layers="blocks").build().compress(clip.create("rn-nano-64", 0), ())


def test_ties_do_not_change_the_count() -> None:
    assert int(largest(torch.ones(10), 0.5).sum()) == 5
    assert largest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.5).tolist() == [True, False, True, False]


def test_global_scope_moves_sparsity_between_layers(model: clip.DualEncoder) -> None:
    Config(sparsity=0.5, scope="global").build().compress(model, ())
    found = sparsity(model)
    assert found["overall"] == pytest.approx(0.5, abs=1e-4)
    assert max(found["matrices"].values()) - min(found["matrices"].values()) > 0.1


def test_two_of_four_keeps_two_of_every_four(model: clip.DualEncoder) -> None:
    Config(pattern="2:4").build().compress(model, ())
    for name, mask in masks_of(model).items():
        assert (mask.flatten(1).view(mask.shape[0], -1, 4).sum(-1) == 2).all(), name
    with pytest.raises(ConfigError, match="does not divide"):
        n_of_m(torch.ones(2, 6), 2, 4)


def test_one_tower_alone(model: clip.DualEncoder) -> None:
    Config(sparsity=0.9, towers="text").build().compress(model, ())
    assert sparsity(model, "image")["overall"] == 0
    assert sparsity(model, "text")["overall"] == pytest.approx(0.9, abs=1e-3)


def test_a_pruned_model_is_saved_with_its_masks_and_opens_in_open_clip(model: clip.DualEncoder, tmp_path: Path) -> None:
    Config(sparsity=0.5).build().compress(model, ())
    clip.save(model, tmp_path / "model", {})
    again = clip.load(tmp_path / "model")
    assert masks_of(again).keys() == masks_of(model).keys()
    with torch.no_grad():
        for weight in (weight for _, weight in prunable(again)):
            weight.add_(1.0)
    apply_masks(again)
    assert sparsity(again)["overall"] == pytest.approx(0.5, abs=1e-3)
    image = torch.zeros(1, 3, 16, 16)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    assert torch.allclose(theirs.eval().encode_image(image), clip.load(tmp_path / "model").eval().clip.encode_image(image))


@pytest.mark.parametrize("pattern", ["4:2", "2-4", "0:4", "half"])
def test_impossible_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="n:m"):
        Config.parse({"method": "magnitude", "pattern": pattern})
