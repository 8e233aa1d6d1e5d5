"""`diptych claim NAME`: a baseline and a method on the same seeds, one figure, and whether the effect showed.

A claim file is a workflow with arms:

    claim: metaclip
    about: one sentence
    seeds: [0, 1, 2]
    base: {…a workflow…}
    arms: {curated: {}, random: {"prune": [{"method": "random-subset", "count": "@rows:curated"}]}}
    demands: [{better: curated, worse: random, metric: digits/zero-shot/acc1, least: 0.08}]

An arm is a mapping of key path -> value over `base`. `@rows:ARM` stands for the number of training pairs that the other arm keeps with the
same seed, so that arms are compared at equal size; `@model:ARM` for the directory of the other arm's model, to start from or to mix with;
`@seed` for the seed. `{tune: [1.0e-3, 3.0e-3]}` is an axis that the arm chooses itself (`tuning.py`); the claim's key `tuning` says by what.

The base may also be an experiment on a problem with a known answer (`problems.py`); its figures are `problem/<name>`.

Figures are those of the evaluation, `<set>/<task>/<metric>`, and of training: `train/<name>` as the run's summary has it, of everything in
the step log also `train/mean_<name>` over all records and `train/end_<name>` over the last tenth of them. So are the numbers that methods
report: `curate/<place>-<method>/<name>/…` of pair methods, `compress/<method>/<name>` and, of a small mapping, `compress/<method>/<name>/<key>`.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field, model_validator

from diptych.core import digest
from diptych.core.config import Config, headline
from diptych.core.errors import ConfigError, DataError, Problem, nearest
from diptych.engine import sweeps
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.evaluate import intervals
from diptych.pairs.dataset import PairDataset
from diptych.workflow import problems as known_problems
from diptych.workflow import spec, sweep, trials, yaml
from diptych.workflow.project import Project
from diptych.workflow.tuning import Tuned, Tuning, axes, choose, points, settled

ROWS = "@rows:"
MODEL = "@model:"
SEED = "@seed"
REFERENCE = re.compile(r'"(@(?:rows|model):([^"]+))"')


class Demand(Config):
    """One comparison of a claim: `better - worse` on `metric` must be at least `least`, with an interval that leaves out zero.

    With `least` at zero or below it asks that nothing is lost: the whole interval must lie above `least`.
    """

    better: str
    worse: str | None = Field(None, description="the arm compared with; null: the figure itself is judged, as if the other were 0")
    metric: str = Field(description="`<set>/<task>/<metric>` or `train/<name>`")
    against: str | None = Field(None, description="the worse side's figure, where it is another one: two methods measured in one run")
    factor: float = Field(1.0, gt=0, description="what the worse side is multiplied with first: 1.3 asks for more than 1.3 times as much")
    since: str | None = Field(
        None, description="an arm whose figure, of the same metric, both sides are measured from: how much each changed"
    )
    least: float = Field(description="least mean difference that counts, in the metric's unit")
    every_seed: bool = Field(False, description="no seed's own difference may lie below `least` either")
    direction: Literal["higher", "lower"] = "higher"

    @model_validator(mode="after")
    def _has_another_side(self) -> Demand:
        if self.worse is None and (self.against is not None or self.factor != 1 or self.since is not None):
            raise ValueError("against, factor and since are of two sides; name its arm in `worse`")
        if self.since is not None and self.against is not None:
            raise ValueError("since measures one metric: leave `against` out")
        return self

    @property
    def text(self) -> str:
        """What is demanded."""
        least = number(self.least, "+")
        words = f"at least {least} and an interval without zero" if self.least > 0 else f"an interval above {least}"
        return words + (", every seed too" if self.every_seed else "")

    @property
    def title(self) -> str:
        """What is compared with what."""
        times = "" if self.factor == 1 else f"{self.factor:g} x "
        if self.worse is None:
            return f"{self.metric} of {self.better}"
        if self.since is not None:
            return f"{self.metric}, change since {self.since}: {self.better} - {times}{self.worse}"
        if self.against is None:
            return f"{self.metric}: {self.better} - {times}{self.worse}"
        return (
            f"{self.metric} of {self.better} - {times}{self.against} of {self.worse}"
            if self.better != self.worse
            else f"{self.metric} - {times}{self.against}"
        )


class ClaimFile(Config):
    """A claim as its file says it."""

    claim: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    about: str
    paper: str = ""
    headline: str = Field(default="", description="what the paper reports")
    seeds: tuple[int, ...] = Field(min_length=3)
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    demands: tuple[Demand, ...] = Field(min_length=1)
    tuning: Tuning | None = Field(default=None, description="how arms with axes choose; null: no arm has any")

    @model_validator(mode="after")
    def _tuning_fits(self) -> ClaimFile:
        if (self.tuning is None) == any(axes(arm) for arm in self.arms.values()):
            raise ValueError("`tuning` and arms with values `{tune: […]}` belong together")
        return self


@dataclass(frozen=True)
class Finding:
    """What came of one demand."""

    demand: Demand
    better: dict[int, float]
    worse: dict[int, float]
    estimate: intervals.Estimate

    @property
    def differences(self) -> list[float]:
        """What each seed has on the better side, by the demand's direction."""
        sign = 1 if self.demand.direction == "higher" else -1
        return [sign * (self.better[seed] - self.worse[seed]) for seed in sorted(self.better)]

    @property
    def shown(self) -> bool:
        """The mean difference reaches `least` and its interval leaves out zero; or nothing is lost, where only that is asked."""
        if self.demand.every_seed and min(self.differences) < self.demand.least:
            return False
        if self.demand.least <= 0:
            return self.estimate.low >= self.demand.least
        return self.estimate.mean >= self.demand.least and self.estimate.low > 0


