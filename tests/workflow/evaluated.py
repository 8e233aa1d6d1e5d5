"""Evaluated runs on disk, made of values: what a comparison reads, without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from diptych.core import digest
from diptych.core.points import Metric
from diptych.engine import evaluation
from diptych.workflow.identity import INPUTS
from diptych.workflow.project import Project

EXAMPLES = 60
KEYS = [f"k{i:02}" for i in range(EXAMPLES)]


def empty_project(folder: Path) -> Project:
    """A project without workflows."""
    (folder / "dvc.yaml").touch()
    return Project(folder)


def figures(seed: int, lift: float, name: str = "s", **settings: Any) -> list[Metric]:
    """Accuracy, log loss and a median of a made-up model: the higher `lift`, the better."""
    ease = np.random.default_rng(0).standard_normal(EXAMPLES)
    noise = np.random.default_rng(seed).standard_normal(EXAMPLES) * 0.1
    loss = np.logaddexp(0, -ease - noise - lift).astype(np.float32)
    hit = (loss < np.log(2)).astype(np.float32)
    same = {"templates": "sha256:" + "ab" * 32, "preprocessing": {"resize": "bicubic"}, **settings}
    return [
        Metric(name, "zero-shot", "acc1", float(hit.mean()), EXAMPLES, 0, 1, same, KEYS, hit),
        Metric(name, "zero-shot", "log_loss", float(loss.mean()), EXAMPLES, 0, 9, same, KEYS, loss),
        Metric(name, "retrieval", "median_rank", 1 + float(np.median(loss)), EXAMPLES, 1, 2, same),
    ]


def write_run(project: Project, name: str, metrics: list[Metric], records: Mapping[str, Any] | None = None, **provenance: str) -> None:
    """An evaluated run: its rows, values by example and records."""
    home = project.runs / name
    (home / "evaluate").mkdir(parents=True)
    evaluation.long_form(metrics, {"model": name, "dataset": "d", "code": "c", **provenance}).write_parquet(home / "evaluate/rows.parquet")
    frame: pl.DataFrame = evaluation.per_example(metrics)
    frame.write_parquet(home / "evaluate/examples.parquet")
    (home / ".records").mkdir()
    for phase, record in (records or {"evaluate": {"params": {"seed": 0}}}).items():
        (home / ".records" / f"{phase}.json").write_text(json.dumps(record))


def record(phase: str, params: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A record as a store writes it, of a phase that read the outputs of `inputs`."""
    read = {name: inputs[name]["output"] for name in INPUTS[phase]}
    key = digest.of_plain([phase, dict(params), "code", read])
    return {"key": key, "output": digest.of_plain(["output of", key]), "params": dict(params), "code": "code"}
