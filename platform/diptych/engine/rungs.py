"""A training that is measured on the way, so that a scheduler can stop a poor one early. It stops and goes on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from diptych.engine import training


def interim_models(job: training.Job, rungs: int) -> Iterator[Path]:
    """Trains in this process and gives a model directory after each of `rungs` equal parts but the last.

    The learning-rate schedule is that of the whole run. The last part is left to whoever runs the training as such: it goes on
    from the checkpoint, to the model that an undivided run makes. Gives fewer models where a run is too short to be cut.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    for rung in range(1, rungs):
        seen: dict[str, Any] = {}
        training.work(job, 0, 1, on_log=seen.update, should_stop=partial(_reached, seen, rung / rungs))
        if job.out.exists():
            return
        yield _interim(job)


def _reached(record: dict[str, Any], share: float) -> bool:
    return bool(record) and record["step"] >= share * record["steps"]


def _interim(job: training.Job) -> Path:
    """The model in the newest checkpoint as a directory of its own."""
    from safetensors.torch import load_model

    from diptych.models import clip

    newest = max(job.scratch.glob("checkpoints/step-*"))
    averaged = newest / "ema.safetensors"
    model = clip.create(job.model if job.init == "random" else job.init, job.seed)
    load_model(model, averaged if averaged.exists() else newest / "model.safetensors", strict=True)
    folder = job.scratch / "interim"
    clip.save(model, folder, {"checkpoint": newest.name})
    return folder
