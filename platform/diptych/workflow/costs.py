"""What a phase will cost: rows, steps, seconds, memory and bytes, from a probe measured on this machine and on these very pairs.

The seconds are those of the work, from the probe, and of what stands still meanwhile: Ray's start, a pass's start, workers' start. The
latter are constants, measured on two idle cores with compiled byte code (docs/LAB.md); in process there are none of them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from diptych.caption.rewriters.endpoint import EndpointConfig
from diptych.core.errors import DiptychError
from diptych.core.points import RawPair, Source
from diptych.engine import passes
from diptych.engine.session import Session, usable_cores
from diptych.pairs.dataset import PairDataset
from diptych.workflow import phases, probes
from diptych.workflow.spec import PAIR_PHASES, Workflow
from diptych.workflow.store import Store

ON_RAY = ("ingest", *PAIR_PHASES, "train")
PROBE_STEPS = 6
PROBE_PARTS_S = 2.0
PROBE_TEXTS = 64
RAY_START_S = 6.0
RAY_TRAIN_START_S = 16.0
RAY_PASS_S = 0.5
"""Starting one pass over the tables."""
TUNE_START_S = 5.0
TUNE_TRIAL_S = 0.05
SEVERAL_WORKERS = 0.87
"""Speed of two or more workers on one machine, as a share of as many times the speed of one: they share memory and wait for each other."""
PICTURE_S = 0.5e-3
"""Reading and decoding a small picture."""
EVALUATION_S = 2.5
"""Loading the model, bootstraps, examples for the report."""
TABLE_ROW_BYTES = 400
"""A pair's row in a table, compressed: key, picture address, a few captions."""
CHECKPOINT_TIMES = 3
"""A checkpoint's size in models: the weights and two moments of them."""


@dataclass(frozen=True)
class Cost:
    """What a phase is expected to take; None where nothing could be measured yet. `memory_bytes` is of all workers together.

    `unmeasured` says why nothing was, where there are pairs to measure on.
    """

    rows: int | None = None
    steps: int | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    written_bytes: int | None = None
    unmeasured: str = ""


def predict(phase: str, store: Store, *, starts_ray: bool = False, in_process: bool = False) -> Cost:
    """The cost of a phase from a probe on its input, or on the newest input upstream that exists; empty when there is none.

    `starts_ray`: Ray does not run yet. `in_process`: it will not.
    """
    cost = _work(phase, store)
    if cost.seconds is None or in_process:
        return cost
    return replace(cost, seconds=cost.seconds + _standstill(phase, store.workflow, starts_ray))


def _standstill(phase: str, workflow: Workflow, starts_ray: bool) -> float:
    seconds = RAY_START_S if starts_ray and phase in ON_RAY else 0.0
    match phase:
        case "train":
            return seconds + RAY_TRAIN_START_S
        case "evaluate":
            return seconds + (TUNE_START_S + TUNE_TRIAL_S * _trials(workflow) if workflow.sweep else 0.0)
        case "curate" | "prune" | "caption":
            return seconds + RAY_PASS_S * passes.count(workflow.methods(phase), workflow.seed)
        case _:
            return seconds


def _trials(workflow: Workflow) -> int:
    assert workflow.sweep is not None
    if workflow.sweep.trials:
        return workflow.sweep.trials
    trials = 1
    for axis in workflow.sweep.space.values():
        trials *= len(axis) if isinstance(axis, tuple) else 1
    return trials


def _work(phase: str, store: Store) -> Cost:
    if phase == "ingest":
        return _ingest(store.workflow)
    source = _newest_pairs(store, phase)
    if source is None:
        return Cost()
    dataset = PairDataset.open(source)
    if phase == "train":
        return _training(store.workflow, dataset)
    if phase in PAIR_PHASES:
        return _pass(phase, store, dataset)
    if phase == "evaluate":
        return _evaluation(store.workflow, dataset)
    return Cost(seconds=0.1) if not store.workflow.compress else Cost()


def _newest_pairs(store: Store, phase: str) -> Path | None:
    order = ("ingest", *PAIR_PHASES)
    before = ["ingest"] if phase == "evaluate" else list(reversed(order[: order.index(phase)] if phase in order else order))
    return next((store.folder(name) for name in before if (store.folder(name) / "manifest.json").exists()), None)


def _rows(dataset: PairDataset, *splits: str) -> int:
    return int(dataset.scan().filter(pl.col("split").is_in(splits)).select(pl.len()).collect().item())


def _ingest(workflow: Workflow) -> Cost:
    """Reads and packs whole parts of the source for about two seconds; the other parts are taken to be like them.

    Nothing is known of a source whose very first part takes longer: how many pairs it holds shows only at its end.
    """
    from diptych.pairs.ingest import ingest
    from diptych.pairs.shards import ShardWriter

    source = _Hurried(workflow.source.build(), time.perf_counter() + PROBE_PARTS_S)  # type: ignore[attr-defined]
    parts = list(source.parts())
    rows = read = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="diptych-probe-") as folder:
        for part in parts:
            with ShardWriter(Path(folder), f"probe-{read:05d}", 1 << 30) as shards:
                kept = ingest(source, part, shards, workflow.ingest).kept.height
            if source.cut:
                break
            rows, read, seconds = rows + kept, read + 1, time.perf_counter() - started
        size_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    if not read:
        return Cost()
    share = read / len(parts)
    return Cost(
        round(rows / share), None, seconds / share / min(len(parts), usable_cores()), phases.peak_memory_bytes(), round(size_bytes / share)
    )


