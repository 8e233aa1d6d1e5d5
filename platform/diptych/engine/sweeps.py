"""Ray Tune's side of a sweep: settings in, one result a setting out. The table of results is ours; Tune's own files are scratch.

A grid is cut into slices, one Tune trial a slice, so that Tune's start-up is paid per core and not per setting.
Searchers (random, Optuna) and schedulers (ASHA) propose and stop single settings.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diptych.core import digest
from diptych.core.errors import DiptychError
from diptych.engine.session import Session

FINISHED = "finished"
"""Among a setting's metrics: 1 when they are those of the whole training, 0 on the way."""

Setting = dict[str, Any]
Evaluate = Callable[[Setting], Iterator[Mapping[str, float]]]
"""Gives the metrics of a setting: once, or several times as training goes on; the last ones count."""


TRIES = 2
"""Times that a setting is tried before its error is what is reported of it."""


@dataclass(frozen=True)
class Table:
    """An append-only JSONL table of results, written as they come, by whoever has them: an interrupted sweep continues from it."""

    path: Path

    def rows(self) -> dict[str, dict[str, Any]]:
        """The last row of every setting, by the setting's digest."""
        if not self.path.exists():
            return {}
        return {row["id"]: row for row in map(json.loads, filter(_is_whole, self.path.read_text().splitlines()))}

    def done(self) -> dict[str, dict[str, Any]]:
        """The finished rows by the digest of their setting; an errored setting is tried again."""
        return {key: row for key, row in self.rows().items() if row["status"] in ("done", "stopped")}

    def mend(self) -> None:
        """Takes out a line torn by a killed writer, and failed settings, so that they are tried again."""
        rows = self.rows()
        if kept := [row for row in rows.values() if row["status"] != "error"]:
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def append(self, setting: Setting, status: str, metrics: Mapping[str, float], error: str = "") -> None:
        """Adds a row in one write."""
        row = {"id": digest.of_plain(setting), "setting": setting, "status": status, "metrics": dict(metrics), "error": error}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(
    evaluate: Evaluate,
    settings: Sequence[Setting] | None,
    space: Mapping[str, Any],
    table: Table,
    session: Session,
    *,
    search: Literal["grid", "random", "optuna"],
    scheduler: Literal["none", "asha"],
    trials: int,
    metric: str,
    mode: Literal["max", "min"],
    seed: int,
    scratch: Path,
    max_iterations: int = 1,
) -> list[dict[str, Any]]:
    """Runs what the table does not have yet and gives all its rows.

    `settings` lists a grid's points; otherwise `space` maps names to a list of choices or `(min, max, log)`. A setting that failed is among
    the rows, with the status `error` and what went wrong.
    """
    table.mend()
    known = table.done()
    if settings is not None:
        missing = [setting for setting in settings if digest.of_plain(setting) not in known]
        if session.in_process:
            for setting in missing:
                _evaluate_one(evaluate, setting, table)
        elif missing:
            _grid(evaluate, missing, table, session, scratch)
    elif len(known) < trials:
        if session.in_process:
            _serial_search(evaluate, space, table, trials - len(known), search, metric, mode, seed)
        else:
            _search(evaluate, space, table, session, scratch, trials - len(known), search, scheduler, metric, mode, seed, max_iterations)
    return list(table.rows().values())


def _evaluate_one(evaluate: Evaluate, setting: Setting, table: Table) -> None:
    """Measures a setting and writes its row; a setting that fails is tried again, and then its error is its row."""
    for attempt in range(1, TRIES + 1):
        last: Mapping[str, float] = {}
        try:
            for metrics in evaluate(setting):
                last = metrics
        except Exception as error:
            if attempt == TRIES:
                table.append(setting, "error", _measured(last), _in_words(error))
            continue
        table.append(setting, "done", _measured(last))
        return


def _is_whole(line: str) -> bool:
    """Whether a line was written to its end."""
    return line.endswith("}")


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, DiptychError) else f"{type(error).__name__}: {error}"


def _measured(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != FINISHED}


def _grid(evaluate: Evaluate, settings: Sequence[Setting], table: Table, session: Session, scratch: Path) -> None:
    ray = session.ray()
    from ray import tune

    slices = max(1, min(len(settings), int(ray.cluster_resources().get("CPU", 1))))
    shared = ray.put((evaluate, list(settings)))

    def trial(config: Mapping[str, Any]) -> None:
        work, points = ray.get(shared)
        for setting in dealt(points, config["slice"], slices):
            if digest.of_plain(setting) not in table.rows():  # a slice whose worker was lost goes on where it stopped
                _evaluate_one(work, setting, table)
        tune.report({"finished": 1})

    for result in _tuner(trial, {"slice": tune.grid_search(list(range(slices)))}, scratch, tune.TuneConfig()).fit():
        if result.error is not None:
            raise result.error


