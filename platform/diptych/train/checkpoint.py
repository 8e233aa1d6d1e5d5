"""Checkpoints: whole or absent. A run that goes on from one makes, on the CPU, the same bits as a run that never stopped.

A checkpoint is a directory `step-000001234/`: `model.safetensors`, `ema.safetensors` if weights are averaged,
`objective.pt` and `optimizer.pt` (read with `weights_only`), and `state.json` with the counters, the sizes of the other files, and
what the run is. There is no random state in it: every step seeds its own draws, and the data stream is a function of the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from diptych.core.errors import ConfigError, DataError, Problem, shorten
from diptych.train.ema import Ema

FORMAT = 1
KEPT = 2


@dataclass
class TrainState:
    """Everything that changes while a run trains."""

    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0
    samples_seen: int = 0
    growth: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in one folder; the newest two are kept.

    Attributes:
        folder: where they lie; every rank must be able to read it.
        identity: plain data that names the run (data, settings, seed); a checkpoint of another run is refused.
    """

    folder: Path
    identity: Mapping[str, Any]

    def save(self, state: TrainState) -> Path:
        """Writes a checkpoint under a temporary name, makes it durable, renames it, and removes those older than the newest two."""
        final = self.folder / f"step-{state.step:09d}"
        partial = self.folder / f".partial-{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, module in _modules(state):
            save_model(module, str(partial / name))
        torch.save(state.objective.state_dict(), partial / "objective.pt")
        torch.save(state.optimizer.state_dict(), partial / "optimizer.pt")
        record = {
            "format": FORMAT,
            "step": state.step,
            "samples_seen": state.samples_seen,
            "growth": state.growth,
            "identity": self.identity,
            "size_bytes": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
        }
        (partial / "state.json").write_text(json.dumps(record, indent=1))
        for path in [*partial.iterdir(), partial]:
            _make_durable(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _make_durable(self.folder)
        for old in self._all()[KEPT:]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. One that lacks a part is passed over."""
        return next((path for path in self._all() if not _missing(path)), None)

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
        for name, module in _modules(state):
            load_model(module, path / name, strict=True, device=str(device))
        state.objective.load_state_dict(torch.load(path / "objective.pt", map_location=device, weights_only=True))
        state.optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location=device, weights_only=True))
        state.step, state.samples_seen = record["step"], record["samples_seen"]
        state.growth = record.get("growth", {})

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
