"""Worst-case sharpness: known maxima, the ball, and what must hold of any network."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from diptych.adapt.sharpness import Attack, Batch, checkpoints, normalised, onto_ball, onto_ellipsoid, predictor, worst_case_sharpness
from diptych.core.errors import DataError

BALLS = list(itertools.product(("linf", "l2"), (False, True)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 3)).double()


def data() -> list[Batch]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(48, 5, generator=rng, dtype=torch.float64)
    return list(zip(x.split(24), (x[:, :3].argmax(1)).split(24), strict=True))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("norm", "adaptive"), BALLS)
def test_a_linear_loss_rises_by_the_dual_norm(norm: str, adaptive: bool) -> None:
    """Where the loss is <c, w>, the worst rise is rho times the dual norm of c in the ball's units, which the ascent must reach.

    In an ellipsoid it falls a little short: the projection is Euclidean, and moves points along the short axes least.
    """
    w, c, rho = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([1.0, 3.0, -2.0]).double(), 0.1
    unit = w.abs() if adaptive else torch.ones(3).double()
    expected = rho * float((unit * c).abs().sum() if norm == "linf" else (unit * c).norm())
    found = worst_case_sharpness(
        lambda state, inputs: (state["w"] * inputs).sum(dim=1, keepdim=True),
        {"w": w},
        [(c[None], torch.zeros(1, dtype=torch.int64))],
        Attack(rho, norm, adaptive, steps=60, normalise=False),
        loss=lambda logit_NC, label_N: logit_NC[:, 0],
    )
    assert found.loss == pytest.approx(expected, rel=6e-2 if (norm, adaptive) == ("l2", True) else 1e-3)
    assert found.loss <= expected * (1 + 1e-9)


@pytest.mark.parametrize(("norm", "adaptive"), BALLS)
def test_sharpness_is_never_negative_and_grows_with_the_ball(norm: str, adaptive: bool) -> None:
    model = network()
    rises = [
        worst_case_sharpness(predictor(model), weights(model), data(), Attack(rho, norm, adaptive)).loss for rho in (0, 0.005, 0.02, 0.1)
    ]
    assert rises[0] == pytest.approx(0, abs=1e-12)
    assert all(left < right for left, right in itertools.pairwise(rises))


def test_one_layer_alone_cannot_do_more_than_the_whole_model() -> None:
    model = network()
    attack = Attack(0.05)
    whole = worst_case_sharpness(predictor(model), weights(model), data(), attack).loss
    for layer in (["0.weight", "0.bias"], ["3.weight", "3.bias"]):
        assert 0 < worst_case_sharpness(predictor(model), weights(model), data(), attack, layer).loss <= 1.1 * whole


def test_twenty_steps_find_more_than_one() -> None:
    model = network()
    rises = [worst_case_sharpness(predictor(model), weights(model), data(), Attack(0.1, steps=steps)).loss for steps in (1, 20)]
    assert rises[0] < rises[1]


def test_normalised_logits_do_not_see_their_scale_and_plain_ones_do() -> None:
    model = network()
    scaled = weights(model) | {name: 3 * tensor for name, tensor in weights(model).items() if name.startswith("3.")}
    for normalise, same in ((True, True), (False, False)):
        attack = Attack(0.01, normalise=normalise)
        left, right = (worst_case_sharpness(predictor(model), state, data(), attack).loss for state in (weights(model), scaled))
        assert (left == pytest.approx(right, rel=1e-6)) is same
    logits = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert torch.allclose(normalised(logits)[0].norm(), torch.tensor(1.0))
    assert torch.equal(normalised(logits)[1], torch.zeros(3))


def test_it_runs_without_dropout_leaves_the_model_alone_and_repeats_itself() -> None:
    model = network().train()
    before = weights(model)
    found = [worst_case_sharpness(predictor(model), before, data(), Attack(0.05)) for _ in range(2)]
    assert torch.equal(found[0].rise_B, found[1].rise_B)
    assert len(found[0].rise_B) == len(data())
    assert model.training
    assert all(torch.equal(parameter.detach(), before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_zero_weights_do_not_move_in_an_adaptive_ball() -> None:
    model = network()
    pruned = weights(model) | {"0.weight": torch.zeros(12, 5, dtype=torch.float64)}
    for norm in ("linf", "l2"):
        found = worst_case_sharpness(predictor(model), pruned, data(), Attack(0.1, norm), ["0.weight"])
        assert found.loss == 0


def test_weights_that_the_loss_does_not_see_have_no_sharpness() -> None:
    model = network()
    state = weights(model) | {"unused": torch.ones(3, dtype=torch.float64)}
    predict = predictor(model)
    found = worst_case_sharpness(
        lambda w, x: predict({n: t for n, t in w.items() if n != "unused"}, x), state, data(), Attack(0.1), ["unused"]
    )
    assert found.loss == 0


def test_names_and_batches_must_be_there() -> None:
    model = network()
    for names in (["no.such"], []):
        with pytest.raises(DataError, match="no such weights"):
            worst_case_sharpness(predictor(model), weights(model), data(), Attack(0.1), names)
    with pytest.raises(DataError, match="needs data"):
        worst_case_sharpness(predictor(model), weights(model), [], Attack(0.1))


def test_the_nearest_point_of_an_ellipsoid() -> None:
    """Against the conditions of the optimum: on the surface, and the way back is along the surface's normal."""
    axis, point = torch.tensor([2.0, 0.5, 0.0, 1.0]).double(), torch.tensor([3.0, -2.0, 7.0, 0.1]).double()
    found = onto_ellipsoid(point, axis, 0.8)
    live = axis > 0
    assert float((found[live] / axis[live]).norm()) == pytest.approx(0.8, rel=1e-9)
    assert found[2] == 0
    multiplier = (point - found)[live] / (found[live] / axis[live] ** 2)
    assert torch.allclose(multiplier, multiplier[0].expand(3), rtol=1e-6)
    assert torch.equal(onto_ellipsoid(found / 2, axis, 0.8), found / 2)
    assert not onto_ellipsoid(point, axis, 0.0).any()


def test_other_balls() -> None:
    point, unit = torch.tensor([3.0, -4.0]), torch.ones(2)
    assert onto_ball(point, 2 * unit, Attack(0.5)).tolist() == [1.0, -1.0]
    assert torch.allclose(onto_ball(point, unit, Attack(1.0, "l2", adaptive=False)), torch.tensor([0.6, -0.8]))


def test_checkpoints_come_closer_and_end_with_the_run() -> None:
    assert checkpoints(20) == [5, 9, 12, 15, 16, 18, 19, 20]
    for steps in (1, 2, 7, 100):
        found = checkpoints(steps)
        assert found == sorted(set(found))
        assert found[0] == math.ceil(0.22 * steps)
        assert found[-1] <= steps
