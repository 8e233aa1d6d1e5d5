"""`diptych evaluate`: every checkpoint on every set; each picture is decoded once for all checkpoints that see it alike."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from diptych.core import digest
from diptych.core.config import Config, headline
from diptych.core.errors import ConfigError, Problem, shorten
from diptych.engine import evaluation
from diptych.engine.outbox import Outbox
from diptych.engine.progress import Progress
from diptych.engine.tracking import Target, Tracker
from diptych.models.store import CONFIG
from diptych.pairs import files
from diptych.pairs.dataset import PairDataset
from diptych.workflow import identity, matrix_page, peer_format, phases, sets, yaml
from diptych.workflow.methods import Checks
from diptych.workflow.project import Project
from diptych.workflow.run import terminated_as_interrupt
from diptych.workflow.spec import apply_overrides, check_model

ROWS, EXAMPLES, PAGE, PEER = "rows.parquet", "examples.parquet", "matrix.html", "clip_benchmark"


class _Skeleton(Config):
    """The matrix file before sets and benchmarks are looked up."""

    name: str = Field(pattern=sets.NAMED, description="where the results go: runs/<name>")
    about: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63, description="names the bootstrap's draws, and the weights of an architecture without any")
    models: dict[str, str] = Field(min_length=1, description="name -> model directory, or model as `open_clip` names it")
    sets: dict[str, Any] = Field(min_length=1, description="name -> {data: a source or a dataset's folder, benchmarks: …}")
    benchmarks: tuple[dict[str, Any], ...] = Field(default=(), description="what is measured on every set that has no list of its own")
    training: str | None = Field(
        default=None, description="folder of the pair dataset that models were trained on: near copies are counted"
    )
    precision: evaluation.Precision = Field(
        default="full", description="of stored features: `half` takes half of the disk, near-ties may turn"
    )
    together: int = Field(default=8, ge=1, le=1024, description="checkpoints held in memory at once; more are served in further passes")


@dataclass(frozen=True)
class Matrix:
    """A checked matrix file."""

    name: str
    about: str
    seed: int
    models: Mapping[str, str]
    sets: tuple[sets.EvaluationSet, ...]
    training: Path | None
    precision: evaluation.Precision
    together: int


@dataclass
class Outcome:
    """What was measured: a cell a checkpoint and set, and where the results lie."""

    matrix: Matrix
    cells: dict[tuple[str, str], phases.Measured] = field(default_factory=dict)
    home: Path = Path()
    wall_s: float = 0.0
    unsent: int = 0

    def of(self, model: str) -> list[phases.Measured]:
        """The cells of one checkpoint, a set each."""
        return [self.cells[model, one.name] for one in self.matrix.sets]

    @property
    def notes(self) -> dict[str, list[str]]:
        """What to know of each set, each sentence once; what was seen with one checkpoint alone names it."""
        found: dict[str, dict[str, list[str]]] = {}
        for (model, name), cell in self.cells.items():
            for note in cell.notes:
                found.setdefault(name, {}).setdefault(note, []).append(model)
        everyone = len(self.matrix.models)
        return {
            name: [note if len(models) == everyone else f"{note} (seen with {', '.join(models)})" for note, models in notes.items()]
            for name, notes in found.items()
        }


def load(path: Path, overrides: Sequence[str] = ()) -> Matrix:
    """Reads and checks a matrix file with `key.path=value` overrides. Raises ConfigError with every problem at once."""
    raw = yaml.read(path)
    apply_overrides(raw, overrides)
    return check(raw)


def check(raw: Mapping[str, Any]) -> Matrix:
    """Checks the data of a matrix file: its shape, then sets, benchmarks and models."""
    checks = Checks()
    skeleton = checks.attempt(lambda: _Skeleton.parse(dict(raw)))
    benchmarks = checks.methods(raw.get("benchmarks"), "evaluate", "benchmarks")
    found = sets.check(raw.get("sets"), benchmarks, "sets", checks) if isinstance(raw.get("sets"), Mapping) else ()
    for name, model in (skeleton.models if skeleton else {}).items():
        checks.attempt(lambda name=name, model=model: _check_model(name, model))  # type: ignore[misc]
    if skeleton and skeleton.training is not None:
        training = skeleton.training
        checks.attempt(lambda: _check_training(training))
    checks.refuse()
    assert skeleton is not None
    return Matrix(
        skeleton.name, skeleton.about, skeleton.seed, dict(skeleton.models), found,
        Path(skeleton.training).absolute() if skeleton.training else None, skeleton.precision, skeleton.together,
    )  # fmt: skip


def _check_model(name: str, model: str) -> None:
    where = f"models.{name}"
    if not re.fullmatch(sets.NAMED, name):
        raise ConfigError(headline(1), [Problem(where, shorten(name), "a name of a-z, 0-9, `_`, `.` and `-`: it names a folder")])
    check_model(model, where)
    folder = Path(model.removeprefix("local-dir:"))
    if ("/" in model or model.startswith("local-dir:")) and not model.startswith("open_clip:") and not (folder / CONFIG).is_file():
        fix = "paths start at the folder in which the command is given; models of open_clip's list are open_clip:ARCHITECTURE/TAG"
        raise ConfigError(headline(1), [Problem(where, shorten(model), f"a model directory, with {CONFIG}", fix)])


def _check_training(folder: str) -> None:
    if not (Path(folder) / "manifest.json").is_file():
        raise ConfigError(headline(1), [Problem("training", shorten(folder), "the folder of a pair dataset, with manifest.json")])


# ---------------------------------------------------------------- measuring


def run(matrix: Matrix, project: Project, tracking_uri: str | None = None, quiet: bool = False) -> Outcome:
    """Measures every checkpoint on every set and writes `runs/<name>`.

    A folder a checkpoint, as `diptych compare` reads it; `rows.parquet` over all; `matrix.html`; CLIP_benchmark's JSON and CSV. What was
    encoded before is taken from the project's cache. Raises before anything is measured for a set that is unfit or an MLflow that is down.
    """
    started = time.monotonic()
    progress = Progress(quiet=quiet)
    tracker = Tracker(Target.local(project.root, "diptych", tracking_uri), Outbox(project.outbox))
    tracker.check()
    outcome = Outcome(matrix, home=project.runs / matrix.name)
    with terminated_as_interrupt(), files.full_disk_explained(project.runs):
        training = PairDataset.open(matrix.training) if matrix.training else None
        ready = [_registered(one, project, training, progress) for one in matrix.sets]
        outcome.cells = measure(matrix, ready, project.cache / "encoded", progress)
        for name, notes in outcome.notes.items():
            for note in notes:
                progress.note(f"{name}: {note}")
        _write(outcome)
    _track(outcome, ready, tracker)
    outcome.unsent = tracker.close()
    outcome.wall_s = time.monotonic() - started
    return outcome


def _registered(one: sets.EvaluationSet, project: Project, training: PairDataset | None, progress: Progress) -> sets.Registered:
    progress.start(one.name, "bringing in")
    found = sets.register(one, project.cache, training)
    progress.done(f"{len(found.dataset):,} pairs")
    return found


def measure(
    matrix: Matrix, ready: Sequence[sets.Registered], cache: Path, progress: Progress | None = None
) -> dict[tuple[str, str], phases.Measured]:
    """The cells of the matrix, by checkpoint and set; features are kept in `cache`."""
    progress = progress or Progress(quiet=True)
    checkpoints = {name: evaluation.Checkpoint(_folder(model, matrix.seed, cache), cache) for name, model in matrix.models.items()}
    cells = {}
    for one in ready:
        encoders = _encoders(matrix, one.dataset, checkpoints)
        for name, encoder in encoders.items():
            progress.start(one.name, name)
            cells[name, one.name] = phases.measured_on(encoder, one.name, one.of.benchmarks, matrix.seed, one.flags)
            progress.done(f"{name}: {len(cells[name, one.name].metrics)} figures")
            if len(checkpoints) > matrix.together:
                encoder.checkpoint.release()
    return cells


def _encoders(
    matrix: Matrix, dataset: PairDataset, checkpoints: Mapping[str, evaluation.Checkpoint]
) -> dict[str, evaluation.StoredEncoder]:
    found = {
        name: evaluation.StoredEncoder(point.folder, dataset, point.cache, matrix.precision, together=matrix.together, shared=point)
        for name, point in checkpoints.items()
    }
    for encoder in found.values():
        encoder.companions = tuple(found.values())
    return found


def _folder(model: str, seed: int, cache: Path) -> Path:
    """The directory of a model; one that open_clip has to make or fetch is kept in the cache from then on."""
    from diptych.models import architectures, clip

    stored = model.removeprefix("local-dir:")
    if not model.startswith("open_clip:") and model not in architectures.files():
        return Path(stored)
    folder = cache / "models" / digest.short(digest.of_plain([model, seed, identity.code("train")]))
    if not (folder / CONFIG).is_file():
        clip.save(clip.create(model, seed), folder, {"model": model, "seed": seed})
    return folder


# ---------------------------------------------------------------- writing


def _write(outcome: Outcome) -> None:
    matrix, frames = outcome.matrix, []
    for name in matrix.models:
        cells = outcome.of(name)
        rows = pl.concat([cell.rows for cell in cells])
        frames.append(rows.with_columns(checkpoint=pl.lit(name)))
        with files.replacing(outcome.home / name / "evaluate") as partial:
            rows.write_parquet(partial / ROWS)
            evaluation.per_example([metric for cell in cells for metric in cell.metrics]).write_parquet(partial / EXAMPLES)
    everything = pl.concat(frames)
    partial_rows = files.partial_of(outcome.home / ROWS)
    everything.write_parquet(partial_rows)
    partial_rows.replace(outcome.home / ROWS)
    matrix_page.write(everything, matrix.name, matrix.about, outcome.notes, outcome.home / PAGE)
    with files.replacing(outcome.home / PEER) as folder:
        peer_format.write(everything, matrix.models, folder)


def _track(outcome: Outcome, ready: Sequence[sets.Registered], tracker: Tracker) -> None:
    """One run a checkpoint."""
    matrix = outcome.matrix
    for name, model in matrix.models.items():
        run = tracker.start(f"{matrix.name}/{name}", tags={"matrix": matrix.name, "checkpoint": name})
        tracker.params(run, {"model": model, "seed": matrix.seed, "precision": matrix.precision,
                             "sets": {one.name: one.of.plain() for one in ready}})  # fmt: skip
        figures = evaluation.figures([metric for cell in outcome.of(name) for metric in cell.metrics])
        tracker.metrics(run, {f"eval/{key}": entry["value"] for key, entry in figures.items()})
        for one in ready:
            profile = {"num_rows": len(one.dataset)}
            tracker.dataset(run, one.name, one.dataset.digest, one.dataset.root.as_uri(), "evaluate", profile)
        tracker.artifact(run, outcome.home / name / "evaluate" / ROWS)
        tracker.artifact(run, outcome.home / PAGE)
        tracker.end(run)


def text(outcome: Outcome) -> str:
    """What is printed at the end: the table, notes, and where the results lie."""
    rows = pl.read_parquet(outcome.home / ROWS)
    lines = [
        "",
        matrix_page.text(rows, outcome.notes),
        "",
        f"  {len(rows):,} rows in {outcome.home / ROWS}",
        f"  page    {outcome.home / PAGE}",
    ]
    first, *others = outcome.matrix.models
    lines += [f"  next    diptych compare {outcome.matrix.name}/{first} {outcome.matrix.name}/{others[0]}"] if others else []
    lines += [f"  MLflow  did not answer: {outcome.unsent} events are kept and will be sent by the next run"] if outcome.unsent else []
    return "\n".join(lines)
