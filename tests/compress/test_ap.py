"""AP: no pre-activation falls, masks hold through training, rewinding copies, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tests.compress.pairs import batches_of
from torch import nn

from diptych.compress.activation import activations, dead_nodes
from diptych.compress.ap import Config, activate, activated, by_magnitude, official_activate, official_copies, pruned, rewind
from diptych.compress.magnitude import masks_of, prunable
from diptych.core.errors import ConfigError
from diptych.models import clip


def test_no_preactivation_of_a_layer_falls() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, start = (torch.randn(32, 64, generator=generator) for _ in range(2))
    input_NI = torch.rand(1000, 64, generator=generator)
    alive = {"w": torch.ones_like(weight, dtype=torch.bool)}
    masks = activate({"w": weight}, {"w": start}, alive, 100)
    assert int((~masks["w"]).sum()) == 100
    assert bool((weight[~masks["w"]] < 0).all())
    moved = (weight - start).abs()
    assert float(moved[~masks["w"]].max()) <= float(moved[masks["w"] & (weight < 0)].min())
    official, limit = official_activate({"w": weight}, {"w": start}, alive, 99, {"w": 1})
    assert torch.equal(official["w"], masks["w"])
    assert limit == float(moved[~masks["w"]].max())
    before, after = input_NI @ weight.T, input_NI @ (weight * masks["w"]).T
    assert bool((after >= before - 1e-5).all())
    assert dead_nodes([after.relu()]).dynamic < dead_nodes([before.relu()]).dynamic


def test_what_is_pruned_already_neither_counts_nor_comes_back() -> None:
    weights = {"w": torch.tensor([0.1, 0.0, -0.2, 0.3, 0.4])}
    before = {"w": torch.tensor([True, False, True, True, True])}
    after, limit = by_magnitude(weights, before, 50)
    assert limit == pytest.approx(0.25)  # of 0.1, 0.2, 0.3, 0.4
    assert after["w"].tolist() == [False, False, False, True, True]
    assert torch.equal(activate(weights, weights, after, 3)["w"], after["w"])  # no negative one is left


def test_of_equal_movements_no_more_go_than_asked() -> None:
    weights = {"a": -torch.ones(4), "b": -torch.ones(4)}
    alive = {name: torch.ones(4, dtype=torch.bool) for name in weights}
    masks = activate(weights, weights, alive, 5)
    assert [mask.tolist() for mask in masks.values()] == [[False] * 4, [False, True, True, True]]


def test_ap_takes_its_share_of_the_round() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(20, 25, generator=generator) for name in ("a", "b")}
    start = {name: torch.randn(20, 25, generator=generator) for name in weights}
    before = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    after = pruned(weights, start, before, 18, 2)
    assert sum(int((~mask).sum()) for mask in after.values()) == 180 + 20
    only_a = pruned(weights, start, before, 18, 2, frozenset({"a"}))
    magnitude, _ = by_magnitude(weights, before, 18)
    assert torch.equal(only_a["b"], magnitude["b"])


def test_the_published_count_goes_by_the_order_of_parameters() -> None:
    assert official_copies(["a.weight", "a.bias", "n.weight", "n.bias", "b.weight"], ["a.weight", "n.weight", "b.weight"]) == {
        "a.weight": 2,
        "n.weight": 2,
        "b.weight": 1,
    }


def test_dead_nodes_of_a_batch() -> None:
    outputs = [torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[[2.0]], [[0.0]]])]
    rates = dead_nodes(outputs)
    assert (rates.dynamic, rates.static) == (4 / 6, 1 / 3)
    assert dead_nodes(outputs, least=1.0).dynamic == 5 / 6


def test_activations_are_seen_in_the_order_of_their_calls() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.GELU())
    assert [output.shape[1] for output in activations(net, lambda: net(torch.ones(4, 2)))] == [3, 1]


def test_rewinding_copies() -> None:
    net = nn.Linear(2, 2)
    first = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        net.weight.add_(1.0)
        net.bias.add_(1.0)
    rewind(net, first, {"weight": torch.tensor([[True, False], [True, True]])})
    assert net.weight[0, 1] == 0.0
    with torch.no_grad():
        net.bias.add_(5.0)
    assert not torch.equal(net.bias, first["bias"])


@pytest.mark.parametrize("name", ["vit-nano-64", "rn-nano-64"])
def test_rounds_prune_what_they_say_and_training_keeps_the_masks(name: str) -> None:
    model = clip.create(name, 0)
    compressor = Config(rounds=2, steps=5, calibration_batch=4).build()
    compressor.compress(model, batches_of(model, 1))
    masks, weights = masks_of(model), dict(prunable(model))
    alive = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert alive == pytest.approx(0.64, abs=0.01)
    assert all(not bool(weights[name][~mask].any()) for name, mask in masks.items())
    rounds = compressor.report(model)["rounds"]
    assert [round(each["alive"], 2) for each in rounds] == [0.8, 0.64, 0.64]
    assert all(0 <= each["image_dynamic_dnr"] <= 1 for each in rounds)


def test_only_weights_in_front_of_an_activation_take_part_where_it_has_no_zeros() -> None:
    model = clip.create("vit-nano-64", 0)
    weights = dict(prunable(model))
    own = activated(model, weights)
    assert own
    assert all(name.endswith("mlp.c_fc.weight") for name in own)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert activated(net, {"0.weight": net[0].weight}) == {"0.weight"}


def test_a_part_larger_than_the_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match="ap_percent is a part of percent"):
        Config.parse({"method": "ap", "percent": 5.0, "ap_percent": 5.0})
