"""The verbs that run experiments: `run`, `plan`, `evaluate`, `claim`, `phase`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from diptych.workflow.project import Project
    from diptych.workflow.spec import Workflow


def load(options: argparse.Namespace) -> Workflow:
    """The workflow that the command line names, with its overrides."""
    from diptych.workflow import spec
    from diptych.workflow.project import Project

    path = Path(options.workflow)
    # The folder of the data may have the workflow's name, so that only a file is taken for the workflow itself.
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        path = Project.find(Path.cwd()).workflow_path(options.workflow)
    return spec.load(path.resolve(), options.overrides)


def run(options: argparse.Namespace) -> int:
    """`diptych run`."""
    from diptych.workflow import run as runs
    from diptych.workflow.spec import PHASES

    if options.until not in PHASES:
        raise ConfigError.at(
            "There is no such phase", "--until", options.until, f"one of {', '.join(PHASES)}", nearest(options.until, PHASES)
        )
    workflow = load(options)
    outcome = runs.run(workflow, runs.Options(options.address, options.in_process, options.tracking_uri, options.quiet, options.until))
    runs.show(outcome)
    return 0


def plan(options: argparse.Namespace) -> int:
    """`diptych plan`."""
    from diptych.workflow import plan as plans

    store, lines = plans.plan(load(options))
    sys.stdout.write(plans.text(store, lines) + "\n")
    return 0


def phase(options: argparse.Namespace) -> int:
    """`diptych phase`: the command of a DVC stage."""
    from diptych.workflow import run as runs

    runs.phase(load(options), options.phase)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`diptych evaluate`."""
    from diptych.workflow import matrix
    from diptych.workflow.project import Project

    project = Project.find(Path.cwd())
    outcome = matrix.run(matrix.load(Path(options.matrix), options.overrides), project, options.tracking_uri, options.quiet)
    sys.stdout.write(matrix.text(outcome) + "\n")
    return 0


def claim(options: argparse.Namespace) -> int:
    """`diptych claim`: 0 when the effect showed, 1 when it did not."""
    from diptych.workflow import claim as claims
    from diptych.workflow import reproductions
    from diptych.workflow.project import Project

    project = Project.find(Path.cwd())
    if options.name is None:
        for path in claim_files(project):
            sys.stdout.write(f"  {path.stem:<20} {claims.load(path).about}\n")
        return 0
    result = reproductions.run(claim_path(project, options.name), project, options.in_process, options.tracking_uri)
    sys.stdout.write(claims.text(result) + "\n")
    return 0 if result.shown else 1


def claim_files(project: Project) -> list[Path]:
    """All claim files of a project."""
    return sorted((project.root / "workflows" / "claims").glob("*.yaml"))


def claim_path(project: Project, name: str) -> Path:
    """The claim file of that name. Raises ConfigError with the nearest."""
    path = Path(name)
    if path.exists() and path.suffix == ".yaml":
        return path.resolve()
    known = {file.stem: file for file in claim_files(project)}
    if name not in known:
        raise ConfigError.at("There is no such claim", "claim", name, f"one of {', '.join(known)}", nearest(name, known))
    return known[name]
