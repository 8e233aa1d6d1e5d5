"""An ordinary experiment inside a trial: run in the trial's own process, found again by its key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.engine.progress import Progress
from diptych.engine.rungs import interim_models
from diptych.engine.session import Session
from diptych.workflow import phases
from diptych.workflow.project import Project
from diptych.workflow.spec import PHASES, Workflow
from diptych.workflow.store import KeyedStore


def run(
    workflow: Workflow, until: str, name: str | None = None, project: Project | None = None
) -> tuple[KeyedStore, dict[str, dict[str, Any]]]:
    """Runs a workflow up to a phase in this process and gives its store and figures. Phases that any run has made are taken over."""
    project = project or Project.find(workflow.path.parent)
    store = KeyedStore(project, workflow, name)
    figures: dict[str, dict[str, Any]] = {}
    with store.locked(wait=True), Session(in_process=True) as session:
        for phase in PHASES[: PHASES.index(until) + 1]:
            if not store.state(phase).changed:
                figures[phase] = store.figures(phase)
                continue
            bench = phases.Bench(workflow, store.folder, session, Progress(quiet=True), project.scratch / store.name, project.cache)
            figures[phase] = phases.run(phase, bench)
            store.save(phase, figures[phase])
    return store, figures


def models(workflow: Workflow, rungs: int) -> Iterator[Path]:
    """The model of a setting after each of `rungs` parts of its training; with one rung, or when it is known, the finished one."""
    store, _ = run(workflow, "caption")
    scratch = store.project.scratch / store.name
    try:
        if rungs > 1 and store.state("train").changed:
            with Session(in_process=True) as session:
                bench = phases.Bench(workflow, store.folder, session, Progress(quiet=True), scratch, store.project.cache)
                yield from interim_models(replace(phases.training_job(bench), out=scratch / "rungs" / "model"), rungs)
        # The last part runs as the phase itself, from the checkpoint, so that it is recorded like any other.
        store, _ = run(workflow, "compress")
        yield store.folder("compress")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what a scheduler stopped early is not gone on with
