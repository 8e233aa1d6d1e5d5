from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fit_tiny import fit, start

from diptych.core.errors import ConfigError
from diptych.train.best import KeepBest, compete, follow

BEST = {"keep_best": {"metric": "loss", "smoothing": 0.5}, "log_every": 1, "checkpoint_every_steps": 2}


def test_the_running_mean_is_without_bias_and_the_best_step_is_noted() -> None:
    best: dict[str, float] = {}
    keep, chosen = KeepBest(smoothing=0.5), []
    for step, loss in enumerate((4.0, 2.0, 1.0, 3.0, 0.0), start=1):
        follow(best, {"loss": loss}, keep)
        if compete(best, step, keep):
            chosen.append(step)
    means = [4.0, 8 / 3, 12 / 7, 2.4, 1.161]
    assert chosen == [1, 2, 3, 5]
    assert best["value"] == pytest.approx(means[4], rel=1e-3)
    assert best["step"] == 5
    high: dict[str, float] = {}
    for step, accuracy in enumerate((0.1, 0.5, 0.2), start=1):
        follow(high, {"accuracy": accuracy}, KeepBest(metric="accuracy", mode="max", smoothing=0))
        compete(high, step, KeepBest(metric="accuracy", mode="max", smoothing=0))
    assert high["step"] == 2


def test_a_figure_that_the_log_lacks_is_refused_with_the_nearest(tmp_path: Path) -> None:
    run, state = start(tmp_path, keep_best={"metric": "acuracy"})
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        fit(run, state)


def spoilt(run: Any, state: Any, after: int) -> None:
    """The losses that are logged get worse from a step on."""
    losses = run.task.losses

    def worse(batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        found = losses(batch, step)
        return {**found, "accuracy": torch.tensor(1.0 if step < after else 0.0)}

    run.task.losses = worse


def test_the_best_checkpoint_outlives_the_newest_two(tmp_path: Path) -> None:
    run, state = start(tmp_path, **{**BEST, "keep_best": {"metric": "accuracy", "mode": "max", "smoothing": 0.5}})
    spoilt(run, state, after=4)
    fit(run, state)
    assert state.best["step"] == 2, "the first of equals"
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000000002", "step-000000010", "step-000000012"]
    assert json.loads((tmp_path / "checkpoints" / "step-000000012" / "state.json").read_text())["best"]["step"] == 2


def test_the_choice_survives_a_stop(tmp_path: Path) -> None:
    run, state = start(tmp_path / "straight", **BEST)
    fit(run, state)
    first, stopped = start(tmp_path / "stopped", **BEST)
    first.should_stop = lambda: stopped.step == 5
    fit(first, stopped)
    again, resumed = start(tmp_path / "stopped", **BEST)
    fit(again, resumed)
    assert resumed.best == state.best


def test_the_model_is_that_of_the_best_checkpoint(tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from test_run import run as train
    from tiny import write_dataset

    root = tmp_path / "data"
    split = pl.when(pl.col("label") == 0).then(pl.lit("val")).otherwise(pl.lit("train"))
    write_dataset(root, rows=40, extra={"split": split})
    changes = {"keep_best": {"metric": "val_loss", "smoothing": 0, "mode": "max"}, "validate_every_steps": 2, "checkpoint_every_steps": 2}
    train(root, tmp_path, changes=changes)
    records = [json.loads(line) for line in (tmp_path / "scratch" / "steps.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["val_loss"] for record in records}
    assert list(losses) == [2, 4, 6]
    lineage = json.loads((tmp_path / "model" / "lineage.json").read_text())
    assert lineage["best"]["step"] == max(losses, key=losses.__getitem__)
    assert lineage["best"]["value"] == losses[lineage["best"]["step"]]
    folder = tmp_path / "scratch" / "checkpoints" / f"step-{lineage['best']['step']:09d}"
    stored = load_file(folder / "model.safetensors")
    model = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    assert all(np.array_equal(stored[f"clip.{name}"], value) for name, value in model.items())


def test_validation_needs_pairs(dataset_root: Path, tmp_path: Path) -> None:
    from test_run import run as train

    with pytest.raises(ConfigError, match="too few pairs to validate"):
        train(dataset_root, tmp_path, changes={"validate_every_steps": 2})
