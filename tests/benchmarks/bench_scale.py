"""Curation and pruning of 1,000,000 generated pairs beside themselves at 250,000: does time grow in step with the pairs, and memory not?

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_scale.py [--large 1000000] [--small 250000]
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_scale.py --table 1000000 4000000 16000000

With `--table`, any sizes: one row each, with the CPU time a pair, the largest memory, the bytes and files of the unfinished work at
their most, and beside them what the plan (`workflow/costs.py`) had foretold from its probe. 16,000,000 pairs want about 25 GB of disk.

The chain is metaclip (the shipped concepts), then semantic-dedup and concept-pruning, run by `engine/passes.py` in process, in tables of
62,500 rows. Every size runs in a fresh process that reports its CPU seconds from the first pass on, and its largest memory: its own, and
with the pages of the scratch files that it has mapped, which any need takes back. The data set is made in another.

Captions are 30 to 60 characters of words that follow a Zipf law. To decode a million pictures would take longer than all of the rest, so
features do not come from pixels: `made_up_features` stands in for `features.compute`. It derives each row from the key alone (a direction
out of 500, with noise of its own; every tenth row is a near copy of the one before). The chain's parameters grow with the rows where they
count rows (metaclip's threshold), so that the same share stays at every size; cluster counts are the methods' own defaults.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from diptych.engine.features import FeatureSpec
    from diptych.pairs.shards import ShardReader

LARGE, SMALL, TABLE_ROWS = 1_000_000, 250_000, 62_500
WIDTH, DIRECTIONS = 256, 500
NOISE, COPY_NOISE = 0.6, 0.02
COPY_EVERY = 10
TIME_TARGET, MEMORY_TARGET = 4.4, 1.2
CHAIN: dict[str, tuple[dict[str, Any], ...]] = {
    "curate": ({"method": "metaclip"},),
    "prune": ({"method": "semantic-dedup", "epsilon": 0.03}, {"method": "concept-pruning", "keep": 0.8, "complexity_mean": 0.1}),
}
ROWS_A_THRESHOLD = 1_000
RUN = "scale"
TRAIN = {
    "model": "digits-16",
    "objective": {"method": "clip"},
    "optimizer": {"method": "adamw", "lr": 1e-3},
    "steps": 1,
    "batch_size": 16,
    "workers": 1,
}
"""Asked for by a workflow; never run here."""
LOOK_S = 0.5


# ---------------------------------------------------------------- the data


def make(rows: int, folder: Path) -> None:
    """Writes the pair dataset `ingest` of a run in `folder`: tables that point into one small shard."""
    from diptych.pairs.manifest import PhaseRecord, ShardEntry
    from diptych.pairs.write import DatasetWriter

    shard = folder / "shard.tar"
    tarfile.open(shard, "w").close()
    shards = {"s": ShardEntry(uri=str(shard), size_bytes=shard.stat().st_size)}
    record = PhaseRecord(phase="ingest", methods=(), seed=0, code="bench", version="0")
    vocabulary = words()
    with DatasetWriter(home(folder) / "ingest", record, shards=shards, pairs_in=None) as writer:
        for start in range(0, rows, TABLE_ROWS):
            writer.add(table(start, min(TABLE_ROWS, rows - start), vocabulary))
        writer.finish()


def home(folder: Path) -> Path:
    """Where the run's datasets lie, as in a project."""
    return folder / "runs" / RUN


def words() -> pl.Series:
    """50,000 words, the frequent ones first: half are concepts of the shipped list, half name nothing."""
    import numpy as np
    import polars as pl

    from diptych.curate import concepts

    rng = np.random.default_rng(0)
    known = [entry for entry in concepts.load(concepts.BUILTIN).entries if entry.isalpha() and 3 <= len(entry) <= 10]
    known = [known[index] for index in rng.permutation(len(known))[:25_000]]
    letters = rng.integers(ord("a"), ord("z") + 1, (25_000, 7)).astype(np.uint8)
    mixed = [*known, *(row.tobytes().decode() for row in letters)]
    return pl.Series([mixed[index] for index in rng.permutation(len(mixed))])


