"""A run's results as they lie on disk, found again by the run's name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diptych.core.errors import ConfigError, nearest
from diptych.core.points import Metric
from diptych.workflow.project import Project

SWEEP_SUMMARY = "sweep.json"
"""What a sweep found, beside its table: the winner and its figures, as the phase's record has them."""


@dataclass(frozen=True)
class Result:
    """An evaluated run."""

    name: str
    home: Path

    def record(self, phase: str) -> dict[str, Any]:
        """The phase's record, empty when the phase was taken over from another run or never ran."""
        path = self.home / ".records" / f"{phase}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @property
    def rows(self) -> pl.DataFrame:
        """The evaluation table in long form."""
        return pl.read_parquet(self.home / "evaluate" / "rows.parquet")

    def metrics(self) -> list[Metric]:
        """The rows with their per-example values, ready for paired tests; single draws are left out."""
        examples = pl.read_parquet(self.home / "evaluate" / "examples.parquet")
        by_metric = {tuple(map(str, key)): frame for key, frame in examples.partition_by("set", "task", "metric", as_dict=True).items()}
        return [
            _metric(row, by_metric.get((row["set"], row["task"], row["metric"])))
            for row in self.rows.iter_rows(named=True)
            if row.get("seed") is None
        ]


def _metric(row: dict[str, Any], examples: pl.DataFrame | None) -> Metric:
    keys = examples["key"].to_list() if examples is not None else ()
    values = examples["value"].to_numpy() if examples is not None else None
    settings = json.loads(row["settings"])
    return Metric(row["set"], row["task"], row["metric"], row["value"], row["n"], row["low"], row["high"], settings, keys, values)


def evaluated(project: Project) -> dict[str, Result]:
    """All evaluated runs of a project by name."""
    folders = sorted(path.parent.parent for path in project.runs.glob("**/evaluate/rows.parquet") if ".partial" not in str(path))
    return {folder.relative_to(project.runs).as_posix(): Result(folder.relative_to(project.runs).as_posix(), folder) for folder in folders}


def find(project: Project, name: str) -> Result:
    """The evaluated run of that name. Raises ConfigError with the nearest."""
    known = evaluated(project)
    if name in known:
        return known[name]
    raise ConfigError.at("There is no evaluated run of that name", "run", name, f"one of {', '.join(known) or 'none yet'}",
                         nearest(name, known) or "diptych run … first")  # fmt: skip
