"""Results as CLIP_benchmark 1.6 writes them: a JSON file a model, set and task, and one CSV over all, for tools that read these."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

LANGUAGE = "en"
TASKS = {"zero-shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
DIRECTIONS = {"text_to_image_r": "image_retrieval_recall@", "image_to_text_r": "text_retrieval_recall@"}
FIVE = 5


def write(rows: pl.DataFrame, models: Mapping[str, str], folder: Path) -> list[Path]:
    """Writes what CLIP_benchmark has a name for; gives the JSON files.

    Args:
        rows: the evaluation table with the column `checkpoint`.
        models: name -> what the model is; `open_clip:ARCHITECTURE/TAG` is split into `model` and `pretrained`, any other is both.
        folder: an empty folder.
    """
    entries = list(_entries(rows, models))
    written = []
    for entry in entries:
        name = "_".join(entry[key].replace("/", "-") for key in ("dataset", "pretrained", "model", "language", "task"))
        written.append(folder / f"{name}.json")
        written[-1].write_text(json.dumps(entry))
    flat = [
        {**entry["metrics"], **{key: value for key, value in entry.items() if key != "metrics"},
         "model_fullname": f"{entry['model']} {entry['pretrained']}"}
        for entry in entries
    ]  # fmt: skip
    names = sorted({name for row in flat for name in row})
    with (folder / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)
    return written


def _entries(rows: pl.DataFrame, models: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    single = rows.filter(pl.col("seed").is_null() & pl.col("task").is_in(list(TASKS)))
    for (checkpoint, name, task), group in single.group_by("checkpoint", "set", "task", maintain_order=True):
        values = dict(group.select("metric", "value").iter_rows())
        settings = json.loads(group["settings"][0])
        model, pretrained = _named(str(checkpoint), models[str(checkpoint)])
        metrics = _classification(values, settings) if task == "zero-shot" else _retrieval(values)
        yield {
            "dataset": str(name), "model": model, "pretrained": pretrained, "task": TASKS[str(task)], "metrics": metrics, "language": LANGUAGE,
        }  # fmt: skip


def _named(checkpoint: str, model: str) -> tuple[str, str]:
    if model.startswith("open_clip:"):
        architecture, _, tag = model.removeprefix("open_clip:").rpartition("/")
        return architecture, tag
    return checkpoint, model


def _classification(values: Mapping[str, float], settings: Mapping[str, Any]) -> dict[str, float]:
    """Top 5 of five classes is all of them, of fewer there is none."""
    missing = 1.0 if settings["classes"] == FIVE else math.nan
    return {"acc1": values["acc1"], "acc5": values.get("acc5", missing), "mean_per_class_recall": values["mean_per_class"]}


def _retrieval(values: Mapping[str, float]) -> dict[str, float]:
    return {
        f"{theirs}{metric.removeprefix(ours)}": value
        for metric, value in values.items()
        for ours, theirs in DIRECTIONS.items()
        if metric.startswith(ours) and metric.removeprefix(ours).isdecimal()
    }