def table(start: int, rows: int, vocabulary: pl.Series) -> pl.DataFrame:
    """The pairs number `start` to `start + rows`."""
    import numpy as np
    import polars as pl

    from diptych.pairs.schema import CAPTIONS, IMAGE

    rng = np.random.default_rng(start + 1)
    rank = np.minimum(rng.zipf(1.3, (rows, 12)) - 1, 10**9) % len(vocabulary)
    drawn = vocabulary.gather(rank.ravel()).reshape((rows, 12))
    frame = pl.DataFrame({"number": np.arange(start, start + rows), "words": drawn, "length": rng.integers(30, 61, rows)})
    text = pl.col("words").arr.join(" ").str.slice(0, pl.col("length"))
    image = pl.struct(shard=pl.lit("s"), offset=pl.col("number") % 400 * 1024 + 512, size=pl.lit(300), width=pl.lit(16), height=pl.lit(16))
    caption = pl.struct(text=text, source=pl.lit("alt"), score=pl.lit(None, pl.Float32))
    return frame.select(
        key=pl.format("pair-{}", pl.col("number").cast(pl.String).str.zfill(9)),
        image=image.cast(IMAGE),
        captions=pl.concat_list(caption).cast(CAPTIONS),
        split=pl.lit("train"),
    )


def made_up_features(spec: FeatureSpec, frame: pl.DataFrame, reader: ShardReader) -> NDArray[np.float32]:
    """Unit rows `[N, WIDTH]`, a function of the key alone; every tenth pair is nearly the pair before it."""
    import numpy as np
    import polars as pl

    del spec, reader
    number = frame["key"].str.slice(5).cast(pl.Int64).to_numpy()
    original = np.where(number % COPY_EVERY == COPY_EVERY - 1, number - 1, number)
    centre_CD, grain_CD = stand_ins()
    # Two rows of grain, picked by the digits of the number in two bases: as good as noise of its own for every picture.
    noise = grain_CD[original % 4093] + grain_CD[original // 4093 % 4091]
    values = centre_CD[original * 7919 % DIRECTIONS] + NOISE / 2**0.5 * noise + COPY_NOISE * grain_CD[number % 4079]
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), dtype=np.float32)