def dealt(settings: Sequence[Setting], number: int, slices: int) -> list[Setting]:
    """One slice of a grid. Rows of settings are shifted against each other, so that no slice gets all of one arm of a claim."""
    return [setting for place, setting in enumerate(settings) if (place + place // slices) % slices == number]


def _search(
    evaluate: Evaluate, space: Mapping[str, Any], table: Table, session: Session, scratch: Path, trials: int, search: str, scheduler: str,
    metric: str, mode: str, seed: int, max_iterations: int,
) -> None:  # fmt: skip
    ray = session.ray()
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    names = list(space)
    shared = ray.put((evaluate, names))

    def trial(config: Mapping[str, Any]) -> None:
        work, keys = ray.get(shared)
        setting = {key: config[f"axis{i}"] for i, key in enumerate(keys)}
        for iteration, metrics in enumerate(work(setting), start=1):
            finished = metrics.get(FINISHED, 1.0)
            rest = json.dumps(_measured(metrics))
            tune.report({"score": metrics[metric], "iteration": iteration, FINISHED: finished, "all": rest, "setting": json.dumps(setting)})

    axes = {f"axis{i}": _axis(tune, space[name]) for i, name in enumerate(names)}
    config = tune.TuneConfig(
        metric="score", mode=mode, num_samples=trials,
        search_alg=OptunaSearch(metric="score", mode=mode, seed=seed % 2**32) if search == "optuna" else None,
        scheduler=ASHAScheduler(time_attr="iteration", max_t=max_iterations, grace_period=1, reduction_factor=2) if scheduler == "asha" else None,
    )  # fmt: skip
    for result in _tuner(trial, axes, scratch, config, seed).fit():
        if result.error is not None or "setting" not in (result.metrics or {}):
            tried = {name: (result.config or {}).get(f"axis{i}") for i, name in enumerate(names)}
            table.append(tried, "error", {}, str(result.error))
            continue
        status = "done" if result.metrics[FINISHED] else "stopped"
        table.append(json.loads(result.metrics["setting"]), status, json.loads(result.metrics["all"]))


def _axis(tune: Any, axis: Any) -> Any:
    if isinstance(axis, tuple) and len(axis) == 3:
        low, high, log = axis
        return tune.loguniform(low, high) if log else tune.uniform(low, high)
    return tune.choice(list(axis))


def _tuner(trial: Callable[[Mapping[str, Any]], None], space: Mapping[str, Any], scratch: Path, config: Any, seed: int = 0) -> Any:
    from ray import tune

    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    del seed
    run_config = tune.RunConfig(
        name="sweep",
        storage_path=str(scratch.resolve()),
        verbose=0,
        progress_reporter=_Silent(),
        failure_config=tune.FailureConfig(max_failures=1),
    )
    return tune.Tuner(tune.with_resources(trial, {"cpu": 1}), param_space=dict(space), tune_config=config, run_config=run_config)


class _Silent:
    """A progress reporter that reports nothing: the run has its own lines."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def should_report(self, *args: Any, **kwargs: Any) -> bool:
        """Never."""
        return False

    def report(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def _serial_search(
    evaluate: Evaluate, space: Mapping[str, Any], table: Table, trials: int, search: str, metric: str, mode: str, seed: int
) -> None:
    """The searches without Ray: Optuna's own study, with its random or TPE sampler."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed % 2**32) if search == "optuna" else optuna.samplers.RandomSampler(seed=seed % 2**32)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        setting = {name: _suggest(trial, name, axis) for name, axis in space.items()}
        _evaluate_one(evaluate, setting, table)
        found = table.rows()[digest.of_plain(setting)]
        if found["status"] == "error":
            raise optuna.TrialPruned
        return float(found["metrics"][metric])

    study.optimize(objective, n_trials=trials)


def _suggest(trial: Any, name: str, axis: Any) -> Any:
    if isinstance(axis, tuple) and len(axis) == 3:
        return trial.suggest_float(name, axis[0], axis[1], log=axis[2])
    choices = list(axis)
    return choices[trial.suggest_int(name, 0, len(choices) - 1)]
