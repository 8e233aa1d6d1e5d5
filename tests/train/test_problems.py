"""Problems with a known answer: gradients, figures, the loop that solves them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from diptych.core.errors import ConfigError
from diptych.train.problems import logistic, one_dimensional, planted_ranks, prototypes, quadratic
from diptych.train.problems.problem import Problem, solve
from diptych.train.schedule import ScheduleConfig

CONSTANT = ScheduleConfig(kind="constant", warmup=0).build


def sgd(lr: float) -> Any:
    return lambda groups: torch.optim.SGD([{"params": group["params"]} for group in groups], lr=lr)


class Plus:
    """Two samples more after every update."""

    def next(self, statistics: Mapping[str, float]) -> int:
        return int(statistics["batch_size"]) + 2


@pytest.mark.parametrize("config", [quadratic.Config(), prototypes.Config(), logistic.Config(), planted_ranks.Config(lora=2)])
def test_a_seed_names_everything(config: Any) -> None:
    def losses(seed: int) -> list[float]:
        return solve(config.build(), seed, 4, CONSTANT, sgd(1e-4)).losses

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_the_bowl_shrinks_as_its_curvatures_say() -> None:
    """Without noise, gradient descent multiplies each coordinate by 1 - lr a."""
    problem = quadratic.Config(curvature_from=0.01, curvature_to=1.0, coordinates=3, noise=0.0).build()
    found = solve(problem, 0, 5, CONSTANT, sgd(0.5)).figures
    expected = sum((1 - 0.5 * a) ** 10 for a in (0.01, 0.1, 1.0)) / 3
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["log_loss"] == pytest.approx(math.log10(expected), rel=1e-5)


def test_the_bowls_noise_has_the_size_that_was_asked_for() -> None:
    problem = quadratic.Config(coordinates=2000, noise=0.3, curvature_from=4.0, curvature_to=4.0001).build()
    problem.start(0)
    assert float(problem.batch(0, 1)["noise"].std()) == pytest.approx(0.6, rel=0.05)


@pytest.mark.parametrize(("function", "slopes"), [
    ("two-valleys", {-1.0: -1.4, 0.0: 0.6, 1.0: 1.6}),
    ("cliff", {-0.95: -40.0, 0.5: 0.5 * math.cos(4) + math.sin(4) + 0.75}),
    ("steps", {-1.0: -2.0, -0.45: 1.0, -0.1: -0.875, 0.1: 0.875, 0.45: -1.0, 0.6: 1.2}),
])  # fmt: skip
def test_slopes(function: str, slopes: Mapping[float, float]) -> None:
    for x, slope in slopes.items():
        assert one_dimensional.SLOPES[function](x) == pytest.approx(slope)


def test_how_far_a_way_went_is_kept() -> None:
    found = solve(one_dimensional.Config(function="two-valleys").build(), 0, 2, CONSTANT, sgd(1.0)).figures
    assert found["furthest"] == pytest.approx(0.4)  # -1 + 1.4
    assert found["end"] == pytest.approx(0.0)


def test_the_length_of_normalised_weights_does_not_matter() -> None:
    problem = prototypes.Config().build()
    problem.start(0)
    batch = problem.batch(0, 8)
    loss = problem.losses(batch, 0)["loss"]
    loss.backward()
    for layer in problem.layers:
        assert layer.grad is not None
        assert float((layer.grad * layer).sum(dim=1).abs().max()) < 1e-6
        layer.data *= 3.0
    torch.testing.assert_close(problem.losses(batch, 0)["loss"], loss)
    assert problem.figures()["growth"] == pytest.approx(2.0)
    plain = prototypes.Config(scale_invariant=False).build()
    plain.start(0)
    before = plain.losses(batch, 0)["loss"]
    plain.layers[0].data *= 3.0
    assert not torch.allclose(plain.losses(batch, 0)["loss"], before)


def test_the_noise_of_single_samples_is_autograds() -> None:
    problem = logistic.Config(samples=50, features=4).build()
    problem.start(0)
    batch = problem.batch(0, 6)
    grads = []
    for row in range(6):
        (grad,) = torch.autograd.grad(
            problem.losses({name: value[row : row + 1] for name, value in batch.items()}, 0)["loss"], problem.weight
        )
        grads.append(grad)
    every = torch.stack(grads)
    variance, square_norm = problem.noise(batch)
    assert variance == pytest.approx(float(every.var(dim=0).sum()))
    assert square_norm == pytest.approx(float(every.mean(dim=0).square().sum()))


def test_batches_grow_and_are_counted() -> None:
    config = logistic.Config(samples=40, batch_size=8)
    found = solve(config.build(), 0, 4, CONSTANT, sgd(0.1), Plus).figures
    assert (found["samples"], found["batch_end"], found["shrinks"]) == (8 + 10 + 12 + 14, 16.0, 0.0)
    assert solve(config.build(), 0, 4, CONSTANT, sgd(0.1)).figures["samples"] == 32
    with pytest.raises(ConfigError, match="could grow"):
        solve(quadratic.Config().build(), 0, 4, CONSTANT, sgd(0.1), Plus)


def test_planted_ranks_are_what_has_to_be_learnt() -> None:
    problem: Problem = planted_ranks.Config(side=6, ranks=(2, 0)).build()
    problem.start(0)
    assert isinstance(problem, planted_ranks.PlantedRanks)
    assert torch.linalg.matrix_rank(problem.target_LMM - problem.start_LMM, atol=1e-9).tolist() == [2, 0]
    start = problem.figures()
    assert (start["ranks"], start["ranks_planted"]) == (0.0, 0.0)
    for each, target in zip(problem.maps, problem.target_LMM, strict=True):
        each.data.copy_(target)
    assert problem.figures() == pytest.approx({"error": 0.0, "ranks": 2.0, "ranks_planted": 2.0})


def test_a_divergence_is_told_by_its_figures() -> None:
    found = solve(quadratic.Config().build(), 0, 400, CONSTANT, sgd(1e3)).figures
    assert found["finite"] == 0.0
    assert found["loss"] == math.inf