@dataclass(frozen=True)
class ClaimResult:
    """The findings of a claim, and every arm's figures by seed."""

    file: ClaimFile
    findings: tuple[Finding, ...]
    table: pl.DataFrame
    wall_s: float = 0.0
    tuned: Mapping[str, Tuned] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Whether every demand was met."""
        return all(finding.shown for finding in self.findings)

    @property
    def metrics(self) -> list[str]:
        """The figures that some demand looks at."""
        both = itertools.chain.from_iterable((f.demand.metric, f.demand.against) for f in self.findings)
        return list(dict.fromkeys(metric for metric in both if metric is not None))

    def summary(self, arm: str, metric: str) -> intervals.Estimate | None:
        """An arm's figure: the mean over its seeds with the interval; None where it was not measured, or is no number."""
        if metric not in self.table.columns:
            return None
        values = self.table.filter(pl.col("arm") == arm)[metric].drop_nulls().drop_nans()
        return intervals.mean_over_seeds(values.to_numpy()) if len(values) > 1 else None


def load(path: Path) -> ClaimFile:
    """Reads and checks a claim file: its own keys, every arm as a workflow, names of arms. All problems at once."""
    file = ClaimFile.parse(yaml.read(path), path.stem)
    problems: list[Problem] = []
    for name in file.arms:
        try:
            unknown = [other for _, other in references(file, name) if other not in file.arms]
            problems += [
                Problem(f"arms.{name}", other, f"one of the arms {', '.join(file.arms)}", nearest(other, file.arms)) for other in unknown
            ]
            given = {text: 1 if text.startswith(ROWS) else "." for text, _ in references(file, name)}
            for values in points(file.arms[name]) or [{}]:
                arm_experiment(file, name, file.seeds[0], path, given, values)
            if axes(file.arms[name]):
                problems += [
                    Problem(f"arms.{name}", other, "an arm without axes: both would be tuned at once")
                    for _, other in references(file, name)
                    if axes(file.arms.get(other, {}))
                ]
        except ConfigError as error:
            problems += [Problem(f"arms.{name}: {p.where}", p.got, p.expected, p.fix) for p in error.problems]
    for position, demand in enumerate(file.demands):
        for role in (demand.better, demand.worse, demand.since):
            if role is not None and role not in file.arms:
                problems.append(Problem(f"demands.{position}", role, f"one of the arms {', '.join(file.arms)}", nearest(role, file.arms)))
    if problems:
        raise ConfigError(headline(len(problems)), problems)
    return file


