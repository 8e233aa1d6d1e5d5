"""Checkpoints: whole or absent. A run that goes on from one makes, on the CPU, the same bits as a run that never stopped.

A checkpoint is a directory `step-000001234/`: `model.safetensors`, `ema.safetensors` if weights are averaged,
`objective.pt` and `optimizer.pt` (read with `weights_only`), and `state.json` with the counters, the sizes of the other files, and
what the run is. There is no random state in it: every step seeds its own draws, and the data stream is a function of the step.

Kept are the newest two, the newest that was seen to be healthy (`health.py`), and the best where a run keeps one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from diptych.core.errors import ConfigError, DataError, Problem, shorten
from diptych.train import sharding
from diptych.train.ema import Ema

FORMAT = 1
KEPT = 2
Value = TypeVar("Value")


@dataclass
class TrainState:
    """Everything that changes while a run trains.

    Attributes:
        growth: of a growing batch (`growth.py`).
        best: of the best checkpoint so far (`best.py`).
        healthy_step: the last step whose weights were seen to be sound, and `spread` the most that each tower has shown (`health.py`).
    """

    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0
    samples_seen: int = 0
    growth: dict[str, int] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    healthy_step: int = 0
    spread: dict[Any, float] = field(default_factory=dict)

    def counters(self) -> dict[str, Any]:
        """What is no tensor, as plain data."""
        return {name: getattr(self, name) for name in COUNTERS}


def is_shared_out(state: TrainState) -> bool:
    """Whether the model's weights are shared out over the workers (`sharding.py`)."""
    return any(sharding.is_sharded(parameter) for parameter in state.model.parameters())


COUNTERS = ("step", "samples_seen", "growth", "best", "healthy_step", "spread")


