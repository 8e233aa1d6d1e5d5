"""Where a run's outputs lie and whether they are still good: DVC's lock for a workflow as its file says it, our own keys for a variation.

A variation (overrides on the command line, a claim's arm, a sweep's trial) is an experiment of its own beside the workflow's.
It never touches `dvc.lock`; a phase whose parameters, inputs and code equal those of any finished run is taken from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.core import digest
from diptych.core.errors import ResourceError
from diptych.engine.pipeline import Pipeline, StageState
from diptych.pairs import files
from diptych.workflow import identity, restored
from diptych.workflow.project import Project
from diptych.workflow.spec import PHASES, Workflow


class Store(ABC):
    """The outputs of one run."""

    def __init__(self, project: Project, workflow: Workflow, name: str) -> None:
        self.project, self.workflow, self.name = project, workflow, name

    @property
    def home(self) -> Path:
        """The run's folder."""
        return self.project.runs / self.name

    @abstractmethod
    def state(self, phase: str) -> StageState:
        """Whether the phase must run, and why, given that its inputs are up to date."""

    @abstractmethod
    def folder(self, phase: str) -> Path:
        """Where the phase's output lies or will lie."""

    @abstractmethod
    def save(self, phase: str, figures: Mapping[str, Any]) -> None:
        """Records a finished phase with its figures."""

    @contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[list[str]]:
        """Keeps other runs out of the same outputs, and mends what a killed one left there: gives the names of what it found.

        Raises ResourceError when another run is at work, unless told to `wait` for it. The lock ends with its process.
        """
        path = self.project.runs / ".locks" / f"{self.name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                raise ResourceError.at("Another run is at work on the same outputs", self.home, f"<{file.read() or 'a lock'}>",
                                       "one run at a time", "wait for it, or stop it; then give the same command") from None  # fmt: skip
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield files.sweep(self.home)

    def figures(self, phase: str) -> dict[str, Any]:
        """What the phase's record says: seconds, counts, peak memory. Empty when there is none."""
        path = self._record(phase)
        found: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
        return found

    def _record(self, phase: str) -> Path:
        return self.home / ".records" / f"{phase}.json"

    def _write_record(self, phase: str, figures: Mapping[str, Any]) -> None:
        path = self._record(phase)
        path.parent.mkdir(parents=True, exist_ok=True)
        inputs = {name: self.folder(name) for name in identity.INPUTS[phase]}
        record = {
            "key": identity.key(phase, self.workflow.params(phase), inputs),
            "output": identity.of_output(self.folder(phase)),
            "params": self.workflow.params(phase),
            "code": identity.code(phase),
            "figures": dict(figures),
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1, default=str))
        partial.replace(path)


class PlainStore(Store):
    """The folders of a workflow's own run, with no say in what has to run: what a single DVC stage works in."""

    def state(self, phase: str) -> StageState:
        """Always to be run: DVC has already decided."""
        return StageState(phase, ("asked for",))

    def folder(self, phase: str) -> Path:
        """`runs/<workflow>/<phase>`."""
        return self.home / phase

    def save(self, phase: str, figures: Mapping[str, Any]) -> None:
        """Writes our record; DVC writes the lock."""
        self._write_record(phase, figures)