def arm_experiment(
    file: ClaimFile, arm: str, seed: int, path: Path, given: Mapping[str, Any], values: Mapping[str, Any], split: str | None = None
) -> spec.Workflow | known_problems.Experiment:
    """What one arm runs with one seed.

    Args:
        given: what each reference to another arm stands for.
        values: of the arm's axes, by key path.
        split: what the benchmarks look at, in place of what the file says.
    """
    raw = copy.deepcopy(file.base)
    raw["seed"] = seed
    for key, value in settled(file.arms[arm], values).items():
        spec.set_value(raw, key.split("."), _filled(value, {**given, SEED: seed}), key)
    if known_problems.is_problem(raw):
        return known_problems.check(raw)
    workflow = spec.check(raw, path, (f"arm={arm}",))
    if split is None:
        return workflow
    return spec.check({**raw, "evaluate": {**raw["evaluate"], "benchmarks": sweep.on_split(workflow, split)}}, path, (f"arm={arm}",))


def arm_workflow(
    file: ClaimFile, arm: str, seed: int, path: Path, given: Mapping[str, Any], values: Mapping[str, Any] | None = None
) -> spec.Workflow:
    """`arm_experiment` of a claim whose base is a workflow."""
    found = arm_experiment(file, arm, seed, path, given, values or {})
    assert isinstance(found, spec.Workflow)
    return found