class _Hurried(Source):
    """A source that stops reading when its time is over, and says so in `cut`."""

    def __init__(self, source: Source, until_s: float) -> None:
        self.source, self.until_s, self.cut = source, until_s, False

    def parts(self) -> Sequence[str]:
        return self.source.parts()

    def read(self, part: str) -> Iterator[RawPair]:
        for pair in self.source.read(part):
            if time.perf_counter() > self.until_s:
                self.cut = True
                return
            yield pair


def _pass(phase: str, store: Store, dataset: PairDataset) -> Cost:
    """What the probes of a phase over pairs say (`workflow/probes.py`)."""
    rows, configs = _rows(dataset, "train"), store.workflow.methods(phase)
    if not configs:
        return Cost(rows=rows, seconds=0.1, memory_bytes=0, written_bytes=rows * TABLE_ROW_BYTES)
    if any(getattr(config, "features", None) == phases.SCOUT for config in configs):
        return Cost(rows=rows, unmeasured="a scout is trained first")  # no probe is cheap
    if any(isinstance(value, EndpointConfig) for config in configs for _, value in config):
        return Cost(rows=rows, unmeasured="a server would be asked")  # whose answers may cost money, and a probe asks several times
    try:
        seconds, memory_bytes = probes.foretold(phase, store.workflow, dataset, rows)
    except DiptychError as error:  # a method that cannot work on so few pairs tells nothing about many; one that never can is found here
        return Cost(rows=rows, unmeasured=_trial(error))
    return Cost(rows=rows, seconds=seconds, memory_bytes=memory_bytes, written_bytes=rows * TABLE_ROW_BYTES)


def _trial(error: DiptychError) -> str:
    """What a trial on a few pairs ran into, on one line."""
    first = next(iter(error.problems), None)
    return f"on a few pairs it says: {error.headline}" + (f" ({first.where}: {first.got})" if first else "")


def _training(workflow: Workflow, dataset: PairDataset) -> Cost:
    """Times a few steps of the real loop in this process, on real pairs."""
    from diptych.engine import training
    from diptych.train.config import UNJUDGED, TrainConfig

    section = workflow.train
    rows = _rows(dataset, "train")
    per_epoch = max(1, rows // section.batch_size)
    steps = section.total_steps(per_epoch)
    folder = Path(tempfile.mkdtemp(prefix="diptych-probe-"))
    try:
        plain = {key: value for key, value in section.plain().items() if key in TrainConfig.model_fields}
        config = TrainConfig.parse({**plain, "epochs": None, "steps": min(PROBE_STEPS, steps), "log_every": 1, **UNJUDGED})
        job = training.Job(
            dataset.root.resolve(), config, section.model, section.init, workflow.objective.plain(), workflow.optimizer.plain(),
            folder / "model", folder / "scratch", workflow.seed, 1, None if workflow.batch_growth is None else workflow.batch_growth.plain(),
        )  # fmt: skip
        with Session(in_process=True) as session:
            training.run(job, session)
        step_s = _step_seconds(folder / "scratch" / "steps.jsonl")
        model_bytes = sum(file.stat().st_size for file in (folder / "model").iterdir())
    except DiptychError as error:
        return Cost(rows=rows, steps=steps, unmeasured=_trial(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    speed = section.workers * (SEVERAL_WORKERS if section.workers > 1 else 1.0)
    return Cost(rows, steps, steps * step_s / speed, phases.peak_memory_bytes() * section.workers, model_bytes * (1 + CHECKPOINT_TIMES))


def _step_seconds(log: Path) -> float:
    """The median time of a step, the first left out."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record["step_s"] + record["data_wait_s"] for record in records]
    return float(statistics.median(steps[1:] or steps))


def _evaluation(workflow: Workflow, dataset: PairDataset) -> Cost:
    """Times the towers on a few pictures and texts; a sweep looks at a second split."""
    import torch

    from diptych.models import clip

    plain = [config.plain() for config in workflow.benchmarks]
    splits = {str(config.get("split", "test")) for config in plain} | ({workflow.sweep.choose_on} if workflow.sweep else set())
    rows = _rows(dataset, *splits)
    encoder = clip.create(workflow.train.model, 0).eval()
    image_NCHW = torch.zeros(32, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    text_NL = torch.from_numpy(encoder.tokenizer.encode_cut(["a photo of a thing"] * PROBE_TEXTS))
    with torch.inference_mode():
        image_s = _seconds(lambda: encoder.encode_image(image_NCHW)) / len(image_NCHW)
        text_s = _seconds(lambda: encoder.encode_text(text_NL)) / len(text_NL)
    figures = len(plain) + (_trials(workflow) if workflow.sweep else 0)
    seconds = rows * (image_s + PICTURE_S) + figures * rows * text_s + EVALUATION_S
    return Cost(rows, None, seconds, phases.peak_memory_bytes(), rows * 4 * int(encoder.config["embed_dim"]))


def _seconds(work: Callable[[], Any]) -> float:
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
