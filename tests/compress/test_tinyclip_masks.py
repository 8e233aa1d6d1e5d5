"""Masks reach the sparsity that was asked for, the cut model computes what the masked one did, is smaller, and learns on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.compress.pairs import batches_of
from torch import nn

from diptych.compress.footprint import parameters_of
from diptych.compress.masks import put_on
from diptych.compress.tinyclip_masks import Config
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip

TINY = {
    "vision_cfg": {"layers": 2, "width": 32},
    "text_cfg": {"layers": 1, "width": 16, "heads": 1, "vocab_size": 49408},
    "embed_dim": 16,
}


def settings(**more: Any) -> Config:
    short = {"steps": 90, "retrain_steps": 5, "mask_lr": 0.1, "warmup": 0.9, "calibration_batch": 8}
    return Config.parse({"method": "tinyclip-masks", **short, **more})


@pytest.fixture
def model() -> clip.DualEncoder:
    model = clip.create("shapes-16", 0, TINY)
    model.clip.token_embedding.requires_grad_(False)  # what costs most
    return model


def test_the_sparsity_is_reached_and_the_cut_model_is_the_masked_one(model: clip.DualEncoder) -> None:
    before, compressor = parameters_of(model), settings(stages=[0.4]).build()
    assert compressor.compress(model, batches_of(model, 2)) is model
    report = compressor.report(model)
    assert 0.38 < report["expected"] < 0.6, "a short training overshoots"
    assert report["reached"] == pytest.approx(report["expected"], abs=0.1), "whole heads, of which there are few"
    assert report["difference"] < 1e-5
    assert parameters_of(model) == report["after"]["parameters"] < before
    assert float(model.logit_scale.exp().detach()) == pytest.approx(50)
    assert report["kept"]["image"]["width"] < 32
    assert model.training, "the mode is given back"


def test_stages_go_on_where_the_last_ended(model: clip.DualEncoder) -> None:
    compressor = settings(stages=[0.2, 0.6], width=False, retrain_steps=0).build()
    compressor.compress(model, batches_of(model, 2))
    report = compressor.report(model)
    first, second = report["stages"]
    assert 0.18 < first["expected"] < 0.5
    assert first["reached"] + 0.05 < second["reached"] == pytest.approx(second["expected"], abs=0.1)
    assert report["kept"]["image"]["width"] == 32
    assert report["loss"] == report["mask_loss"]


def test_one_tower_leaves_the_other_its_shape(model: clip.DualEncoder) -> None:
    compressor = settings(towers="image", steps=3, retrain_steps=1, alpha=0.5).build()
    compressor.compress(model, batches_of(model, 1))
    assert set(compressor.report(model)["kept"]) == {"image"}
    assert "text" not in model.structure


def test_the_same_seed_gives_the_same_model() -> None:
    results = []
    for seed in (1, 1, 2):
        model = clip.create("shapes-16", 0, TINY)
        settings(steps=3, retrain_steps=1, seed=seed).build().compress(model, batches_of(model, 1))
        results.append(model.clip.visual.proj.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_impossible_settings_and_models_are_refused(model: clip.DualEncoder) -> None:
    for stages in ([], [0.0], [0.5, 0.5], [1.0]):
        with pytest.raises(ConfigError, match="stages"):
            settings(stages=stages)
    with pytest.raises(DataError, match="no calibration pairs"):
        settings().build().compress(model, [])
    with pytest.raises(ConfigError, match="no dual encoder"):
        settings().build().compress(nn.Linear(1, 1), [])
    layer = model.clip.visual.transformer.resblocks[0].mlp.c_fc
    put_on(layer, "weight", torch.zeros_like(layer.weight, dtype=torch.bool))
    with pytest.raises(ConfigError, match="masks already"):
        settings().build().compress(model, batches_of(model, 1))
