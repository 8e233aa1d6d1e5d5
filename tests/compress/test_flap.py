"""FLAP removes what it says, its biases restore means, the cut model is really smaller, is kept on disk, and opens in open_clip where it can."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tests.compress.pairs import TEXTS, batch_of, batches_of, timm_model
from torch import Tensor

from diptych.compress.blocks import collect, towers, walk
from diptych.compress.flap import Config
from diptych.compress.fluctuation import Moments, adaptive, compensation, standardised, thresholded, uniform
from diptych.compress.footprint import measure, parameters_of
from diptych.compress.magnitude import masks_of
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip, store


@pytest.fixture
def model() -> clip.DualEncoder:
    return clip.create("digits-16", 0, {"vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 4}}).eval()


def features(model: clip.DualEncoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(batch["image_NCHW"]), model.encode_text(batch["text_NL"])


def assert_same_features(one: clip.DualEncoder, other: clip.DualEncoder, batch: dict[str, Tensor]) -> None:
    for found, expected in zip(features(one, batch), features(other, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_moments_do_not_depend_on_batches_and_follow_the_update() -> None:
    x_NLI = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = Moments(3), Moments(3)
    whole.add(x_NLI)
    for part in x_NLI.split(2):
        parts.add(part)
    mean, fluctuation = torch.zeros(3), torch.zeros(3)
    for n, x_LI in enumerate(x_NLI):  # the update as the card writes it
        mean = mean * n / (n + 1) + x_LI.mean(dim=0) / (n + 1)
        fluctuation = torch.zeros(3) if n == 0 else fluctuation * (n - 1) / n + (x_LI - mean).square().sum(dim=0) / (n + 1)
    for moments in (whole, parts):
        torch.testing.assert_close(moments.mean, mean)
        torch.testing.assert_close(moments.fluctuation, fluctuation)
        torch.testing.assert_close(moments.square, x_NLI.square().sum(dim=1).mean(dim=0))


def test_moments_leave_padding_out() -> None:
    x_NLI = torch.randn(2, 5, 3)
    padded, cut = Moments(3), Moments(3)
    valid_NL = torch.tensor([[True] * 3 + [False] * 2] * 2)
    padded.add(x_NLI, valid_NL)
    cut.add(x_NLI[:, :3])
    torch.testing.assert_close(padded.mean, cut.mean)
    torch.testing.assert_close(padded.fluctuation, cut.fluctuation)


def test_one_sample_has_no_fluctuation_and_equal_scores_no_spread() -> None:
    moments = Moments(2)
    moments.add(torch.randn(1, 4, 2))
    assert moments.fluctuation.tolist() == [0, 0]
    assert standardised(torch.ones(4)).tolist() == [0] * 4
    assert standardised(torch.ones(1)).tolist() == [0]


def test_the_adaptive_choice_weighs_costs_and_drops_the_unit_at_the_cut() -> None:
    heads, neurons = [torch.tensor([5.0, 1.0])], [torch.tensor([4.0, 3.0, 2.0, 0.0])]
    (kept,) = adaptive(heads, neurons, [(4, 1)], 0.5)  # 12 in all, spent 4 5 6: the cut is at the neuron of score 3
    assert kept.heads.tolist() == [True, False]
    assert kept.neurons.tolist() == [True, False, False, False]
    (none,) = adaptive([torch.zeros(0)], [torch.zeros(0)], [(4, 1)], 0.5)
    assert len(none.heads) == len(none.neurons) == 0


def test_uniform_choices_keep_ties_and_may_remove_all() -> None:
    scores = [(torch.tensor([1.0, 1, 2, 2]), torch.tensor([1.0, 1, 1, 2]))]
    (kept,) = uniform(scores, [2], None, 0.5, 2, 8)
    assert kept.heads.tolist() == [False, True]
    assert kept.neurons.tolist() == [True] * 4
    (empty,) = uniform(scores, [2], 2, 0.9, 2, 8)
    assert not empty.heads.any()
    assert [one.heads.all().item() for one in thresholded(scores, [2], 0, 0.01, 2, 8)] == [True], "none asked, none removed"


def test_the_bias_restores_the_mean_output(model: clip.DualEncoder) -> None:
    batch = batches_of(model, 1)
    (tower,) = towers(model, "image")
    name, block = next(iter(tower.blocks.items()))
    seen: dict[str, Tensor] = {}
    for found, each, states in walk(model, tower, batch):
        if found == name:
            collect(each, name, states, lambda matrix, _, x_NLI: seen.update({matrix: x_NLI}))
    x_NLI, linear = seen[f"{name}.mlp.c_proj.weight"], block.mlp.c_proj
    gone = torch.arange(x_NLI.shape[-1]) % 3 == 0
    moments = Moments(x_NLI.shape[-1])
    moments.add(x_NLI)
    dense = linear(x_NLI).mean(dim=(0, 1))
    cut = (x_NLI * ~gone) @ linear.weight.T + linear.bias + compensation(linear.weight, moments.mean, gone)
    torch.testing.assert_close(cut.mean(dim=(0, 1)), dense)


def test_arithmetic_is_counted_in_full(model: clip.DualEncoder) -> None:
    batch = batch_of(model, TEXTS)
    tokens, width = 5, 64
    block = 2 * tokens * width * (4 * width + 2 * 128) + 2 * 2 * tokens * tokens * width
    assert measure(model, batch).image_flops == 3 * block + 2 * 4 * width * 3 * 64 + 2 * width * 64


@pytest.mark.parametrize("which", ["al-am", "al-mm", "ul-mm", "ul-um"])
def test_the_cut_model_computes_what_the_masked_one_does_and_is_smaller(model: clip.DualEncoder, which: Any) -> None:
    batches, dense = batches_of(model), copy.deepcopy(model)
    masked = Config(ratio=0.4, structure=which, form="masked").build().compress(copy.deepcopy(model), batches)
    compressor = Config(ratio=0.4, structure=which).build()
    cut = compressor.compress(model, batches)
    assert_same_features(cut, masked, batches[0])
    assert not torch.allclose(features(cut, batches[0])[0], features(dense, batches[0])[0], atol=1e-3)
    assert parameters_of(cut) < parameters_of(masked) == parameters_of(dense)
    report = compressor.report(cut)
    assert report["after"]["parameters"] == parameters_of(cut)
    assert report["after"]["image_flops"] < 0.8 * report["before"]["image_flops"]
    assert report["after"]["text_flops"] < report["before"]["text_flops"]
    for kind, share in report["kept_share"].items():
        assert share == pytest.approx(0.6, abs=0.1), kind  # a head is a twelfth of the blocks' weights
    zeroed = sum(int((~mask).sum()) for mask in masks_of(masked).values())
    assert parameters_of(dense) - parameters_of(cut) == zeroed


def test_a_cut_model_is_kept_on_disk(model: clip.DualEncoder, tmp_path: Path) -> None:
    batches = batches_of(model)
    compressor = Config(ratio=0.4).build()
    cut = compressor.compress(model, batches)
    assert compressor.report(cut)["open_clip"].startswith("no: ")
    clip.save(cut, tmp_path / "cut", {})
    assert (tmp_path / "cut" / store.STRUCTURE).is_file()
    again = clip.load(tmp_path / "cut").eval()
    assert parameters_of(again) == parameters_of(cut)
    assert again.structure == cut.structure != {}
    assert_same_features(again, cut, batches[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'cut'}")
    (tmp_path / "cut" / store.STRUCTURE).write_text('{"visual.nowhere": {"heads": 1, "neurons": 1}}')
    with pytest.raises(DataError, match="structure cannot be read"):
        clip.load(tmp_path / "cut")


def test_one_mlp_width_for_a_tower_opens_in_open_clip(model: clip.DualEncoder, tmp_path: Path) -> None:
    batches = batches_of(model)
    compressor = Config(ratio=0.2, structure="ul-mm", remove_heads=0).build()
    cut = compressor.compress(model, batches)
    assert compressor.report(cut)["open_clip"] == "yes"
    assert cut.structure == {}
    clip.save(cut, tmp_path / "cut", {})
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'cut'}")
    assert parameters_of(theirs) == parameters_of(cut)
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval().encode_image(image), cut.clip.encode_image(image), rtol=1e-4, atol=1e-5)


def test_the_masked_form_opens_in_open_clip(model: clip.DualEncoder, tmp_path: Path) -> None:
    compressor = Config(ratio=0.4, form="masked").build()
    masked = compressor.compress(model, batches_of(model))
    assert compressor.report(masked)["open_clip"] == "yes"
    clip.save(masked, tmp_path / "masked", {})
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'masked'}")
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval().encode_image(image), masked.clip.encode_image(image), rtol=1e-4, atol=1e-5)
    assert masks_of(clip.load(tmp_path / "masked")).keys() == masks_of(masked).keys()


def test_a_timm_tower_is_cut_too(tmp_path: Path) -> None:
    model = timm_model()
    batches = [batch_of(model)]
    masked = Config(ratio=0.4, form="masked").build().compress(copy.deepcopy(model), batches)
    cut = Config(ratio=0.4).build().compress(model, batches)
    assert_same_features(cut, masked, batches[0])
    assert parameters_of(cut) < parameters_of(masked)
    clip.save(cut, tmp_path / "cut", {})
    assert_same_features(clip.load(tmp_path / "cut").eval(), cut, batches[0])


def test_masks_are_cut_with_their_parameters(model: clip.DualEncoder) -> None:
    from diptych.compress.magnitude import Config as Magnitude

    batches = batches_of(model)
    Magnitude(sparsity=0.5).build().compress(model, ())
    cut = Config(ratio=0.4).build().compress(model, batches)
    parameters = dict(cut.named_parameters())
    assert masks_of(cut)
    for name, mask in masks_of(cut).items():
        assert mask.shape == parameters[name].shape
        assert not parameters[name][~mask].any()


def test_jointly_the_towers_share_what_goes(model: clip.DualEncoder) -> None:
    compressor = Config(ratio=0.3, jointly=True).build()
    compressor.compress(model, batches_of(model))
    shares = compressor.report(model)["kept_share"]
    assert abs(shares["image"] - shares["text"]) > 0.005, "on random weights they need not lose the same"


def test_one_tower_alone_and_the_bias_is_added(model: clip.DualEncoder) -> None:
    batches, dense = batches_of(model), copy.deepcopy(model)
    Config(ratio=0.4, towers="text").build().compress(model, batches)
    assert torch.equal(features(model, batches[0])[0], features(dense, batches[0])[0])
    without = copy.deepcopy(dense)
    Config(ratio=0.4, towers="text", compensate=False).build().compress(without, batches)
    plain = dict(without.named_parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, plain[name])}
    assert {name.removeprefix("clip.transformer.resblocks.")[2:] for name in changed} == {"attn.out_proj.bias", "mlp.c_proj.bias"}


def test_refusals(model: clip.DualEncoder) -> None:
    with pytest.raises(DataError, match="no calibration pairs"):
        Config().build().compress(model, [])
    with pytest.raises(ConfigError, match="al-mm and ul-mm"):
        Config.parse({"method": "flap", "remove_heads": 2})
    with pytest.raises(ConfigError, match="not so many heads"):
        Config(structure="al-mm", remove_heads=100).build().compress(model, batches_of(model, 1))