@lru_cache
def stand_ins() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Directions `[DIRECTIONS, WIDTH]` and grain `[4096, WIDTH]`, rows of norm about 1."""
    import numpy as np

    rng = np.random.default_rng(2)
    centre_CD, grain_CD = rng.standard_normal((DIRECTIONS, WIDTH)), rng.standard_normal((4096, WIDTH))
    return (centre_CD / WIDTH**0.5).astype(np.float32), (grain_CD / WIDTH**0.5).astype(np.float32)


# ---------------------------------------------------------------- the measurement


def work(rows: int, folder: Path) -> dict[str, Any]:
    """Runs the chain over `ingest` in this process: what it took, and what left."""
    import torch

    from diptych.core import catalogue
    from diptych.engine import features, passes
    from diptych.engine.progress import Progress
    from diptych.engine.session import Session
    from diptych.pairs.dataset import PairDataset

    torch.set_num_threads(1)
    features.compute = made_up_features
    dataset = PairDataset.open(home(folder) / "ingest")
    assert len(dataset) == rows
    taken: dict[str, Any] = {"start_mb": peak_mb()}
    own = Own()
    cpu, wall = time.process_time(), time.monotonic()
    for phase, methods in CHAIN.items():
        before_s, before_wall_s = time.process_time(), time.monotonic()
        configs = [catalogue.config_class(catalogue.find(value["method"], phase)).parse(value) for value in scaled(methods, rows)]
        with timed_parts() as parts:
            dataset = passes.run(
            dataset, configs, phase, home(folder) / phase, seed=0, session=Session(in_process=True), scratch=folder / "scratch",
            code="bench", version="0", progress=Progress(quiet=True), feature_specs={"pixels": features.FeatureSpec(name="pixels")},
        )  # fmt: skip
        taken[phase] = {
            "parts": {name: round(value, 3) for name, value in sorted(parts.items())},
            "cpu_s": time.process_time() - before_s,
            "wall_s": time.monotonic() - before_wall_s,
        }
        taken[phase] |= {"kept": len(dataset), "peak_mb": peak_mb()}
        for entry in dataset.manifest.ledger.left:
            taken[phase][entry.reason] = entry.count
    return taken | {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall, "peak_mb": peak_mb(), "own_mb": own.peak_mb()}


@contextmanager
def timed_parts() -> Iterator[Counter[str]]:
    """CPU seconds by method and part of its pass, while the block runs: what a cluster shares out, and what its driver does alone."""
    from diptych.engine import passes, pieces

    seconds: Counter[str] = Counter()

    def timed(work: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            started = time.process_time()
            result = work(*arguments)
            seconds[name_of(*arguments)] += time.process_time() - started
            return result

        return wrapped

    own = {(passes, "_assemble"): passes._assemble}
    for task in (pieces.WithFeatures, pieces.FoldTask, pieces.Apply, pieces.Route, pieces.Decide, pieces.Return):
        own[task, "__call__"] = task.__call__
    for (place, name), work in own.items():
        part = getattr(place, "__name__", "").rpartition(".")[2].strip("_").lower()
        name_of = (lambda task, *_, part=part: f"{task.place.method}: {part}") if name == "__call__" else (lambda *_: "driver: write")
        setattr(place, name, timed(work, name_of))
    try:
        yield seconds
    finally:
        for (place, name), work in own.items():
            setattr(place, name, work)


def scaled(methods: Sequence[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """The chain's parameters for so many rows."""
    return [{**value, **({"threshold": rows // ROWS_A_THRESHOLD} if value["method"] == "metaclip" else {})} for value in methods]


def plan(rows: int, folder: Path) -> dict[str, Any]:
    """What the plan says of both phases, each from its probe on the pairs that come into it, as a run asks before a phase starts.

    In a process of its own, which may therefore run when both are done.
    """
    import torch

    from diptych.engine import features
    from diptych.workflow import costs, spec
    from diptych.workflow.project import Project
    from diptych.workflow.store import PlainStore

    torch.set_num_threads(1)
    features.compute = made_up_features
    chain = {phase: scaled(methods, rows) for phase, methods in CHAIN.items()}
    raw = {"name": RUN, "seed": 0, "data": {"source": "digits"}, **chain, "caption": [], "train": TRAIN, "compress": []}
    raw["evaluate"] = {"benchmarks": [{"method": "zero-shot"}], "sweep": None}
    store = PlainStore(Project(folder), spec.check(raw, folder / "scale.yaml"), RUN)
    started = time.monotonic()
    told = {phase: costs.predict(phase, store, in_process=True) for phase in CHAIN}
    return {phase: {"seconds": cost.seconds, "memory_mb": (cost.memory_bytes or 0) / 1e6} for phase, cost in told.items()} | {
        "probe_s": time.monotonic() - started, "peak_mb": peak_mb()}  # fmt: skip


class Watched:
    """The most files and bytes seen below a folder while a block runs, by a look every half second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.size_bytes = folder, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            files = sizes = 0
            for path in self.folder.rglob("*"):
                try:
                    sizes += path.stat().st_size
                except OSError:  # gone since
                    continue
                files += 1
            self.files, self.size_bytes = max(self.files, files), max(self.size_bytes, sizes)


class Own:
    """The most anonymous memory of this process, by a look ten times a second: without the pages of mapped files, which any need takes back."""

    def __init__(self) -> None:
        self._peak_mb, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak_mb(self) -> float:
        """Ends the watch: MB."""
        self._over.set()
        self._thread.join()
        return self._peak_mb

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._peak_mb = max(self._peak_mb, status_mb("RssAnon"))


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB. Unlike getrusage's, it does not start at the parent's."""
    return status_mb("VmHWM")


def status_mb(name: str) -> float:
    """A line of /proc/self/status, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def fresh(step: str, rows: int, folder: Path) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--small", str(rows), "--folder", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measured(rows: int, *, foretold: bool) -> dict[str, Any]:
    """One size: the data, the plan's words if asked for, the work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fresh("make", rows, folder)
        with Watched(folder / "scratch") as watched:
            taken = fresh("work", rows, folder)
        told = fresh("plan", rows, folder) if foretold else {}
        return taken | {"plan": told, "scratch_files": watched.files, "scratch_mb": watched.size_bytes / 1e6}


def main() -> None:
    """Runs both sizes and prints two lines, or with `--table` any sizes and a table; fails if shares differ between two sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=LARGE)
    parser.add_argument("--small", type=int, default=SMALL)
    parser.add_argument("--table", type=int, nargs="+", metavar="ROWS")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.small, options.folder) or {}))
        return
    taken = {}
    for rows in options.table or (options.small, options.large):
        taken[rows] = measured(rows, foretold=bool(options.table))
        print(f"{rows}: {json.dumps(taken[rows])}", flush=True)
    if options.table:
        print(table_of(taken))
    else:
        report(options.small, options.large, taken)


STEPS: dict[str, Callable[[int, Path], dict[str, Any] | None]] = {"make": make, "plan": plan, "work": work}
HEADINGS = (
    "pairs", "curate, us a pair", "prune, us a pair", "CPU s", "wall s", "plan, s", "peak MB", "own MB", "plan, MB", "scratch MB", "scratch files",
)  # fmt: skip


def table_of(taken: dict[int, dict[str, Any]]) -> str:
    """The figures of all sizes as a table: CPU microseconds a pair that comes into the run, wall seconds beside the plan's."""
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    for rows, figures in taken.items():
        told = figures["plan"]
        each = [f"{figures[phase]['cpu_s'] / rows * 1e6:.1f}" for phase in CHAIN]
        seconds = sum(told[phase]["seconds"] or 0.0 for phase in CHAIN)
        memory = max(told[phase]["memory_mb"] for phase in CHAIN)
        sums = [
            f"{figures['cpu_s']:.1f}",
            f"{figures['wall_s']:.1f}",
            f"{seconds:.1f}",
            f"{figures['peak_mb']:.0f}",
            f"{figures['own_mb']:.0f}",
        ]
        sums.append(f"{memory:.0f}")
        lines.append([f"{rows:,}", *each, *sums, f"{figures['scratch_mb']:.0f}", f"{figures['scratch_files']:,}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(small: int, large: int, taken: dict[int, dict[str, Any]]) -> None:
    """Prints the figures, after checking that the same share of the pairs stayed."""
    less, more = taken[small], taken[large]
    for phase in CHAIN:
        shares = [figures[phase]["kept"] / rows for rows, figures in ((small, less), (large, more))]
        assert abs(shares[0] - shares[1]) < 0.05, f"{phase} keeps {shares}: not the same work"
    times = TIME_TARGET * large / LARGE * SMALL / small
    print(
        f"BENCH scale-time: ours {more['cpu_s']:.1f} CPU s for {large}, peer {less['cpu_s']:.1f} CPU s for {small},"
        f" ratio {more['cpu_s'] / less['cpu_s']:.2f}, target <= {times:.1f} (wall {more['wall_s']:.1f} s and {less['wall_s']:.1f} s)"
    )
    print(
        f"BENCH scale-memory: ours {more['own_mb']:.0f} MB for {large}, peer {less['own_mb']:.0f} MB for {small},"
        f" ratio {more['own_mb'] / less['own_mb']:.2f}, target <= {MEMORY_TARGET}"
        f" (of its own; with the pages of mapped files {more['peak_mb']:.0f} and {less['peak_mb']:.0f} MB)"
    )


if __name__ == "__main__":
    main()
