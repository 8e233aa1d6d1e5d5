"""An ordinary experiment inside a trial: run in the trial's own process, found again by its key."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from diptych.engine.progress import Progress
from diptych.engine.rungs import interim_models
from diptych.engine.session import Session
from diptych.workflow import phases
from diptych.workflow.project import Project
from diptych.workflow.spec import PHASES, Workflow
from diptych.workflow.store import KeyedStore


class Made(NamedTuple):
    """A setting's model and the pairs that it is measured on, as folders; on the way to a finished training, or finished."""

    model: Path
    dataset: Path
    finished: bool


def run(
    workflow: Workflow, until: str, name: str | None = None, project: Project | None = None
) -> tuple[KeyedStore, dict[str, dict[str, Any]]]:
    """Runs a workflow up to a phase in this process and gives its store and figures. Phases that any run has made are taken over."""
    project = project or Project.find(workflow.path.parent)
    store = KeyedStore(project, workflow, name)
    figures: dict[str, dict[str, Any]] = {}
    with store.locked(wait=True), Session(in_process=True, cores=1) as session:
        for phase in PHASES[: PHASES.index(until) + 1]:
            if not store.state(phase).changed:
                figures[phase] = store.figures(phase)
                continue
            bench = phases.Bench(workflow, store.folder, session, Progress(quiet=True), project.scratch / store.name, project.cache)
            figures[phase] = phases.run(phase, bench)
            store.save(phase, figures[phase])
    return store, figures


def models(workflow: Workflow, rungs: int) -> Iterator[Made]:
    """The model of a setting after each of `rungs` parts of its training.

    With one rung, or when the setting was trained before, only the finished one. Two trials of one setting wait for each other.
    """
    project = Project.find(workflow.path.parent)
    store = KeyedStore(project, workflow)
    scratch = project.scratch / store.name
    with _alone(project.scratch / f"{store.name}.lock"):
        try:
            store, _ = run(workflow, "caption")
            if rungs > 1 and store.state("train").changed:
                with Session(in_process=True, cores=1) as session:
                    bench = phases.Bench(workflow, store.folder, session, Progress(quiet=True), scratch, project.cache)
                    job = replace(phases.training_job(bench), out=scratch / "rungs" / "model")
                    for folder in interim_models(job, rungs):
                        yield Made(folder, store.folder("ingest"), False)
            # The last part runs as the phase itself, from the checkpoint, so that it is recorded like any other.
            store, _ = run(workflow, "compress")
            yield Made(store.folder("compress"), store.folder("ingest"), True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # what a scheduler stopped early is not gone on with


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock file while the body runs; the system lets go of it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
