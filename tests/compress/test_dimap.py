"""DIMAP and the LAMP score: what belongs to a module, invariance to the scale of a layer, exact counts, refusals."""

from __future__ import annotations

import pytest
import torch
from tests.compress.pairs import timm_model
from torch import nn

from diptych.compress import lamp
from diptych.compress.dimap import Config, masks, module_of
from diptych.compress.magnitude import largest, masks_of, prunable
from diptych.core.errors import ConfigError
from diptych.models import clip


@pytest.fixture
def model() -> clip.DualEncoder:
    return clip.create("vit-nano-64", 0)


def test_scores_rise_with_size_and_end_at_one() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.0], [2.0, 1.0, -4.0]])
    assert torch.allclose(
        lamp.scores(weight), torch.tensor([[9 / 25, 1 / 31, 0], [4 / 29, 1 / 30, 1]], dtype=torch.float64)
    )  # of the two ones the earlier counts as the smaller
    assert lamp.scores(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_scores_of_a_big_layer_stay_exact_at_the_top() -> None:
    weight = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    score, order = lamp.scores(weight), weight.abs().argsort(stable=True)
    assert float(score.max()) == 1.0
    assert bool((score[order].diff() >= 0).all())


def test_a_threshold_is_the_kth_smallest_of_all_layers_wherever_they_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    scored = {str(size): torch.rand(size, generator=generator, dtype=torch.float64) ** 9 for size in (1, 7, 400, 33)}
    scored["zeros"] = torch.zeros(5, dtype=torch.float64)
    scored["narrow"] = 0.5 + torch.rand(300, generator=generator, dtype=torch.float64) / 1e6
    together = torch.cat(list(scored.values()))
    made: list[str] = []
    for count in (1, 5, 6, 300, 500, len(together)):
        assert lamp.threshold(scored, count) == float(together.kthvalue(count).values)
    lamp.threshold_of(lambda name: made.append(name) or scored[name], list(scored), 9)
    assert made == [*scored, *scored], "no more than a layer at a time"
    assert lamp.threshold(scored, 0) == -torch.inf


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("clip.visual.transformer.resblocks.0.attn.in_proj_weight", "qkv"),
        ("clip.transformer.resblocks.11.attn.out_proj.weight", "prj"),
        ("clip.transformer.resblocks.0.mlp.c_fc.weight", "mlp"),
        ("clip.visual.trunk.layers.1.blocks.0.attn.qkv.weight", "qkv"),
        ("clip.visual.trunk.layers.1.blocks.0.mlp.fc2.weight", "mlp"),
        ("clip.visual.trunk.layers.1.downsample.reduction.weight", "aux"),
        ("clip.visual.trunk.patch_embed.proj.weight", "aux"),
        ("clip.visual.head.proj.weight", "aux"),
        ("clip.text_projection", "aux"),
        ("clip.text.transformer.encoder.layer.3.attention.self.key.weight", "qkv"),
        ("clip.text.transformer.encoder.layer.3.attention.output.dense.weight", "prj"),
        ("clip.text.transformer.encoder.layer.3.intermediate.dense.weight", "mlp"),
        ("clip.text.transformer.encoder.layer.3.output.dense.weight", "mlp"),
        ("clip.visual.transformer.resblocks.0.attn.in_proj_bias", "aux"),
    ],
)
def test_modules_are_told_by_name(name: str, module: str) -> None:
    assert module_of(name) == module


def test_each_module_of_each_tower_loses_its_share(model: clip.DualEncoder) -> None:
    compressor = Config(ratio=0.4).build()
    compressor.compress(model, [])
    report = compressor.report(model)
    weights = dict(prunable(model))
    assert report["modules"]["aux"] == 0.0
    for tower in ("image", "text"):
        for module in ("qkv", "prj", "mlp"):
            group = [weight for name, weight in weights.items() if module_of(name) == module and (".visual." in name) == (tower == "image")]
            zeros, total = sum(int((weight == 0).sum()) for weight in group), sum(weight.numel() for weight in group)
            assert zeros == round(0.4 * total)
    assert set(masks_of(model)) == {name for name in weights if module_of(name) != "aux"}


def test_a_factor_on_a_layer_changes_no_mask(model: clip.DualEncoder) -> None:
    weights = {name: weight.detach() for name, weight in prunable(model, "image") if module_of(name) == "qkv"}
    scaled = {name: weight * 2.0 ** (index - 1) for index, (name, weight) in enumerate(weights.items())}
    plain, other = masks(weights, 0.6), masks(scaled, 0.6)
    assert all(torch.equal(plain[name], other[name]) for name in weights)
    kept = [float(mask.float().mean()) for mask in plain.values()]
    assert max(kept) - min(kept) > 1e-4  # the threshold is the module's, not the layer's


def test_one_module_and_joint_towers_differ_from_the_default(model: clip.DualEncoder) -> None:
    def zeros(**settings: object) -> dict[str, int]:
        other = clip.create("vit-nano-64", 0)
        Config.parse({"method": "dimap", "ratio": 0.5, **settings}).build().compress(other, [])
        return {name: int((weight == 0).sum()) for name, weight in prunable(other)}

    default = zeros()
    assert zeros(module="model") != default
    assert zeros(jointly=True) != default
    assert all(count == 0 for name, count in zeros(towers="text").items() if ".visual." in name)


def test_timm_towers_are_reached() -> None:
    model = timm_model()
    Config(ratio=0.5, towers="image").build().compress(model, [])
    pruned = {name.split("blocks.0.")[1] for name in masks_of(model) if "blocks.0." in name}
    assert pruned == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def test_one_threshold_a_matrix_is_uniform_magnitude_pruning() -> None:
    model = clip.create("shapes-swin-16", 0)
    before = {name: weight.detach().clone() for name, weight in prunable(model, "image")}
    Config(ratio=0.6, towers="image", module="layer").build().compress(model, [])
    kept = masks_of(model)
    assert len(kept) == 24
    for name, mask in kept.items():
        assert torch.equal(mask, largest(before[name].abs(), 0.6)), name


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="No weights belong to a module"):
        Config().build().compress(nn.Sequential(nn.Conv2d(3, 4, 3)), [])
