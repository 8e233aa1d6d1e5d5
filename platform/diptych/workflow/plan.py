"""`diptych plan`: what would run and why, what is cached, and what it will cost, from a measured probe."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diptych.core import digest
from diptych.core.errors import DiptychError
from diptych.engine.pipeline import StageState
from diptych.engine.progress import Progress, duration
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset
from diptych.workflow import identity, phases
from diptych.workflow.project import Project
from diptych.workflow.spec import PAIR_PHASES, PHASES, Workflow
from diptych.workflow.store import Store, open_store

PROBE_ROWS = (128, 512)
PROBE_STEPS = 6
RAY_START_S = 8.0
RAY_TRAIN_START_S = 12.0
"""Measured on two idle cores with compiled byte code; see docs/LAB.md."""
TABLE_ROW_BYTES = 400
"""A pair's row in a table, compressed: key, picture address, a few captions."""


@dataclass(frozen=True)
class Cost:
    """What a phase is expected to take; None where nothing could be measured yet."""

    rows: int | None = None
    steps: int | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    written_bytes: int | None = None


@dataclass(frozen=True)
class Line:
    """A phase of the plan."""

    phase: str
    state: StageState
    cost: Cost


def plan(workflow: Workflow) -> tuple[Store, list[Line]]:
    """The plan of a workflow. Phases behind a changed one run as well; costs come from probes on the newest pairs at hand."""
    project = Project.find(workflow.path.parent)
    store = open_store(project, workflow)
    lines: list[Line] = []
    changed: list[str] = []
    for phase in PHASES:
        behind = [name for name in identity.INPUTS[phase] if name in changed]
        state = StageState(phase, tuple(f"{name} runs again" for name in behind)) if behind else store.state(phase)
        if state.changed:
            changed.append(phase)
        lines.append(Line(phase, state, predict(phase, store) if state.changed else Cost(seconds=0.0)))
    return store, lines


def predict(phase: str, store: Store) -> Cost:
    """The cost of a phase from a probe on its input, or on the newest input upstream that exists; empty when there is none."""
    source = _newest_pairs(store, phase)
    if source is None:
        return Cost()
    dataset = PairDataset.open(source)
    if phase == "train":
        return _predict_training(store.workflow, dataset)
    rows = _train_rows(dataset) if phase in PAIR_PHASES else len(dataset)
    if phase in PAIR_PHASES:
        return _predict_pass(phase, store, dataset, rows)
    if phase == "evaluate":
        return _predict_evaluation(store.workflow, dataset)
    return Cost(rows=rows, seconds=0.5 if not store.workflow.compress else None)


def with_startup(phase: str, seconds: float | None, session: Session) -> float | None:
    """The prediction with the start of Ray's session and of Ray Train's workers added where the phase has to wait for them."""
    if seconds is None or session.in_process:
        return seconds
    uses_ray = phase in ("ingest", *PAIR_PHASES, "train")
    return seconds + (RAY_START_S if uses_ray and not session.started else 0.0) + (RAY_TRAIN_START_S if phase == "train" else 0.0)


def _newest_pairs(store: Store, phase: str) -> Path | None:
    order = ("ingest", "curate", "prune", "caption")
    if phase == "ingest":
        return None
    before = ["ingest"] if phase == "evaluate" else list(reversed(order[: order.index(phase)] if phase in order else order))
    return next((store.folder(name) for name in before if (store.folder(name) / "manifest.json").exists()), None)


def _train_rows(dataset: PairDataset) -> int:
    return int(dataset.scan().filter(pl.col("split") == "train").select(pl.len()).collect().item())


def _predict_pass(phase: str, store: Store, dataset: PairDataset, rows: int) -> Cost:
    """Runs the phase on two small samples in this process; the slope between them is the time a pair takes."""
    if not store.workflow.methods(phase):
        return Cost(rows=rows, seconds=0.1, memory_bytes=0, written_bytes=rows * TABLE_ROW_BYTES)
    if any(getattr(config, "features", None) == phases.SCOUT for config in store.workflow.methods(phase)):
        return Cost(rows=rows)  # a scout is trained first: no probe is cheap
    folder = Path(tempfile.mkdtemp(prefix="diptych-probe-"))
    try:
        few, more = (_timed_pass(phase, store, _few(dataset, folder / f"few-{count}", count), folder / str(count)) for count in PROBE_ROWS)
    except DiptychError:
        return Cost(rows=rows)  # a method that cannot work on so few pairs tells nothing about many
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    slope = max(0.0, more[1] - few[1]) / max(1, more[0] - few[0])
    return Cost(rows=rows, seconds=more[1] + slope * max(0, rows - more[0]), written_bytes=rows * TABLE_ROW_BYTES)


