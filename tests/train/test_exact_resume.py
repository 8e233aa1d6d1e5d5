"""2n steps == n + resume + n, to the bit and in the middle of an epoch, for every objective and every optimizer of the catalogue.

A new row is picked up by itself, with the defaults of its `Config`. One that needs more than a small labelled data set to start says so in a
`ConfigError` or `DataError`, and is listed as skipped with that sentence; give it what it needs in `SETTINGS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_run import weights
from tiny import write_dataset

from diptych.core import catalogue
from diptych.core.errors import DiptychError
from diptych.train.config import TrainConfig
from diptych.train.run import train

N = 4
LOOP = {"steps": 2 * N, "batch_size": 8, "log_every": 2, "augment": {"crop_scale": [0.6, 1.0]}, "checkpoint_every_s": 1e6}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shrinkmatch": ({"threshold": 0.12}, {"labelled": 0.25, "freeze": "text"}),
    "adawac": ({"eta_w": 4.0}, {"accumulate": 2, "ema": 0.9}),
}
"""Parameters of a method, and settings of the loop, that let it do its work on forty drawings."""
MUST_RUN = {"clip", "shrinkmatch", "adawac", "adamw", "adamp"}


def rows(phase: str) -> list[str]:
    return [row.name for row in catalogue.rows().values() if row.phase == phase]


@pytest.fixture(scope="module")
def pairs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty drawings, most of them with a named label: five batches an epoch."""
    root = tmp_path_factory.mktemp("pairs") / "data"
    label = pl.when(pl.col("label") < 3).then("label").when(pl.col("label") > 7).then(4).cast(pl.Int64)
    write_dataset(root, rows=40, extra={"label": label, "label_name": pl.concat_str(pl.lit("thing "), label.cast(pl.String))})
    return root


def built(phase: str, name: str) -> Any:
    settings = SETTINGS.get(name, ({}, {}))[0]
    return catalogue.config_class(catalogue.find(name, phase)).parse({"method": name, **settings})


def finished(root: Path, folder: Path, objective: str, optimizer: str, stop_at: int | None) -> bool:
    config = TrainConfig.parse({**LOOP, **SETTINGS.get(objective, ({}, {}))[1], **SETTINGS.get(optimizer, ({}, {}))[1]})
    steps = iter(range(1, 100))
    summary = train(
        root, "train", config, "vit-micro-40", built("objective", objective).build, built("optimizer", optimizer).build,
        folder / "model", folder / "scratch", 0, should_stop=lambda: next(steps) == stop_at,
    )  # fmt: skip
    return summary.finished


def left(folder: Path) -> dict[str, Any]:
    """All that a run leaves: the model, and the state of the objective and of the optimizer at its end."""
    newest = max((folder / "scratch" / "checkpoints").glob("step-*"))
    parts = {name: torch.load(newest / f"{name}.pt", weights_only=True) for name in ("objective", "optimizer")}
    return {"model": weights(folder), **parts}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, theirs, equal_nan=True)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


CASES = [*((name, "adamw") for name in rows("objective")), *(("clip", name) for name in rows("optimizer") if name != "adamw")]


@pytest.mark.parametrize(("objective", "optimizer"), CASES, ids=[one if two == "adamw" else two for one, two in CASES])
def test_stopping_half_way_changes_no_bit(pairs_root: Path, tmp_path: Path, objective: str, optimizer: str) -> None:
    try:
        assert finished(pairs_root, tmp_path / "straight", objective, optimizer, None)
    except DiptychError as error:
        assert not {objective, optimizer} <= MUST_RUN
        pytest.skip(f"{objective} with {optimizer} does not run on these pairs: {error}")
    assert not finished(pairs_root, tmp_path / "stopped", objective, optimizer, N)
    assert finished(pairs_root, tmp_path / "stopped", objective, optimizer, None)
    ours, theirs = left(tmp_path / "stopped"), left(tmp_path / "straight")
    for part, value in theirs.items():
        assert same(ours[part], value), part
    assert len(theirs["optimizer"]["state"]) > 0


def test_the_comparison_can_tell_two_runs_apart(pairs_root: Path, tmp_path: Path) -> None:
    for optimizer in ("adamw", "adamp"):
        finished(pairs_root, tmp_path / optimizer, "clip", optimizer, None)
    assert not same(left(tmp_path / "adamw"), left(tmp_path / "adamp"))