class _Writer:
    """Writes one checkpoint at a time in a thread of its own. The thread is started for it and ends with it."""

    def __init__(self) -> None:
        self.writing: Future[Path] | None = None

    def begin(self, work: Callable[[], Path]) -> None:
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing = pool.submit(work)
        pool.shutdown(wait=False)

    def wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in one folder.

    Attributes:
        folder: where they lie; every rank must be able to read it.
        identity: plain data that names the run (data, settings, seed); a checkpoint of another run is refused.
    """

    folder: Path
    identity: Mapping[str, Any]
    _writer: _Writer = field(default_factory=_Writer, repr=False, compare=False)

    def save(self, state: TrainState, *, later: bool = False, write: bool = True) -> Path:
        """Writes a checkpoint under a temporary name, makes it durable, renames it, and removes those that are not kept.

        Where weights are shared out over the workers, all of them call it, and one with `write`.

        With `later` a copy of the state is made in memory and written by a thread while training goes on; it waits for the one before
        it. What goes wrong in the thread is raised by the next call, or by `wait`.
        """
        self.wait()
        parts: dict[str, Mapping[str, Any]] = {name: module.state_dict() for name, module in _modules(state)}
        parts |= {"objective.pt": state.objective.state_dict(), "optimizer.pt": state.optimizer.state_dict()}
        counters = json.loads(json.dumps(state.counters()))
        if is_shared_out(state):
            parts = sharding.whole(parts)
        if not write:
            return self._path(state.step)
        if later:
            copies: dict[Any, Tensor] = {}
            parts = _copied(parts, copies)
            self._writer.begin(lambda: self._write(parts, counters))
        else:
            self._write(parts, counters)
        return self._path(state.step)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole. Raises what went wrong with it."""
        self._writer.wait()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _write(self, parts: Mapping[str, Mapping[str, Any]], counters: Mapping[str, Any]) -> Path:
        final = self._path(counters["step"])
        partial = self.folder / f".partial-{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, part in parts.items():
            if name.endswith(".pt"):
                torch.save(part, partial / name)
            else:
                _save_tensors(part, partial / name)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        record = {"format": FORMAT, **counters, "identity": self.identity, "size_bytes": sizes}
        (partial / "state.json").write_text(json.dumps(record, indent=1))
        for path in [*partial.iterdir(), partial]:
            _make_durable(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _make_durable(self.folder)
        self._remove_old(counters)
        return final

    def _remove_old(self, counters: Mapping[str, Any]) -> None:
        every = self._all()
        healthy = [path for path in every if _step(path) <= counters["healthy_step"]]
        kept = {*every[:KEPT], *healthy[:1]}
        for old in every:
            if old not in kept and _step(old) != counters["best"].get("step"):
                shutil.rmtree(old)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. One that lacks a part is passed over."""
        return next((path for path in self._all() if not _missing(path)), None)

    def of_step(self, step: int) -> Path:
        """The checkpoint of a step, which was kept. Raises DataError if it is not whole."""
        if missing := _missing(self._path(step)):
            raise DataError.at("A kept checkpoint is gone", self._path(step), missing, "a whole checkpoint", "train afresh")
        return self._path(step)

    def withdraw(self, healthy_step: int) -> Path | None:
        """Removes the checkpoints of steps after `healthy_step`, of which nobody knows whether they are sound; the newest that stays."""
        self.wait()
        for path in self._all():
            if _step(path) > healthy_step:
                shutil.rmtree(path)
        return self.latest()

    def restore(self, path: Path, state: TrainState) -> None:
        """Loads a checkpoint into `state`: all of it, or nothing.

        Raises DataError naming the parts that are missing, ConfigError naming what differs if the checkpoint is another run's.
        """
        if missing := _missing(path):
            raise DataError(
                "The checkpoint is not whole", [Problem(str(path / name), "nothing, or another size", "a part") for name in missing]
            )
        record = json.loads((path / "state.json").read_text())
        self._refuse_other_run(path, record["identity"])
        for name, _ in _modules(state):
            if name not in record["size_bytes"]:
                raise DataError.at("The checkpoint lacks a part of this run", path, sorted(record["size_bytes"]), name)
        device = next(state.model.parameters()).device
        shared = is_shared_out(state)
        for name, module in _modules(state):
            if shared:
                sharding.load(module, load_file(path / name, device=str(device)))
            else:
                load_model(module, path / name, strict=True, device=str(device))
        state.objective.load_state_dict(torch.load(path / "objective.pt", map_location=device, weights_only=True))
        moments = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
        state.optimizer.load_state_dict(sharding.optimizer_state(state.optimizer, moments) if shared else moments)
        for name in COUNTERS:
            setattr(state, name, record.get(name, getattr(state, name)))

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _refuse_other_run(self, path: Path, found: Mapping[str, Any]) -> None:
        expected = json.loads(json.dumps(self.identity))
        problems = [
            Problem(f"{path}: {name}", shorten(found.get(name)), shorten(expected.get(name)), "remove the checkpoints to start afresh")
            for name in sorted({*found, *expected})
            if found.get(name) != expected.get(name)
        ]
        if problems:
            raise ConfigError("The checkpoint was made by another run", problems)


def _modules(state: TrainState) -> Iterator[tuple[str, nn.Module]]:
    yield "model.safetensors", state.model
    if state.ema is not None:
        yield "ema.safetensors", state.ema.model


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _copied(value: Value, copies: dict[Any, Tensor]) -> Value:
    """Plain data with every tensor copied to the CPU; tensors that were one stay one."""
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {key: _copied(entry, copies) for key, entry in value.items()}  # type: ignore[return-value]
    return type(value)(_copied(entry, copies) for entry in value) if isinstance(value, list | tuple) else value


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes safetensors; of names for one tensor the first is kept, as `load_model` understands."""
    kept: dict[str, Tensor] = {}
    owner: dict[Any, str] = {}
    twins: dict[str, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        first = owner.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name, name)
        if first == name:
            kept[name] = tensor.contiguous()
        else:
            twins[name] = first
    save_file(kept, str(path), metadata=twins or None)


def _missing(path: Path) -> list[str]:
    """The names of the parts that a checkpoint lacks."""
    try:
        sizes: dict[str, int] = json.loads((path / "state.json").read_text())["size_bytes"]
    except (OSError, ValueError, KeyError):
        return ["state.json"]
    needed = {"model.safetensors", "objective.pt", "optimizer.pt", *sizes}
    return sorted(name for name in needed if not (path / name).is_file() or (path / name).stat().st_size != sizes.get(name))


def _make_durable(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
