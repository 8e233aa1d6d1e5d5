"""Ray Train with one worker beside the bare loop: the same training, the same model to the bit, samples a CPU second in the loop.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_ray_train.py [--steps 150] [--rounds 3]

Ours is `engine/training.py` on a local Ray session; the peer is `diptych.train.run.train` in a plain process, fresh every round as Ray's
worker is. Both report the CPU seconds of the process that trains, all its threads included, from entering `fit` to leaving it. Beside that
the time from `training.run` to the first step is shown: what it costs to start on Ray, in wall seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych.core import catalogue, digest
from diptych.engine import training
from diptych.engine.session import Session
from diptych.train.config import TrainConfig

MODEL, BATCH, STEPS, ROUNDS, TARGET = "vit-micro-40", 64, 150, 3, 0.97


def job(folder: Path, name: str, steps: int) -> training.Job:
    """The training, with places of its own."""
    config = TrainConfig.parse({"steps": steps, "batch_size": BATCH})
    return training.Job(
        folder / "pairs", config, MODEL, "random", {"method": "clip"}, {"method": "adamp", "lr": 1e-3},
        folder / name / "model", folder / name / "scratch", seed=0, workers=1,
    )  # fmt: skip


def ingest(folder: Path) -> None:
    """The digits as a pair dataset."""
    from diptych.pairs.ingest import ingest_all

    source = catalogue.config_class(catalogue.find("digits")).parse({"method": "digits", "size_px": 40})
    ingest_all(source.build(), folder / "pairs", version="0")  # type: ignore[attr-defined]


def note_times(scratch: Path) -> None:
    """Makes `train` of this process leave `times.json`: when this was called, when the loop began (wall clock), and the CPU it took."""
    called = time.time()
    run: Any = importlib.import_module("diptych.train.run")
    fit = run.fit

    def noted(*arguments: Any) -> Any:
        entered, cpu = time.time(), time.process_time()
        record = fit(*arguments)
        times = {"called": called, "entered": entered, "cpu_s": time.process_time() - cpu, "before_s": cpu}
        (scratch / "times.json").write_text(json.dumps(times))
        return record

    run.fit = noted


def noted_worker(settings: Mapping[str, Any]) -> None:
    """Runs on Ray's worker: `training._ray_worker` with its times noted."""
    from diptych.engine import training

    note_times(settings["job"].scratch)
    training._ray_worker(settings)


def ours(task: training.Job, session: Session) -> dict[str, float]:
    """On Ray; `start_s` is wall seconds from the call to the loop, `worker_s` those of them before the worker's function was entered."""
    started = time.time()
    training.run(task, session)
    times: dict[str, float] = json.loads((task.scratch / "times.json").read_text())
    return times | {"start_s": times["entered"] - started, "worker_s": times["called"] - started}


def peer(folder: Path, name: str, steps: int) -> dict[str, float]:
    """The bare loop in a process of its own."""
    task = job(folder, name, steps)
    started = time.time()
    subprocess.run([sys.executable, __file__, "--bare", str(folder), name, "--steps", str(steps)], check=True)
    times: dict[str, float] = json.loads((task.scratch / "times.json").read_text())
    return times | {"start_s": times["entered"] - started}


def bare(task: training.Job) -> None:
    """What the peer's process does: no Ray, no session."""
    task.scratch.mkdir(parents=True)
    note_times(task.scratch)
    training.work(task, 0, 1)
    assert "ray" not in sys.modules


def main() -> None:
    """Runs both in turn and prints one line; fails if a model differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--bare", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(job(Path(options.bare[0]), options.bare[1], options.steps))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # Ray's workers inherit it
    training._ray_worker, untouched = noted_worker, training._ray_worker
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    models: dict[str, str] = {}
    try:
        with tempfile.TemporaryDirectory() as name, Session() as session:
            folder = Path(name)
            ingest(folder)
            for number in range(options.rounds):
                task = job(folder, f"ours-{number}", options.steps)
                rows["ours"].append(ours(task, session))
                rows["peer"].append(peer(folder, f"peer-{number}", options.steps))
                for side in rows:
                    models[f"{side}-{number}"] = digest.of_file(folder / f"{side}-{number}" / "model" / "open_clip_model.safetensors")
    finally:
        training._ray_worker = untouched
    assert len(set(models.values())) == 1, f"models differ: {models}"
    report(rows, options.steps)


def report(rows: dict[str, list[dict[str, float]]], steps: int) -> None:
    """Prints the best of the rounds."""
    best = {side: BATCH * steps / min(row["cpu_s"] for row in found) for side, found in rows.items()}
    first, later = rows["ours"][0], min(rows["ours"], key=lambda row: row["start_s"])
    print(
        f"start to first step: on Ray {first['start_s']:.1f} s in the first run, {later['start_s']:.1f} s in the best"
        f" ({later['worker_s']:.1f} s until the worker runs, then {later['start_s'] - later['worker_s']:.1f} s of imports and reading;"
        f" {later['before_s']:.1f} CPU s), bare {min(row['start_s'] for row in rows['peer']):.1f} s"
    )
    print(
        f"BENCH ray-train: ours {best['ours']:.0f} samples/CPU s, peer {best['peer']:.0f} samples/CPU s,"
        f" ratio {best['ours'] / best['peer']:.3f}, target {TARGET} (models equal to the bit after {steps} steps)"
    )


if __name__ == "__main__":
    main()
