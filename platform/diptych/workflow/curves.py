"""The curves of a training: which figures of its step log are drawn in the report and sent to MLflow, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.workflow import charts

MAX_CURVES = 36
NOT_CURVES = frozenset({"step", "steps", "epoch", "samples_seen", "read_s", "decode_s"})
TITLES: Mapping[str, str] = {
    "loss": "loss",
    "val_loss": "loss of the split val",
    "accuracy": "in-batch accuracy",
    "lr": "learning rate",
    "logit_scale": "logit scale",
    "grad_norm": "gradient norm",
    "batch_size": "pairs an update",
    "image_rank": "rank of the image embeddings",
    "text_rank": "rank of the text embeddings",
    "image_uniformity": "uniformity of the image embeddings",
    "text_uniformity": "uniformity of the text embeddings",
    "alignment": "distance of the two sides of a pair, squared",
    "samples_per_s": "pictures/s",
    "data_wait_s": "wait for data, s a step",
    "step_s": "computing, s a step",
    "sync_s": "synchronising, s a step",
}
"""In this order; parts of a loss that a method names come after the losses, under their own names."""


def names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures of a step log that make curves: those known here, and whatever the objective and the optimizer added."""
    found = dict.fromkeys(name for record in records for name, value in record.items() if isinstance(value, int | float))
    known = [name for name in TITLES if name in found]
    parts = [name for name in found if name not in TITLES and name not in NOT_CURVES]
    losses = [name for name in ("loss", "val_loss") if name in known]
    return [*losses, *parts, *known[len(losses) :]][:MAX_CURVES]


def metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The same by the names that MLflow knows them under."""
    return {name: f"train/{name}" for name in names(records)}


def drawn(records: Sequence[Mapping[str, Any]]) -> str:
    """The curves as SVGs; values that are not finite are left out."""
    lines = []
    for name in names(records):
        points = [(record["step"], record[name]) for record in records if name in record and math.isfinite(record[name])]
        if points:
            lines.append(charts.line(TITLES.get(name, name), *zip(*points, strict=True)))
    return "".join(lines)
