"""Blocks with fewer heads and neurons: cut, noted, kept on disk, and in open_clip's configuration where that can say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.pairs import batch_of, timm_model
from torch import Tensor

from diptych.compress.blocks import towers
from diptych.core.errors import ConfigError
from diptych.models import clip, structure


def features(model: clip.DualEncoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(batch["image_NCHW"]), model.encode_text(batch["text_NL"])


@pytest.mark.parametrize("make", [lambda: clip.create("digits-16", 0).eval(), timm_model], ids=["native", "timm"])
def test_a_block_may_lose_everything(make: Any, tmp_path: Path) -> None:
    model = make()
    (tower,) = towers(model, "image")
    name = next(iter(tower.blocks))
    found = structure.parts(tower.blocks[name])
    nothing = (torch.zeros(found.heads, dtype=torch.bool), torch.zeros(found.neurons, dtype=torch.bool))
    batch = batch_of(model)
    with torch.no_grad():
        found.out.bias.fill_(0.5)
        found.outer.weight.zero_()
        found.out.weight.zero_()
    expected = features(model, batch)
    structure.cut_encoder(model, {name.removeprefix("clip."): nothing})
    torch.testing.assert_close(features(model, batch)[0], expected[0], rtol=1e-4, atol=1e-5)
    clip.save(model, tmp_path / "cut", {})
    for found, again in zip(features(clip.load(tmp_path / "cut").eval(), batch), features(model, batch), strict=True):
        torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-5)


def test_what_is_noted_and_what_the_configuration_says(tmp_path: Path) -> None:
    model = clip.create("digits-16", 0)
    blocks = [f"visual.transformer.resblocks.{i}" for i in range(3)]
    two, all_heads = torch.arange(128) < 100, torch.ones(2, dtype=torch.bool)
    structure.cut_encoder(model, {blocks[0]: (all_heads, two)})
    assert model.structure == {blocks[0]: {"heads": 2, "neurons": 100}}, "one block of three has another width"
    assert structure.open_clip_says(model).startswith("no: 1 blocks")
    structure.cut_encoder(model, dict.fromkeys(blocks[1:], (all_heads, two)))
    assert model.structure == {}
    assert model.config["vision_cfg"]["mlp_ratio"] == 100 / 64
    assert structure.open_clip_says(model) == "yes"
    structure.cut_encoder(model, {blocks[1]: (torch.tensor([True, False]), torch.ones(100, dtype=torch.bool))})
    assert model.structure == {blocks[1]: {"heads": 1, "neurons": 100}}
    clip.save(model, tmp_path / "model", {})
    assert json.loads((tmp_path / "model" / "structure.json").read_text()) == model.structure
    assert clip.load(tmp_path / "model").structure == model.structure


def test_gradients_flow_through_a_cut_block_and_frozen_parameters_stay_frozen() -> None:
    model = clip.create("digits-16", 0)
    clip.freeze(model, "text")
    keep = (torch.tensor([True, False]), torch.arange(128) < 64)
    structure.cut_encoder(model, {"visual.transformer.resblocks.0": keep, "transformer.resblocks.0": keep})
    image, text, _ = model(*batch_of(model).values())
    (image * text).sum().backward()
    named = dict(model.named_parameters())
    assert named["clip.visual.transformer.resblocks.0.attn.in_proj_weight"].grad.abs().sum() > 0  # type: ignore[union-attr]
    assert not any(named[f"clip.transformer.resblocks.0.{leaf}"].requires_grad for leaf in ("attn.in_proj_weight", "mlp.c_fc.bias"))


def test_unknown_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be told apart"):
        structure.parts(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no such block"):
        structure.shape(clip.create("digits-16", 0), {"visual.transformer.resblocks.9": {"heads": 1, "neurons": 1}})