def _filled(value: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return given.get(value, value)
    if isinstance(value, Mapping):
        return {key: _filled(entry, given) for key, entry in value.items()}
    return [_filled(entry, given) for entry in value] if isinstance(value, list | tuple) else value


def references(file: ClaimFile, arm: str) -> list[tuple[str, str]]:
    """What an arm asks of other arms: `(text as it stands, name of the other arm)`, each once."""
    return sorted(set(REFERENCE.findall(json.dumps(file.arms[arm]))))


@dataclass(frozen=True)
class ArmTrial:
    """One arm with one seed, from ingest to its figures; plain data, so that it travels to Tune's workers.

    A setting with `values` for the arm's axes is a trial of these; without, the arm runs with what was `chosen`.
    """

    file: ClaimFile
    path: Path
    root: Path
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __call__(self, setting: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
        """The arm's figures."""
        arm, seed, values = str(setting["arm"]), int(setting["seed"]), setting.get("values")
        given = {text: self._given(text, other, seed) for text, other in references(self.file, arm)}
        split = self.file.tuning.split if self.file.tuning is not None and values is not None else None
        experiment = arm_experiment(self.file, arm, seed, self.path, given, values or self.chosen.get(arm, {}), split)
        name = self._name(arm, seed) + ("" if values is None else f"-{digest.short(digest.of_plain(values))[:6]}")
        if isinstance(experiment, known_problems.Experiment):
            outcome = experiment.run()
            self._keep_curve(name, range(1, len(outcome.losses) + 1), outcome.losses)
            yield {f"problem/{key}": value for key, value in outcome.figures.items()}
            return
        store, figures = trials.run(experiment, "evaluate", name, Project(self.root))
        log = store.folder("train").parent / ".records" / "steps.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        self._keep_curve(name, [record["step"] for record in records], [record["loss"] for record in records])
        values = {key: entry["value"] for key, entry in figures["evaluate"]["metrics"].items()}
        train_rows = float(figures["train"].get("rows", 0))
        trained = {**of_training(figures["train"]), **of_steps(log)}
        yield {**values, **trained, **of_reports(figures), "rows": train_rows, "train_s": float(figures["train"].get("wall_s", 0.0))}

    def _name(self, arm: str, seed: int) -> str:
        return f"claims/{self.file.claim}/{arm}-s{seed}"

    def _keep_curve(self, name: str, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Leaves the loss over the steps where the page finds it."""
        path = curve_path(self.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": list(steps), "loss": list(losses)}))

    def _workflow(self, arm: str, seed: int) -> spec.Workflow:
        given = {text: self._given(text, other, seed) for text, other in references(self.file, arm)}
        return arm_workflow(self.file, arm, seed, self.path, given, self.chosen.get(arm))

    def _given(self, text: str, other: str, seed: int) -> Any:
        """Runs the other arm as far as it takes, and takes over what it had made before."""
        until = "caption" if text.startswith(ROWS) else "compress"
        store, _ = trials.run(self._workflow(other, seed), until, self._name(other, seed), Project(self.root))
        if until == "compress":
            return str(store.folder("compress").resolve())
        pairs = PairDataset.open(store.folder("caption")).scan()
        return int(pairs.filter(pl.col("split") == "train").select(pl.len()).collect().item())


def curve_path(root: Path, name: str) -> Path:
    """Where the loss curve of an arm's run lies."""
    return Project(root).runs / ".curves" / f"{name}.json"


def of_training(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a training's summary as `train/<name>`."""
    return {
        f"train/{name}": float(value) for name, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def of_reports(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers in the reports of pair methods, as `<phase>/<place>-<method>/<name>/…`, and of compressors, as `compress/<method>/<name>…`.

    Of a compressor's mappings only small ones count: others have an entry a matrix.
    """
    reports = {phase: figures[phase].get("report") or {} for phase in (*spec.PAIR_PHASES, "compress") if phase in figures}
    reports["compress"] = {method: _without_tables(report) for method, report in reports.get("compress", {}).items()}
    return {"/".join(path): value for path, value in _numbers((), reports)}


def _without_tables(report: Mapping[str, Any], small: int = 8) -> dict[str, Any]:
    return {name: value for name, value in report.items() if not (isinstance(value, Mapping) and len(value) > small)}


def _numbers(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers((*path, str(name)), inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def of_steps(log: Path) -> dict[str, float]:
    """Means over a step log: `train/mean_<name>` over all its records, `train/end_<name>` over the last tenth, at least one.

    A name that not every record has is averaged over those that do.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    spans = {"mean": records, "end": records[-max(1, len(records) // 10) :]}
    return {
        f"train/{span}_{name}": sum(record[name] for record in part if name in record) / sum(name in record for record in part)
        for span, part in spans.items()
        for name in dict.fromkeys(itertools.chain.from_iterable(part))
    }


def run(path: Path, project: Project, session: Session, progress: Progress) -> ClaimResult:
    """Runs every arm with every seed as one Tune sweep and judges the demands. Finished arms are taken from earlier runs.

    Arms with axes are tuned first, all together in a sweep of its own.
    """
    started = time.monotonic()
    file = load(path)
    settings = [{"arm": arm, "seed": seed} for seed, arm in itertools.product(file.seeds, file.arms)]
    scratch = project.scratch / f"claim-{file.claim}-{digest.short(digest.of_plain(file.plain()))}"
    trial, tuned = ArmTrial(file, path, project.root), {}
    if file.tuning is not None:
        grid = [{"arm": arm, "seed": file.tuning.seed, "values": values} for arm in file.arms for values in points(file.arms[arm])]
        progress.start("claim", f"{file.claim}: {len(grid)} trainings to choose by")
        tuned = choose(file.arms, _measured(trial, grid, scratch / "tuning", session, file), file.tuning)
        trial = replace(trial, chosen={arm: found.chosen for arm, found in tuned.items()})
    progress.start("claim", f"{file.claim}: {len(settings)} trainings")
    rows = _measured(trial, settings, scratch, session, file)
    if failed := next((row for row in rows if row["status"] == "error"), None):
        raise DataError.at(
            "An arm failed", f"arms.{failed['setting']['arm']}", failed["setting"], "a training that can be measured", failed["error"]
        )
    progress.done(f"{file.claim}: {len(rows)} arms measured")
    findings = tuple(_judge(demand, rows) for demand in file.demands)
    return ClaimResult(file, findings, _table(rows), time.monotonic() - started, tuned)


def _measured(
    trial: ArmTrial, settings: Sequence[dict[str, Any]], scratch: Path, session: Session, file: ClaimFile
) -> list[dict[str, Any]]:
    """A row for every setting."""
    table = sweeps.Table(scratch / "results.jsonl")
    table.path.unlink(missing_ok=True)  # arms are cached as runs, under keys that know the code; this table is not
    return sweeps.run(
        trial, settings, {}, table, session, search="grid", scheduler="none", trials=len(settings),
        metric=file.demands[0].metric, mode="max", seed=0, scratch=scratch / "tune",
    )  # fmt: skip


def _judge(demand: Demand, rows: Sequence[Mapping[str, Any]]) -> Finding:
    better = _by_seed(rows, demand.better, demand.metric)
    worse = dict.fromkeys(better, 0.0)
    if demand.worse is not None:
        found = _by_seed(rows, demand.worse, demand.against or demand.metric)
        start = dict.fromkeys(found, 0.0) if demand.since is None else _by_seed(rows, demand.since, demand.metric)
        better = {seed: value - start[seed] for seed, value in better.items()}
        worse = {seed: demand.factor * (value - start[seed]) for seed, value in found.items()}
    low, high = (worse, better) if demand.direction == "higher" else (better, worse)
    return Finding(demand, better, worse, intervals.difference(low, high))


def _by_seed(rows: Sequence[Mapping[str, Any]], arm: str, metric: str) -> dict[int, float]:
    found = [row for row in rows if row["setting"]["arm"] == arm]
    known = sorted({name for row in found for name in row["metrics"]})
    if metric not in known:
        raise ConfigError.at("A demand's metric is not measured", "demands", metric, f"one of {', '.join(known)}", nearest(metric, known))
    return {int(row["setting"]["seed"]): float(row["metrics"][metric]) for row in found}


def _table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    flat = [{"arm": row["setting"]["arm"], "seed": row["setting"]["seed"], **row["metrics"]} for row in rows]
    return pl.DataFrame(flat, infer_schema_length=None).sort("arm", "seed")


def number(value: float, sign: str = "") -> str:
    """A figure with three decimals; one that would lose its digits to that, or has too many before the point, in its own size."""
    if abs(value) >= 10_000:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:{sign}.2g}"


def text(result: ClaimResult) -> str:
    """The claim's outcome as a person reads it."""
    file = result.file
    lines = [f"{file.claim}: {file.about}", ""]
    for finding in result.findings:
        d, e = finding.demand, finding.estimate
        word = "shown" if finding.shown else "NOT shown"
        lines += [
            f"  {d.title} = {number(e.mean, '+')}, 95 % interval {number(e.low, '+')} to {number(e.high, '+')} over {len(finding.better)} seeds",
            f"    {d.better}: {_values(finding.better)}" + ("" if d.worse is None else f"    {_other(d)}: {_values(finding.worse)}"),
            f"    demanded: {d.text}: {word}",
        ]
    for arm, found in result.tuned.items():
        values = ", ".join(f"{key} = {value}" for key, value in found.chosen.items())
        edge = f" (at the edge: {', '.join(found.at_edge)})" if found.at_edge else ""
        lines.append(f"  {arm} chose {values}{edge}")
    lines += ["", f"  the effect {'showed' if result.shown else 'did NOT show'} ({result.wall_s:.0f} s)"]
    return "\n".join(lines)


def _other(demand: Demand) -> str:
    return f"{demand.worse}" if demand.factor == 1 else f"{demand.factor:g} x {demand.worse}"


def _values(by_seed: Mapping[int, float]) -> str:
    return " ".join(number(value) for _, value in sorted(by_seed.items()))
