"""Probes of a phase over pairs: it is run on a few of these very pairs, on more of them for a far goal, and extended to all.

Most work grows in step with the pairs, and a line through the probes foretells it. What a method declares as its `labour` does not: it is
taken off the probes and put on again for all pairs, at the pace of this machine. Between the two stands a trial's smaller sample
(`Config.tried_on`), without which fitting on what is kept small for many pairs would be most of the work on few.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import polars as pl

from diptych.core.config import Config
from diptych.core.points import Labour, PairMethod
from diptych.engine import passes
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset
from diptych.workflow import phases
from diptych.workflow.spec import Workflow

PROBE_ROWS = (128, 512)
FAR = 50
PROBE_S = 1.0
"""A phase with more than `FAR` times the pairs of its largest probe is probed again with four times as many, unless that one took so long."""
PROBE_TABLES = 16
"""Tables that a probe reads, one at a time, spread evenly: a plan for a billion pairs reads as much as one for a million."""


@dataclass(frozen=True)
class Probe:
    """What a phase took on a few pairs; `uneven_s` of its seconds are labour by declaration."""

    rows: int
    seconds: float
    uneven_s: float
    memory_bytes: int


def foretold(phase: str, workflow: Workflow, dataset: PairDataset, rows: int) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a phase over `rows` training pairs of the dataset, in one process. Raises what its methods raise.

    A millisecond of noise in a probe of 512 pairs is two seconds a million, so a far goal wants a longer run-up. Code that is loaded on
    first use would pass for the time of the smallest sample, so that one goes first once more. Memory follows the largest table, since
    passes hold one table at a time.
    """
    configs = workflow.methods(phase)
    folder = Path(tempfile.mkdtemp(prefix="diptych-probe-"))
    done: list[Probe] = []
    try:
        while (count := next_probe(rows, done)) is not None:
            sample = few(dataset, folder / f"few-{count}", count)
            tried = tuple(config.tried_on(len(sample) / max(1, rows)) for config in configs)
            trial = replace(workflow, **{phase: tried})  # type: ignore[arg-type]
            if not done:
                _run(phase, trial, sample, folder / "first")
            seconds, made = _run(phase, trial, sample, folder / str(count))
            done.append(Probe(len(sample), seconds, uneven_s(tried, workflow.seed, made, len(sample)), phases.peak_memory_bytes()))
        further_s = uneven_s(configs, workflow.seed, made, rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counts = [probe.rows for probe in done]
    even_s = _further(counts, [max(0.0, probe.seconds - probe.uneven_s) for probe in done], rows)
    most = max((table.rows for table in dataset.manifest.tables), default=0)
    memory_bytes = _further(counts, [probe.memory_bytes for probe in done], min(rows, most))
    return max(done[-1].seconds, even_s + further_s), round(memory_bytes)


def _further(counts: Sequence[int], values: Sequence[float], rows: int) -> float:
    """What the line through the smallest and the largest probe says of `rows` pairs; never less than the largest probe."""
    slope = max(0.0, values[-1] - values[0]) / max(1, counts[-1] - counts[0])
    return values[-1] + slope * max(0, rows - counts[-1])


def uneven_s(configs: Sequence[Config], seed: int, probed: PairDataset, rows: int) -> float:
    """Seconds of the work that does not grow in step with the pairs, where `rows` come in, at the pace of this machine.

    Of a chain every method is taken to lose the share that it lost of the pairs that were probed.
    """
    ledger, reports = probed.manifest.ledger, probed.manifest.phase.report
    seconds, share, counted = 0.0, 1.0, set[str]()
    for position, config in enumerate(passes.steps_of(configs)):
        method: PairMethod = config.build(seed)  # type: ignore[attr-defined]
        name = str(config.plain().get("method", ""))
        labour = method.labour(round(rows * share))
        if any(labour):
            pace = _pace(int(reports[f"{position}-{name}"]["width"]))
            seconds += labour.looks * pace.looks + labour.products * pace.products
        if name not in counted:
            share -= sum(left.count for left in ledger.left if left.method == name) / max(1, ledger.pairs_in)
        counted.add(name)
    return seconds


@cache
def _pace(width: int) -> Labour:
    from diptych.prune.kmeans import pace

    return pace(width)


def next_probe(rows: int, done: Sequence[Probe]) -> int | None:
    """How many pairs to probe next, for a phase of `rows`; None when what was done will do."""
    further = len(done) - len(PROBE_ROWS)
    if further < 0:
        return PROBE_ROWS[further]
    largest = PROBE_ROWS[-1] * 4**further
    return 4 * largest if rows > FAR * largest and done[-1].seconds < PROBE_S else None


def _run(phase: str, workflow: Workflow, sample: PairDataset, folder: Path) -> tuple[float, PairDataset]:
    """Seconds of one probe, and what it made."""
    with Session(in_process=True) as session:
        bench = phases.Bench(
            workflow, lambda name: folder / "out" if name == phase else sample.root, session, Progress(quiet=True),
            folder / "scratch", folder / "cache",
        )  # fmt: skip
        started = time.perf_counter()
        phases.run(phase, bench)
        return time.perf_counter() - started, PairDataset.open(folder / "out")


def few(dataset: PairDataset, out: Path, rows: int) -> PairDataset:
    """The first `rows` training pairs by key hash, of `PROBE_TABLES` tables at most, as a dataset of its own."""
    from diptych.core.chance import key_hashes
    from diptych.pairs.write import DatasetWriter

    step = max(1, -(-len(dataset.tables()) // PROBE_TABLES))
    frame = pl.DataFrame()
    for index in range(0, len(dataset.tables()), step):
        part = dataset.table(index).filter(pl.col("split") == "train")
        frame = pl.concat([frame, part]) if frame.width else part
        frame = frame[key_hashes(frame["key"]).argsort()[:rows]]
    with DatasetWriter(
        out, dataset.manifest.phase, [dataset.digest], dataset.manifest.shards, pairs_in=frame.height, shards_root=dataset.root
    ) as writer:
        writer.add(frame, None)
        return writer.finish()
