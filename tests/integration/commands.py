"""The command line as a user has it: a process of its own, with all that it starts, that can be watched, stopped and killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from diptych.core import digest
from diptych.pairs.dataset import PairDataset

MARK = "DIPTYCH_TEST_MARK"
GONE_S = 30.0  # ten seconds are promised on an idle machine; a test that shares its cores allows for the load
"""No process of a run may outlive it by more than this."""
ORPHANED_S = 90.0
"""The same after `kill -9` of the driver, when nobody tells the others: Ray's agents find out by themselves."""
PATIENCE_S = 280.0
"""How long a test waits for what must happen: generous, for a machine that is busy with other things."""

PAIR_PHASES = ("ingest", "curate", "prune", "caption")
WEIGHTS = "train/open_clip_model.safetensors"


@dataclass
class Command:
    """A started `diptych …` in a process group of its own, as a terminal starts it. Its output goes to a file."""

    arguments: tuple[str, ...]
    project: Path
    core: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.log = self.project / f"command-{self.mark[:8]}.log"
        hidden = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        pinned = [] if self.core is None else ["taskset", "-c", str(self.core)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*pinned, sys.executable, "-m", "diptych.cli.main", *self.arguments],
                cwd=self.project, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**environment, **self.environment, MARK: self.mark},
            )  # fmt: skip

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def family(self, name: str = "") -> list[psutil.Process]:
        """The processes that descend from it and live, whoever their parent is now; with `name`, those whose command line holds it."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and name in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def until(self, happened: Callable[[], Any], what: str) -> Self:
        """Waits until something is seen while the command runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.text[-4000:]}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.text[-4000:]}"
            time.sleep(0.005)
        return self

    def done(self, code: int = 0) -> Self:
        """Waits for its end and compares the exit code."""
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still at work after {PATIENCE_S} s:\n{self.text[-4000:]}") from None
        assert self.process.returncode == code, f"ended with {self.process.returncode}, not {code}:\n{self.text[-4000:]}"
        assert "Traceback" not in self.text, self.text
        return self

    def kill(self) -> None:
        """`kill -9` of the driver alone; everything else must go by itself."""
        self.process.kill()
        self.process.wait()
        self.leaves_nobody(ORPHANED_S)

    def stop(self, how: signal.Signals) -> None:
        """Ctrl-C, which a terminal sends to the whole group, or SIGTERM to the driver; it must end cleanly within ten seconds."""
        started = time.monotonic()
        if how == signal.SIGINT:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        self.done(130)
        took_s = time.monotonic() - started
        assert took_s < GONE_S, f"took {took_s:.1f} s to stop"
        assert "stopped cleanly; the same command continues from here" in self.text, self.text
        self.leaves_nobody()

    def leaves_nobody(self, within_s: float = GONE_S) -> None:
        """No process that the command started is left after so many seconds."""
        deadline = time.monotonic() + within_s
        while family := self.family():
            assert time.monotonic() < deadline, [" ".join(process.cmdline()) for process in family]
            time.sleep(0.1)

    def end(self) -> None:
        """Makes sure that nothing of it is left, whatever a test has found."""
        for process in self.family():
            process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Results:
    """What a run must give again: the pair datasets by their digests, the model's file by its bytes, the figures."""

    datasets: Mapping[str, str]
    model: str

    @classmethod
    def of(cls, run: Path) -> Results:
        """Reads them, tables checked to the last byte."""
        return cls(pairs_of(run), digest.of_file(run / WEIGHTS))


def pairs_of(run: Path) -> dict[str, str]:
    """The digests of the pair datasets."""
    return {phase: PairDataset.open(run / phase, verify=True).digest for phase in PAIR_PHASES if (run / phase).exists()}


def unfinished(project: Path) -> list[Path]:
    """Half-written outputs under a name that a reader looks at, and what a stopped writer should have taken away."""
    named = [path for path in (project / "runs").glob("*/*") if path.is_dir() and path.name in PAIR_PHASES]
    return [path for path in named if not (path / "manifest.json").exists()] + list((project / "runs").glob("[!.]*/*.partial*"))


def steps_logged(project: Path) -> int:
    """Steps that training has recorded so far."""
    logs = list((project / "runs" / ".scratch").glob("*/train-*/steps.jsonl"))
    return logs[0].read_bytes().count(b"\n") if logs else 0


def checkpoints(project: Path) -> list[Path]:
    """The whole checkpoints of the training under way."""
    return list((project / "runs" / ".scratch").glob("*/train-*/checkpoints/step-*/state.json"))


def pieces(project: Path, pattern: str) -> int:
    """Finished pieces of a pass under way."""
    return len(list((project / "runs" / ".scratch").glob(f"*/*/*/{pattern}")))


def parent_statuses(project: Path) -> list[str]:
    """How MLflow says that the workflow's runs ended, the oldest first."""
    with sqlite3.connect(project / "mlflow.db") as database:
        query = "select r.status from runs r where r.name not like '%/%' order by r.start_time"
        return [status for (status,) in database.execute(query)]
