"""The path report, the ranking of layers, the repair, and the correlation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from diptych.adapt.layers import layers_of
from diptych.adapt.sharpness import Attack, Batch, predictor
from diptych.adapt.sparsify import sparsify
from diptych.adapt.straggler_sharpness import (
    Config,
    along,
    inner_gain,
    instability,
    path_report,
    rank_correlation,
    ranking,
    stragglers,
)
from diptych.core.errors import ConfigError, DataError

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
LAYERS = {"first": ("0.weight", "0.bias"), "last": ("2.weight", "2.bias")}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def state(seed: int) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network(seed).state_dict().items()}


def batches(seed: int) -> list[Batch]:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(zip(x.split(15), x[:, :3].argmax(1).split(15), strict=True))


def test_a_report_is_consistent_with_its_definitions() -> None:
    theta0, theta1 = state(0), state(1)
    report = path_report(predictor(network(2)), theta0, theta1, LAYERS, ALPHAS, batches(0), batches(1), Attack(0.05, steps=5))
    assert report.loss_AN.shape == report.hit_AN.shape == (5, 30)
    for layer in LAYERS:
        assert report.layer_loss[layer][-1] == pytest.approx(report.loss_A[-1])  # every path ends at theta1
    for point, alpha in enumerate(ALPHAS):
        model = network(2)
        model.load_state_dict(along(theta0, theta1, alpha))
        logits = torch.cat([model(x) for x, _ in batches(0)])
        labels = torch.cat([y for _, y in batches(0)])
        assert report.loss_A[point] == pytest.approx(float(nn.functional.cross_entropy(logits, labels).detach()))
        assert report.accuracy_A[point] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        assert all(report.sharpness[layer][point].loss <= 1.1 * report.sharpness["whole"][point].loss for layer in LAYERS)
    assert report.instability == pytest.approx(report.loss_A.max() - (report.loss_A[0] + report.loss_A[-1]) / 2)
    assert set(report.correlations()) <= {"whole", *LAYERS}
    bare = path_report(
        predictor(network(2)),
        theta0,
        theta1,
        LAYERS,
        ALPHAS,
        batches(0),
        batches(1),
        Attack(0.05, steps=1),
        layer_losses=False,
        layer_sharpness=False,
    )
    assert (bare.layer_instability, set(bare.sharpness)) == ({}, {"whole"})


def test_one_layers_path_moves_that_layer_alone() -> None:
    theta0, theta1 = state(0), state(1)
    point = along(theta0, theta1, 0.25, LAYERS["first"])
    assert torch.equal(point["2.weight"], theta1["2.weight"])
    assert torch.allclose(point["0.weight"], 0.75 * theta0["0.weight"] + 0.25 * theta1["0.weight"])


def test_the_barrier_and_the_gain_between_the_ends() -> None:
    assert float(instability(np.array([1.0, 5.0, 2.0]))) == 3.5
    assert float(inner_gain(np.array([0.5, 0.9, 0.7]))) == pytest.approx(0.2)
    assert float(inner_gain(np.array([0.5, 0.6, 0.7]))) == pytest.approx(-0.1)  # the failure
    assert instability(np.array([[1.0, 0.0], [5.0, 0.0], [2.0, 1.0]])).tolist() == [3.5, 0.5]


def test_refreshed_weights_are_the_measured_ones() -> None:
    theta0, theta1 = state(0), state(1)
    arguments = (LAYERS, ALPHAS, batches(0), batches(1), Attack(0.05, steps=1))
    frozen = path_report(predictor(network(2)), theta0, theta1, *arguments, refresh=lambda _: theta1)
    assert np.allclose(frozen.loss_A, frozen.loss_A[-1])
    assert frozen.sharpness["whole"][0].loss == frozen.sharpness["whole"][-1].loss


def test_stragglers_stand_out_by_a_standard_deviation() -> None:
    found = {"a": 0.1, "b": 0.9, "c": 0.1, "d": 0.2}
    assert ranking(found) == ["b", "d", "a", "c"]
    assert stragglers(found) == ["b"]
    assert stragglers(found, top=2) == ["b", "d"]
    assert stragglers({"a": 1.0, "b": 1.0}) == []
    assert stragglers({}) == []


@pytest.mark.parametrize(("target", "ratio"), [("difference", 0.25), ("weights", 0.5), ("difference", 0.0), ("weights", 1.0)])
def test_the_repair_zeroes_an_exact_share_by_tensor(target: str, ratio: float) -> None:
    theta0, theta1 = state(0), state(1)
    found = sparsify(theta0, theta1, LAYERS["first"], ratio, seed=3, target=target)
    goal = theta0["0.weight"] if target == "difference" else torch.zeros(8, 4, dtype=torch.float64)
    gone = found["0.weight"] == goal
    assert int(gone.sum()) == round(32 * ratio)
    assert torch.equal(found["0.weight"][~gone], theta1["0.weight"][~gone])
    assert found["2.weight"] is theta1["2.weight"]


def test_the_repairs_draw_follows_seed_and_name_alone() -> None:
    theta0, theta1 = state(0), state(1)
    one, both = sparsify(theta0, theta1, ["2.weight"], 0.5, 3), sparsify(theta0, theta1, ["0.weight", "2.weight"], 0.5, 3)
    assert torch.equal(one["2.weight"], both["2.weight"])
    assert not torch.equal(one["2.weight"], sparsify(theta0, theta1, ["2.weight"], 0.5, 4)["2.weight"])
    with pytest.raises(DataError, match="other names"):
        sparsify(theta0, theta1, ["no.such"], 0.5, 3)
    with pytest.raises(ConfigError, match="No share"):
        sparsify(theta0, theta1, ["2.weight"], 1.5, 3)


def test_the_correlation_has_an_interval_or_is_none() -> None:
    x, y = [0.1, 0.4, 0.2, 0.9, 0.5, 0.7], [0.2, 0.3, 0.25, 0.1, 0.6, 0.7]
    found = rank_correlation(x, y)
    assert found is not None
    assert found.value == pytest.approx(float(spearmanr(x, y).statistic))
    assert -1 < found.low < found.value < found.high < 1
    perfect = rank_correlation(x, [2 * value for value in x])
    assert perfect is not None
    assert perfect.value == 1
    assert rank_correlation(x[:3], y[:3]) is None
    assert rank_correlation(x, [0.5] * 6) is None


def test_layers_are_blocks_and_what_stands_around_them() -> None:
    names = [
        "visual.class_embedding",
        "visual.proj",
        "visual.conv1.weight",
        "visual.transformer.resblocks.0.ln_1.weight",
        "visual.transformer.resblocks.10.mlp.c_fc.bias",
        "visual.ln_post.weight",
        "head",
        "logit_scale",
    ]
    assert layers_of(names) == {
        "visual.stem": ("visual.class_embedding", "visual.conv1.weight"),
        "visual.projection": ("visual.proj", "visual.ln_post.weight"),
        "visual.transformer.resblocks.0": (names[3],),
        "visual.transformer.resblocks.10": (names[4],),
        "head": ("head", "logit_scale"),
    }
    assert list(layers_of(["visual.trunk.blocks.2.norm1.weight", "visual.layer3.1.bn2.bias", "trunk.patch_embed.proj.weight"])) == [
        "visual.trunk.blocks.2",
        "visual.layer3.1",
        "stem",
    ]
    assert list(layers_of(["visual.attnpool.positional_embedding"])) == ["visual.projection"]


@pytest.mark.parametrize("alphas", [[0.0, 1.0], [0.0, 0.5, 0.9], [0.0, 0.5, 0.5, 1.0], [0.1, 0.5, 1.0]])
def test_a_path_goes_from_end_to_end(alphas: list[float]) -> None:
    with pytest.raises(ConfigError, match="increasing"):
        Config.parse({"method": "straggler-sharpness", "origin": "a", "alphas": alphas})