class LockedStore(PlainStore):
    """A workflow as its file says it: DVC decides and remembers."""

    def __init__(self, project: Project, workflow: Workflow) -> None:
        super().__init__(project, workflow, workflow.name)
        self._pipeline = Pipeline(project.root, workflow.path.stem, PHASES)

    @contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[list[str]]:
        """Holds DVC's lock too. `dvc repro` gives that one up while a stage runs, so ours comes first."""
        with super().locked(wait=wait) as swept, self._pipeline.locked():
            yield swept

    def state(self, phase: str) -> StageState:
        """DVC's verdict; outputs that are missing but cached are checked out first. One made elsewhere gets the record that it lacks."""
        state = self._pipeline.state(phase)
        if not state.changed and (reason := self._outside_changed(phase)):
            return StageState(phase, (reason,))
        if state.changed and all(reason.startswith("output ") for reason in state.reasons) and self._pipeline.restore(phase):
            state = StageState(phase, ())
        if not state.changed and not self._record(phase).exists():
            self._write_record(phase, restored.figures(phase, self.folder(phase)))
        return state

    def _outside_changed(self, phase: str) -> str:
        """What has changed of the files that a phase reads and DVC does not know, in words; empty if nothing has."""
        record = self._record(phase)
        if not record.exists():
            return ""
        then, now = json.loads(record.read_text())["params"], self.workflow.params(phase)
        if then.get("models") != now.get("models"):
            return "a model that its parameters name changed"
        if phase == "ingest" and then["ingest"].get("files", "") != now["ingest"]["files"]:
            return "the source's files changed"
        if phase == "evaluate" and then["evaluate"].get("sets") != json.loads(json.dumps(now["evaluate"].get("sets"))):
            return "an evaluation set's files changed"
        return ""

    def save(self, phase: str, figures: Mapping[str, Any]) -> None:
        """Writes our record, then DVC's cache and lock."""
        self._write_record(phase, figures)
        self._pipeline.save(phase)


class KeyedStore(Store):
    """A variation: outputs are found by what they depend on, wherever they were made."""

    def __init__(self, project: Project, workflow: Workflow, name: str | None = None) -> None:
        variation = digest.short(workflow.digest)[:6]
        super().__init__(project, workflow, name or f"{workflow.name}+{variation}")
        self._found: dict[str, Path] = {}

    def state(self, phase: str) -> StageState:
        """Up to date when some finished run has the same key and its output is still what was recorded."""
        inputs = {name: self.folder(name) for name in identity.INPUTS[phase]}
        missing = [name for name, path in inputs.items() if not path.exists()]
        if missing:
            return StageState(phase, tuple(f"{name} has to run first" for name in missing))
        wanted = identity.key(phase, self.workflow.params(phase), inputs)
        for record in sorted(self.project.runs.glob(f"**/.records/{phase}.json")):
            data = json.loads(record.read_text())
            folder = record.parent.parent / phase
            if data["key"] == wanted and folder.exists() and identity.of_output(folder) == data["output"]:
                self._found[phase] = folder
                return StageState(phase, ())
        return StageState(phase, tuple(self._why(phase)) or (f"its input {' or '.join(identity.INPUTS[phase])} changed",))

    def _why(self, phase: str) -> Iterator[str]:
        base = self.project.runs / self.workflow.name / ".records" / f"{phase}.json"
        if not base.exists():
            yield "never ran"
            return
        data = json.loads(base.read_text())
        now, then = _flat(self.workflow.params(phase)), _flat(data["params"])
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                yield f"{name}: {then.get(name, 'unset')} -> {now.get(name, 'unset')}"
        if data["code"] != identity.code(phase):
            yield f"code of {phase} changed"

    def folder(self, phase: str) -> Path:
        """The output found by key, else a folder of this run."""
        return self._found.get(phase, self.home / phase)

    def save(self, phase: str, figures: Mapping[str, Any]) -> None:
        """Writes the record that later runs will find."""
        self._write_record(phase, figures)

    def figures(self, phase: str) -> dict[str, Any]:
        """The record of the run that made the output."""
        path = self.folder(phase).parent / ".records" / f"{phase}.json"
        found: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
        return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: leaf for key, entry in value.items() for name, leaf in _flat(entry, f"{prefix}{key}.").items()}
    if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        return {name: leaf for i, entry in enumerate(value) for name, leaf in _flat(entry, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): list(value) if isinstance(value, tuple) else value}


def open_store(project: Project, workflow: Workflow) -> Store:
    """DVC's store for a workflow of the project as its file says it, a keyed one for anything else."""
    inside = workflow.path.parent == project.root / "workflows"
    return LockedStore(project, workflow) if inside and not workflow.overrides else KeyedStore(project, workflow)
