"""Figures of the embeddings, and runs that end because they cannot recover; the checkpoint that the error names is sound."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from _ranks import run_ranks
from fit_tiny import fit, start, weights
from torch import Tensor
from torch.nn.functional import normalize

from diptych.core.errors import DataError
from diptych.train.health import Watch, measure

N, D = 64, 8


def features(spread: float = 1.0, dimensions: int = D) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centre = normalize(torch.ones(D), dim=0)
    cloud = torch.randn(N, D, generator=generator) * (torch.arange(D) < dimensions)
    image = normalize(centre * (1 - spread) + spread * cloud)
    return {"image": image, "text": normalize(image + 0.1 * torch.randn(N, D, generator=generator))}


def test_the_figures_are_those_of_their_definitions() -> None:
    found = features()
    figures = measure(found).figures
    assert set(figures) == {"image_rank", "text_rank", "image_uniformity", "text_uniformity", "alignment"}
    image, text = (found[tower].double().numpy() for tower in ("image", "text"))
    eigenvalues = np.linalg.eigvalsh(np.cov(image.T, bias=True))
    assert figures["image_rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-4)
    distances = [np.sum((left - right) ** 2) for i, left in enumerate(image) for right in image[i + 1 :]]
    assert figures["image_uniformity"] == pytest.approx(math.log(np.mean(np.exp(-2 * np.array(distances)))), rel=1e-4)
    assert figures["alignment"] == pytest.approx(np.square(image - text).sum(axis=1).mean(), rel=1e-5)
    assert measure(found).spread["image"] == pytest.approx(image.var(axis=0).sum(), rel=1e-5)


def test_rank_counts_the_directions_that_are_used() -> None:
    ranks = [measure(features(dimensions=used)).figures["image_rank"] for used in (1, 3, 8)]
    assert ranks[0] < 1.5 < ranks[1] < 3.5 < ranks[2] <= 8


def test_few_pairs_say_nothing() -> None:
    assert measure({tower: feature[:7] for tower, feature in features().items()}).figures == {}
    assert measure({}).figures == {}


def on_a_rank(rank: int, world: int) -> tuple[dict[str, float], dict[str, float]]:
    own = {tower: feature.chunk(world)[rank] for tower, feature in features().items()}
    look = measure(own, world)
    return look.figures, look.spread


def test_ranks_agree_and_see_the_whole_batch() -> None:
    (first, first_spread), (second, second_spread) = run_ranks(2, on_a_rank)
    assert first == second
    assert first_spread == second_spread
    whole = measure(features())
    for name in ("image_rank", "text_rank", "alignment"):
        assert first[name] == pytest.approx(whole.figures[name], rel=1e-4)
    assert first_spread == pytest.approx(whole.spread, rel=1e-5)
    assert first["image_uniformity"] == pytest.approx(whole.figures["image_uniformity"], abs=0.2), "pairs of one rank"


def collapse(run: object, state: object, at: int) -> None:
    """From update `at` on, the image tower says the same of every picture."""
    after_step = run.task.after_step  # type: ignore[attr-defined]

    def broken() -> None:
        after_step()
        if state.step + 1 >= at:  # type: ignore[attr-defined]
            with torch.no_grad():
                state.model.image[-1].weight.zero_()  # type: ignore[attr-defined]

    run.task.after_step = broken  # type: ignore[attr-defined]


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_a_collapse_stops_the_run_and_names_a_checkpoint_from_before_it(tmp_path: Path, every: int) -> None:
    run, state = start(tmp_path, log_every=every, checkpoint_every_steps=2)
    collapse(run, state, at=7)
    with pytest.raises(DataError, match="image embeddings have collapsed") as error:
        fit(run, state)
    assert "step-000000006" in str(error.value), "the weights after update 7 are the first that are broken"
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[-1] == "step-000000006"
    run, state = start(tmp_path, log_every=every, checkpoint_every_steps=2)
    assert state.step == 6
    fit(run, state)
    assert state.step == run.total_steps
    assert weights(state)["image.4.weight"].abs().sum() > 0


def test_features_that_part_again_do_not_end_a_run_and_those_that_stay_together_do(tmp_path: Path) -> None:
    run, state = start(tmp_path, log_every=100)
    watch = Watch(state, run.checkpoints)
    state.step = 10
    for spread in (1.0, 0.005, 0.005, 1.0, 0.005, 0.005):
        watch.look(features(spread))
    assert state.healthy_step == 10
    state.step = 20
    with pytest.raises(DataError, match="have collapsed"):
        watch.look(features(0.005))
    assert state.healthy_step == 10


def test_a_gradient_that_is_not_finite_names_a_checkpoint_from_before_it(tmp_path: Path) -> None:
    """The checkpoint of step 4 was written with weights that give no finite loss: it must not be the one that is named."""
    run, state = start(tmp_path, log_every=100)
    after_step = run.task.after_step

    def broken() -> None:
        after_step()
        if state.step + 1 >= 4:
            with torch.no_grad():
                state.model.words.weight.fill_(float("inf"))

    run.task.after_step = broken  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"Training diverged.*step-000000002"):
        fit(run, state)
    assert start(tmp_path)[1].step == 2


def test_the_log_shows_the_figures(tmp_path: Path) -> None:
    run, state = start(tmp_path)
    record = fit(run, state)
    assert record["image_rank"] >= 1
    assert record["image_uniformity"] < 0
    assert 0 < record["alignment"] < 4