def _timed_pass(phase: str, store: Store, sample: PairDataset, folder: Path) -> tuple[int, float]:
    """Pairs and seconds of one probe."""
    with Session(in_process=True) as session:
        bench = phases.Bench(
            store.workflow, lambda name: folder / "out" if name == phase else sample.root, session, Progress(quiet=True),
            folder / "scratch", folder / "cache",
        )  # fmt: skip
        started = time.perf_counter()
        phases.run(phase, bench)
        return len(sample), time.perf_counter() - started


def _few(dataset: PairDataset, out: Path, rows: int) -> PairDataset:
    """The first `rows` training pairs by key hash, as a dataset of its own."""
    from diptych.core.chance import key_hashes
    from diptych.pairs.write import DatasetWriter

    frame = dataset.read().filter(pl.col("split") == "train")
    frame = frame[key_hashes(frame["key"]).argsort()[:rows]]
    with DatasetWriter(
        out, dataset.manifest.phase, [dataset.digest], dataset.manifest.shards, pairs_in=frame.height, shards_root=dataset.root
    ) as writer:
        writer.add(frame, None)
        return writer.finish()


def _predict_training(workflow: Workflow, dataset: PairDataset) -> Cost:
    """Times a few steps of the real loop in this process, on real pairs."""
    from diptych.engine import training
    from diptych.train.config import TrainConfig

    section = workflow.train
    rows = _train_rows(dataset)
    per_epoch = max(1, rows // section.batch_size)
    steps = section.total_steps(per_epoch)
    folder = Path(tempfile.mkdtemp(prefix="diptych-probe-"))
    try:
        plain = {key: value for key, value in section.plain().items() if key in TrainConfig.model_fields}
        config = TrainConfig.parse({**plain, "epochs": None, "steps": min(PROBE_STEPS, steps), "log_every": 1})
        job = training.Job(
            dataset.root.resolve(), config, section.model, section.init, workflow.objective.plain(), workflow.optimizer.plain(),
            folder / "model", folder / "scratch", workflow.seed, 1,
        )  # fmt: skip
        with Session(in_process=True) as session:
            training.run(job, session)
        step_s = _step_seconds(folder / "scratch" / "steps.jsonl")
    except DiptychError:
        return Cost(rows=rows, steps=steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    import resource

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(rows=rows, steps=steps, seconds=steps * step_s / section.workers, memory_bytes=memory * section.workers)


def _step_seconds(log: Path) -> float:
    """The median time of a step, the first left out."""
    import json
    import statistics

    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record["step_s"] + record["data_wait_s"] for record in records]
    return float(statistics.median(steps[1:] or steps))


def _predict_evaluation(workflow: Workflow, dataset: PairDataset) -> Cost:
    splits = {str(config.plain().get("split", "test")) for config in workflow.benchmarks}
    rows = int(dataset.scan().filter(pl.col("split").is_in(list(splits))).select(pl.len()).collect().item())
    from diptych.models import clip

    encoder = clip.create(workflow.train.model, 0).eval()
    import torch

    image_NCHW = torch.zeros(32, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    with torch.inference_mode():
        encoder.encode_image(image_NCHW)
        started = time.perf_counter()
        encoder.encode_image(image_NCHW)
    per_row = (time.perf_counter() - started) / 32
    return Cost(rows=rows, seconds=rows * per_row * 1.5 + 2.0)


def text(store: Store, lines: Sequence[Line]) -> str:
    """The plan as a table."""
    out = [
        f"plan of {store.name} ({digest.short(store.workflow.digest)})",
        "",
        f"  {'phase':<9} {'':<7} {'rows':>9} {'steps':>7} {'time':>12} {'memory':>9}  why",
    ]
    for line in lines:
        c = line.cost
        word = "runs" if line.state.changed else "cached"
        numbers = f"{_count(c.rows):>9} {_count(c.steps):>7} {duration(c.seconds) if c.seconds is not None and line.state.changed else '':>12} {_size(c.memory_bytes):>9}"
        out.append(f"  {line.phase:<9} {word:<7} {numbers}  {'; '.join(line.state.reasons[:4])}")
    total = sum(line.cost.seconds or 0.0 for line in lines)
    unknown = [line.phase for line in lines if line.state.changed and line.cost.seconds is None]
    out += ["", f"  {duration(total)} of work expected" + (f", without {', '.join(unknown)}: nothing to measure on yet" if unknown else "")]
    return "\n".join(out)


def _count(value: int | None) -> str:
    return f"{value:,}" if value is not None else ""


def _size(value: int | None) -> str:
    return f"{value / 2**20:,.0f} MiB" if value else ""


def costs(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """The plan as plain data, for the report's predicted-beside-actual table."""
    return {line.phase: {"rows": line.cost.rows, "steps": line.cost.steps, "seconds": line.cost.seconds} for line in lines}
