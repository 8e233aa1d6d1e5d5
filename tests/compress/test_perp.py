"""PERP trains what it says, its merge is exact and keeps every zero, it recovers loss, and it takes what is not pruned for a mistake."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.pairs import batch_of, batches_of, timm_model
from torch import Tensor, nn

from diptych.compress.adapters import LowRank, Selection, norm_parameters
from diptych.compress.gblm import Config as OneShot
from diptych.compress.magnitude import Config as Magnitude
from diptych.compress.magnitude import masks_of, prunable, sparsity
from diptych.compress.perp import Config, infer_masks, select
from diptych.compress.retrain import Pool, rate
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip
from diptych.models.contrastive import contrastive_loss


@pytest.fixture
def model() -> clip.DualEncoder:
    """Pruned to 70 %; biases and norms are not all alike."""
    model = clip.create("digits-16", 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Magnitude(sparsity=0.7).build().compress(model, ())  # type: ignore[return-value]


def loss_of(model: clip.DualEncoder, batches: list[dict[str, Tensor]]) -> float:
    model.eval()
    with torch.no_grad():
        losses = [contrastive_loss(*model(batch["image_NCHW"], batch["text_NL"])) for batch in batches]
    return float(sum(losses) / len(losses))


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in prunable(model)}


FORMS = ["none", "lora_prune", "mask_lora", "scale_lora", "full"]


@pytest.mark.parametrize("form", FORMS)
def test_retraining_lowers_the_loss_and_keeps_every_zero(model: clip.DualEncoder, form: Any) -> None:
    batches, zeros = batches_of(model), zeros_of(model)
    names = list(model.state_dict())
    before = loss_of(model, batches)
    compressor = Config(form=form, rank=2, alpha=4.0, lr=1e-2 if form != "full" else 1e-3, steps=15, calibration_batch=8).build()
    compressor.compress(model, batches)
    assert loss_of(model, batches) < before - 0.05
    assert all(torch.equal(found, zeros[name]) for name, found in zeros_of(model).items())
    assert list(model.state_dict()) == names, "a plain model again"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    report = compressor.report(model)
    assert report["last_loss"] < report["first_loss"]
    assert report["overall"] == pytest.approx(0.7, abs=0.01)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert report["trained_share"] == pytest.approx(report["trained"] / total)
    assert (report["trained_share"] == 1) == (form == "full")


def test_only_biases_and_norms_move_without_a_form(model: clip.DualEncoder) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Config(form="none", lr=1e-2, steps=5, calibration_batch=8).build().compress(model, batches_of(model))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    norms = set(norm_parameters(model))
    assert moved <= {name for name in before if name.endswith("bias")} | norms
    assert {"clip.ln_final.weight", "clip.visual.ln_pre.weight", "clip.transformer.resblocks.0.attn.in_proj_bias"} <= moved
    assert len(norms) == 2 * (2 * 3 + 2 * 2 + 3)


@pytest.mark.parametrize("form", ["mask_lora", "scale_lora", "lora_prune"])
def test_the_merge_is_exact_where_it_says_so(model: clip.DualEncoder, form: Any) -> None:
    batch, zeros = batch_of(model), zeros_of(model)
    model.eval()
    plain = model(batch["image_NCHW"], batch["text_NL"])[:2]
    chosen = select(model, masks_of(model), [], Config(form=form, rank=3, alpha=6.0))
    for found, expected in zip(model(batch["image_NCHW"], batch["text_NL"])[:2], plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg="nothing changes before a step")
    generator = torch.Generator().manual_seed(1)
    for adapter in chosen.adapters.values():
        for factor in (adapter.A, adapter.B):
            factor.data.add_(0.1 * torch.randn(factor.shape, generator=generator))
    before = model(batch["image_NCHW"], batch["text_NL"])[:2]
    chosen.merge()
    after = model(batch["image_NCHW"], batch["text_NL"])[:2]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(before, after, strict=True)) == (form != "lora_prune")
    assert not torch.allclose(after[0], plain[0], atol=1e-3), "fused attention reads the updated weights"
    assert all(torch.equal(found, zeros[name]) for name, found in zeros_of(model).items())


def test_gradients_of_a_masked_update_pass_through_what_stays() -> None:
    weight, mask = torch.zeros(2, 3), torch.tensor([[True, False, True], [False, False, True]])
    adapter = LowRank(weight, mask, "mask_lora", 2, 2.0, torch.Generator().manual_seed(0))
    adapter.B.data.normal_(generator=torch.Generator().manual_seed(1))
    upstream = torch.arange(6.0).view(2, 3)
    (adapter(weight) * upstream).sum().backward()
    torch.testing.assert_close(adapter.A.grad, adapter.B.detach().T @ (upstream * mask))
    torch.testing.assert_close(adapter.B.grad, (upstream * mask) @ adapter.A.detach().T)


def test_plain_lora_leaves_a_dense_model(model: clip.DualEncoder) -> None:
    Config(form="lora", rank=2, lr=1e-2, steps=3, calibration_batch=8).build().compress(model, batches_of(model))
    assert masks_of(model) == {}
    assert sparsity(model)["overall"] < 0.01


def test_the_head_is_trained_where_asked(model: clip.DualEncoder) -> None:
    dense_heads = clip.create("digits-16", 0)
    batches = batches_of(model)
    OneShot(score="magnitude", sparsity=0.5).build().compress(dense_heads, batches)
    before = {name: parameter.detach().clone() for name, parameter in dense_heads.named_parameters()}
    Config(head=True, rank=2, lr=1e-2, steps=3, calibration_batch=8).build().compress(dense_heads, batches)
    for name in ("clip.visual.proj", "clip.text_projection", "clip.logit_scale"):
        assert not torch.equal(dict(dense_heads.named_parameters())[name], before[name]), name
    timm = timm_model()
    OneShot(score="magnitude").build().compress(timm, batches_of(timm, 1))
    chosen = select(timm, masks_of(timm), ["clip.visual.head.proj.weight"], Config(rank=2))
    assert "clip.visual.head.proj.weight.A" in chosen.parameters()


def test_zeros_say_what_is_masked_where_no_mask_does(model: clip.DualEncoder, tmp_path: Path) -> None:
    clip.save(model, tmp_path / "model", {})
    (tmp_path / "model" / "masks.safetensors").unlink()
    bare = clip.load(tmp_path / "model")
    assert masks_of(bare) == {}
    found = infer_masks(bare)
    expected = masks_of(model)
    assert found.keys() == expected.keys() == masks_of(bare).keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_the_rate_rises_over_a_tenth_and_falls_to_zero() -> None:
    rates = [rate(step, 20, 1.0) for step in range(20)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[-1] == pytest.approx(1 / 18)
    assert all(one > other for one, other in itertools.pairwise(rates[2:]))
    assert rate(0, 5, 1.0) == 1.0, "too few steps for a warm-up"


def test_batches_cover_every_pair_once_an_epoch_in_another_order(model: clip.DualEncoder) -> None:
    batches = batches_of(model)
    batches[1] = {name: value[:4] for name, value in batches[1].items()}
    for number, batch in enumerate(batches):  # a pixel tells the pairs apart
        batch["image_NCHW"][:, 0, 0, 0] = 8 * number + torch.arange(len(batch["image_NCHW"]), dtype=torch.uint8)
    pool = Pool(model, batches, 5, seed=0)
    epochs = [torch.cat([pool.at(4 * epoch + place)["image_NCHW"][:, 0, 0, 0] for place in range(4)]).tolist() for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(12), *range(16, 24)]] * 2
    assert epochs[0] != epochs[1]
    assert torch.equal(pool.at(3)["text_NL"], Pool(model, batches, 5, seed=0).at(3)["text_NL"])
    assert len(Pool(model, batches, 64, seed=0).at(7)["text_NL"]) == 20


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("form", ["none", "mask_lora", "scale_lora"])
def test_reconstruction_brings_blocks_closer_to_what_they_gave(score: Any, form: Any) -> None:
    model = clip.create("digits-16", 0)
    config = Config(mode="reconstruct", score=score, form=form, sparsity=0.6, rank=2, alpha=4.0, lr=1e-2, steps=20)
    compressor = config.build()
    compressor.compress(model, batches_of(model))
    report = compressor.report(model)
    assert len(report["errors"]) == 5
    for name, errors in report["errors"].items():
        assert errors["reconstructed"] < errors["pruned"], name
    for name, mask in masks_of(model).items():
        assert float((~mask).float().mean()) == pytest.approx(0.6, abs=0.01), name
        assert not dict(model.named_parameters())[name][~mask].any()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_reconstruction_by_pattern() -> None:
    model = clip.create("digits-16", 0)
    Config(mode="reconstruct", pattern="2:4", steps=2, rank=1).build().compress(model, batches_of(model, 1))
    assert all((mask.view(len(mask), -1, 4).sum(-1) == 2).all() for mask in masks_of(model).values())


def test_equal_seeds_give_equal_models(model: clip.DualEncoder) -> None:
    batches, other = batches_of(model), copy.deepcopy(model)
    third = copy.deepcopy(model)
    for each, seed in ((model, 3), (other, 3), (third, 4)):
        torch.rand(1)
        Config(seed=seed, rank=2, steps=3, calibration_batch=8).build().compress(each, batches)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert not all(torch.equal(value, state[name]) for name, value in third.state_dict().items())


def test_mistakes_are_refused() -> None:
    model = clip.create("digits-16", 0)
    with pytest.raises(ConfigError, match="Nothing of the model is pruned"):
        Config().build().compress(model, batches_of(model, 1))
    with pytest.raises(DataError, match="no calibration pairs"):
        Config(form="none").build().compress(model, [])
    for wrong in (
        {"sparsity": 0.5},
        {"mode": "reconstruct"},
        {"mode": "reconstruct", "sparsity": 0.5, "form": "full"},
        {"form": "none", "biases": False, "norms": False},
        {"mode": "reconstruct", "pattern": "4:2"},
    ):
        with pytest.raises(ConfigError):
            Config.parse({"method": "perp", **wrong})


def test_a_selection_gives_back_what_was_frozen(model: clip.DualEncoder) -> None:
    clip.freeze(model, "text")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen = Selection(model, {name: mask for name, mask in masks_of(model).items() if mask.ndim == 2}, rank=2)
    assert "clip.ln_final.bias" in chosen.parameters()
    chosen.merge()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
