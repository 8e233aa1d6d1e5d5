"""A workflow's sweep: any value of the workflow as an axis, chosen on one split, reported on another."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from diptych.core import digest
from diptych.core.errors import ConfigError, DataError, nearest
from diptych.engine import evaluation, sweeps
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset
from diptych.workflow import identity, spec, trials
from diptych.workflow.results import SWEEP_SUMMARY

if TYPE_CHECKING:
    from diptych.workflow.phases import Bench


RUNGS = 4
"""Parts of a training after which ASHA compares settings."""
LOW, HIGH = "/low", "/high"
"""What stands behind a figure's name where its interval's ends are carried beside it."""


@dataclass(frozen=True)
class Trial:
    """Everything that a setting's evaluation needs; plain data, so that it travels to Tune's workers."""

    raw: dict[str, Any]
    path: Path
    model: Path
    dataset: Path
    cache: Path
    rungs: int
    choose_on: str
    remakes: bool
    name: str

    def __call__(self, setting: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
        """The metrics of a setting on the split that the winner is chosen on."""
        for workflow, encoder, finished in self._models(setting):
            found = with_intervals(evaluation.measure(encoder, on_split(workflow, self.choose_on), self.name, workflow.seed))
            yield {**found, sweeps.FINISHED: float(finished)}

    def final(self, setting: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """The metrics of a setting as the workflow itself reports them, with intervals."""
        workflow, encoder, _ = list(self._models(setting))[-1]
        found = evaluation.measure(encoder, workflow.benchmarks, self.name, workflow.seed)
        return evaluation.figures(found)

    def workflow(self, setting: Mapping[str, Any]) -> spec.Workflow:
        """The workflow with the setting applied and the sweep taken out: an ordinary experiment."""
        raw = copy.deepcopy(self.raw)
        raw["evaluate"] = {**raw["evaluate"], "sweep": None}
        for key, value in setting.items():
            spec.set_value(raw, key.split("."), value, key)
        overrides = tuple(f"{key}={value}" for key, value in sorted(setting.items()))
        return spec.check(raw, self.path, overrides)

    def _models(self, setting: Mapping[str, Any]) -> Iterator[tuple[spec.Workflow, evaluation.StoredEncoder, bool]]:
        workflow = self.workflow(setting)
        made = trials.models(workflow, self.rungs) if self.remakes else [trials.Made(self.model, self.dataset, True)]
        for model, dataset, finished in made:
            yield workflow, evaluation.StoredEncoder(model, PairDataset.open(dataset), self.cache), finished


def run(bench: Bench, out: Path) -> dict[str, Any]:
    """Runs the workflow's sweep: writes `sweep.parquet` and `sweep.json` to `out`, gives the winner and its figures, as the latter holds them."""
    workflow = bench.workflow
    config = workflow.sweep
    assert config is not None
    trial = Trial(
        dict(workflow.raw), workflow.path, bench.folder("compress").resolve(), bench.folder("ingest").resolve(), (bench.cache / "encoded").resolve(),
        RUNGS if config.scheduler == "asha" else 1, config.choose_on, not all(key.startswith("evaluate.") for key in config.space),
        str(workflow.source.plain()["method"]),
    )  # fmt: skip
    warm(trial, bench.session)
    grid = (
        [dict(zip(config.space, point, strict=True)) for point in itertools.product(*_choices(config))] if config.search == "grid" else None
    )
    made_from = [identity.of_output(bench.folder(phase)) for phase in ("compress", "ingest")] + [identity.code("evaluate")]
    scratch = bench.scratch / f"sweep-{digest.short(digest.of_plain([config.plain(), workflow.digest, *made_from]))}"
    rows = sweeps.run(
        trial, grid, {key: _axis(axis) for key, axis in config.space.items()}, sweeps.Table(scratch / "results.jsonl"), bench.session,
        search=config.search, scheduler=config.scheduler, trials=config.trials or 1, metric=config.metric, mode=config.mode,
        seed=workflow.seed, scratch=scratch / "tune", max_iterations=trial.rungs,
    )  # fmt: skip
    failed = [row for row in rows if row["status"] == "error"]
    if len(failed) == len(rows):
        raise DataError.at("Every setting of the sweep failed", "evaluate.sweep", rows[0]["setting"], "a setting that can be measured",
                           rows[0]["error"])  # fmt: skip
    _check_metric(config.metric, [row for row in rows if row["status"] != "error"])
    rows.sort(key=lambda row: row["id"])
    finished = [row for row in rows if row["status"] == "done"] or [row for row in rows if row["status"] != "error"]
    best = (max if config.mode == "max" else min)(finished, key=lambda row: row["metrics"][config.metric])
    table(rows).write_parquet(out / "sweep.parquet")
    summary = {
        "metric": config.metric, "mode": config.mode, "chosen_on": config.choose_on, "tried": len(rows), "pareto": config.pareto,
        "failed": [{"setting": row["setting"], "error": row["error"]} for row in failed], "winner": best["setting"],
        "winner_value": best["metrics"][config.metric], "winner_metrics": trial.final(best["setting"]),
    }  # fmt: skip
    (out / SWEEP_SUMMARY).write_text(json.dumps(summary, indent=1))
    return summary


def warm(trial: Trial, session: Session) -> None:
    """Encodes the pictures once, before the trials share them."""
    del session
    if not trial.remakes:
        next(iter(trial({})))


def _choices(config: spec.SweepConfig) -> list[tuple[Any, ...]]:
    return [axis for axis in config.space.values() if isinstance(axis, tuple)]


def _axis(axis: tuple[Any, ...] | spec.Range) -> Any:
    return (axis.min, axis.max, axis.log) if isinstance(axis, spec.Range) else list(axis)


def _check_metric(metric: str, rows: list[dict[str, Any]]) -> None:
    known = sorted({name for row in rows for name in row["metrics"] if not name.endswith((LOW, HIGH))})
    if metric not in known:
        raise ConfigError.at(
            "The sweep's metric is not measured", "evaluate.sweep.metric", metric, f"one of {', '.join(known)}", nearest(metric, known)
        )


def on_split(workflow: spec.Workflow, split: str) -> list[dict[str, Any]]:
    """The workflow's benchmarks, moved to another split."""
    return [{**config.plain(), "split": split} for config in workflow.benchmarks]


def values(metrics: Any) -> dict[str, float]:
    """`<set>/<task>/<metric>` to value."""
    return {key: float(entry["value"]) for key, entry in evaluation.figures(metrics).items()}


def with_intervals(metrics: Any) -> dict[str, float]:
    """`values`, and the ends of their intervals as `<name>/low` and `<name>/high`."""
    ends = (("", "value"), (LOW, "low"), (HIGH, "high"))
    return {f"{key}{end}": float(entry[part]) for key, entry in evaluation.figures(metrics).items() for end, part in ends}


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """The sweep in long form: a row a setting and metric, with its interval; the axes' values as JSON."""
    return pl.DataFrame(
        [
            {
                "id": digest.short(row["id"]),
                "status": row["status"],
                "metric": name,
                "value": value,
                "low": row["metrics"].get(f"{name}{LOW}"),
                "high": row["metrics"].get(f"{name}{HIGH}"),
                **{key: json.dumps(v, ensure_ascii=False) for key, v in row["setting"].items()},
            }
            for row in rows
            for name, value in sorted(row["metrics"].items())
            if not name.endswith((LOW, HIGH))
        ],
        schema_overrides={"low": pl.Float64, "high": pl.Float64},
    )
