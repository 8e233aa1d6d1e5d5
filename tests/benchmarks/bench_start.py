"""How long a person waits for nothing: `diptych --help`, and `diptych run` when everything is cached, each beside its limit.

    python tests/benchmarks/bench_start.py [--rounds 5]

Help is CPU seconds; a cached run is wall seconds from the shell's point of view, as a person waits for it. What the help of DVC and
MLflow, and a `dvc repro` that has nothing to do, cost on this machine stands beside them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 5
HELP_LIMIT_CPU_S, CACHED_LIMIT_S = 0.25, 10.0


@dataclass(frozen=True)
class Cost:
    """What a command took, its children included."""

    wall_s: float
    cpu_s: float

    @classmethod
    def of(cls, module: str, arguments: Sequence[str], folder: Path, expected: str) -> Cost:
        """Runs `python -m module …` to its end; its output must hold `expected`."""
        with tempfile.TemporaryFile("w+") as output:
            started = time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=folder, stdout=output, stderr=output)
            _, status, used = os.wait4(process.pid, 0)
            wall_s = time.monotonic() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            text = output.read()
        assert process.returncode == 0, text
        assert expected in text, text
        return cls(wall_s, used.ru_utime + used.ru_stime)


def best(commands: Mapping[str, tuple[str, Sequence[str], str]], folder: Path, rounds: int) -> dict[str, Cost]:
    """The cheapest of several interleaved rounds, a command."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (module, arguments, expected) in commands.items():
            costs[name].append(Cost.of(module, arguments, folder, expected))
    return {name: Cost(min(c.wall_s for c in found), min(c.cpu_s for c in found)) for name, found in costs.items()}


def main() -> None:
    """Makes a project, runs it once, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    sys.path.append(str(ROOT))
    from tests.projects import WORKFLOW, make_project

    os.environ["DVC_NO_ANALYTICS"] = "1"
    for name in ("PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="bench-start-") as scratch:
        project = make_project(Path(scratch) / "project", WORKFLOW)
        diptych = "diptych.cli.main"
        Cost.of(diptych, ["run", "small", "--in-process"], project, "small: done")
        cost = best(
            {
                "help": (diptych, ["--help"], "diptych run quickstart"),
                "cached": (diptych, ["run", "small"], "everything cached, nothing to do"),
                "dvc help": ("dvc", ["--help"], "repro"),
                "mlflow help": ("mlflow", ["--help"], "server"),
                "dvc repro": ("dvc", ["repro", "evaluate@small"], "Data and pipelines are up to date"),
            },
            project,
            rounds,
        )
    ours, limit = cost["help"].cpu_s, HELP_LIMIT_CPU_S
    print(
        f"BENCH help: ours {ours:.2f} CPU s, peer {limit:.2f} CPU s, ratio {ours / limit:.2f}, target <= 1"
        f" (the peer is the limit; dvc {cost['dvc help'].cpu_s:.2f}, mlflow {cost['mlflow help'].cpu_s:.2f} CPU s)"
    )
    ours, limit = cost["cached"].wall_s, CACHED_LIMIT_S
    print(
        f"BENCH cached-run: ours {ours:.1f} s, peer {limit:.1f} s, ratio {ours / limit:.2f}, target <= 1"
        f" (the peer is the limit; {cost['cached'].cpu_s:.1f} CPU s; a dvc repro with nothing to do {cost['dvc repro'].wall_s:.1f} s)"
    )


if __name__ == "__main__":
    main()
