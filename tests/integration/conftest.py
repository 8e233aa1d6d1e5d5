"""Projects on which real commands are started, stopped and killed, and an uninterrupted run to compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.commands import Command, Results
from tests.projects import make_project

POOL: dict[str, Any] = {
    "name": "pool",
    "seed": 0,
    "data": {"source": "digits", "pool": "zipf-junk", "rows": 10_000},
    "curate": [{"method": "metaclip", "threshold": 1500}],
    "prune": [{"method": "semantic-dedup", "epsilon": 0.003, "clusters": 4}, {"method": "concept-pruning", "keep": 0.9, "clusters": 4}],
    "caption": [{"method": "laclip", "rewriter": "lexicon", "copies": 1}],
    "train": {
        "model": "digits-16",
        "objective": {"method": "clip"},
        "optimizer": {"method": "adamw", "lr": 1.0e-3},
        "steps": 150,
        "batch_size": 16,
        "log_every": 1,
        "checkpoint_every_steps": 10,
        "workers": 1,
    },
    "compress": [],
    "evaluate": {"benchmarks": [{"method": "zero-shot"}], "sweep": None},
}
"""Six tables of pairs and a training of some seconds: enough to be in the middle of something."""

Diptych = Callable[..., Command]


@pytest.fixture
def diptych() -> Iterator[Diptych]:
    """Starts `diptych …` in a project; whatever is left of it afterwards is killed."""
    started: list[Command] = []

    def start(project: Path, *arguments: str, **options: Any) -> Command:
        started.append(Command(arguments, project, **options))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which `pool` has run in process, uninterrupted, to its end. Not to be changed: copy it."""
    project = make_project(tmp_path_factory.mktemp("reference") / "project", POOL)
    Command(("run", "pool", "--in-process"), project).done().leaves_nobody()
    return project


@pytest.fixture(scope="session")
def expected(reference: Path) -> Results:
    """What every run of `pool` must give."""
    return Results.of(reference / "runs" / "pool")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A project in which `pool` has never run."""
    return make_project(tmp_path / "project", POOL)


@pytest.fixture
def before_training(reference: Path, tmp_path: Path) -> Path:
    """A project in which `pool` has run up to training."""
    project = copied(reference, tmp_path / "project")
    for phase in ("train", "compress", "evaluate"):
        shutil.rmtree(project / "runs" / "pool" / phase)
        (project / "runs" / "pool" / ".records" / f"{phase}.json").unlink()
    forget(project, "train", "compress", "evaluate")
    return project


def copied(project: Path, to: Path) -> Path:
    """A project's copy."""
    shutil.copytree(project, to, symlinks=True)
    return to


def forget(project: Path, *phases: str) -> None:
    """Takes phases out of DVC's memory."""
    from diptych.workflow import yaml

    lock = yaml.read(project / "dvc.lock")
    lock["stages"] = {name: stage for name, stage in lock["stages"].items() if name.partition("@")[0] not in phases}
    (project / "dvc.lock").write_text(yaml.dump(lock))
