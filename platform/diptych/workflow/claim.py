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
`@seed` for the seed.

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
from dataclasses import dataclass
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
from diptych.workflow import spec, trials, yaml
from diptych.workflow.project import Project

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
        words = f"at least {self.least:+.3f} and an interval without zero" if self.least > 0 else f"an interval above {self.least:+.3f}"
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

    @property
    def shown(self) -> bool:
        """Whether every demand was met."""
        return all(finding.shown for finding in self.findings)


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
            arm_workflow(file, name, file.seeds[0], path, {text: 1 if text.startswith(ROWS) else "." for text, _ in references(file, name)})
        except ConfigError as error:
            problems += [Problem(f"arms.{name}: {p.where}", p.got, p.expected, p.fix) for p in error.problems]
    for position, demand in enumerate(file.demands):
        for role in (demand.better, demand.worse, demand.since):
            if role is not None and role not in file.arms:
                problems.append(Problem(f"demands.{position}", role, f"one of the arms {', '.join(file.arms)}", nearest(role, file.arms)))
    if problems:
        raise ConfigError(headline(len(problems)), problems)
    return file


def arm_workflow(file: ClaimFile, arm: str, seed: int, path: Path, given: Mapping[str, Any]) -> spec.Workflow:
    """The workflow of one arm and seed; `given` says what each reference to another arm stands for."""
    raw = copy.deepcopy(file.base)
    raw["seed"] = seed
    for key, value in file.arms[arm].items():
        spec.set_value(raw, key.split("."), _filled(value, {**given, SEED: seed}), key)
    return spec.check(raw, path, (f"arm={arm}",))


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
    """One arm with one seed, from ingest to its figures; plain data, so that it travels to Tune's workers."""

    file: ClaimFile
    path: Path
    root: Path

    def __call__(self, setting: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
        """The arm's figures."""
        arm, seed = str(setting["arm"]), int(setting["seed"])
        store, figures = trials.run(self._workflow(arm, seed), "evaluate", self._name(arm, seed), Project(self.root))
        values = {key: entry["value"] for key, entry in figures["evaluate"]["metrics"].items()}
        train_rows = float(figures["train"].get("rows", 0))
        trained = {**of_training(figures["train"]), **of_steps(store.folder("train").parent / ".records" / "steps.jsonl")}
        yield {**values, **trained, **of_reports(figures), "rows": train_rows, "train_s": float(figures["train"].get("wall_s", 0.0))}

    def _name(self, arm: str, seed: int) -> str:
        return f"claims/{self.file.claim}/{arm}-s{seed}"

    def _workflow(self, arm: str, seed: int) -> spec.Workflow:
        given = {text: self._given(text, other, seed) for text, other in references(self.file, arm)}
        return arm_workflow(self.file, arm, seed, self.path, given)

    def _given(self, text: str, other: str, seed: int) -> Any:
        """Runs the other arm as far as it takes, and takes over what it had made before."""
        until = "caption" if text.startswith(ROWS) else "compress"
        store, _ = trials.run(self._workflow(other, seed), until, self._name(other, seed), Project(self.root))
        if until == "compress":
            return str(store.folder("compress").resolve())
        pairs = PairDataset.open(store.folder("caption")).scan()
        return int(pairs.filter(pl.col("split") == "train").select(pl.len()).collect().item())


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
    """Runs every arm with every seed as one Tune sweep and judges the demands. Finished arms are taken from earlier runs."""
    started = time.monotonic()
    file = load(path)
    settings = [{"arm": arm, "seed": seed} for seed, arm in itertools.product(file.seeds, file.arms)]
    scratch = project.scratch / f"claim-{file.claim}-{digest.short(digest.of_plain(file.plain()))}"
    table = sweeps.Table(scratch / "results.jsonl")
    table.path.unlink(missing_ok=True)  # arms are cached as runs, under keys that know the code; this table is not
    progress.start("claim", f"{file.claim}: {len(settings)} trainings")
    rows = sweeps.run(
        ArmTrial(file, path, project.root), settings, {}, table, session, search="grid", scheduler="none", trials=len(settings),
        metric=file.demands[0].metric, mode="max", seed=0, scratch=scratch / "tune",
    )  # fmt: skip
    if failed := next((row for row in rows if row["status"] == "error"), None):
        raise DataError.at(
            "An arm failed", f"arms.{failed['setting']['arm']}", failed["setting"], "a training that can be measured", failed["error"]
        )
    progress.done(f"{file.claim}: {len(rows)} arms measured")
    return ClaimResult(file, tuple(_judge(demand, rows) for demand in file.demands), _table(rows), time.monotonic() - started)


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
    return pl.DataFrame(flat).sort("arm", "seed")


def text(result: ClaimResult) -> str:
    """The claim's outcome as a person reads it."""
    file = result.file
    lines = [f"{file.claim}: {file.about}", ""]
    for finding in result.findings:
        d, e = finding.demand, finding.estimate
        word = "shown" if finding.shown else "NOT shown"
        lines += [
            f"  {d.title} = {e.mean:+.3f}, 95 % interval {e.low:+.3f} to {e.high:+.3f} over {len(finding.better)} seeds",
            f"    {d.better}: {_values(finding.better)}" + ("" if d.worse is None else f"    {_other(d)}: {_values(finding.worse)}"),
            f"    demanded: {d.text}: {word}",
        ]
    lines += ["", f"  the effect {'showed' if result.shown else 'did NOT show'} ({result.wall_s:.0f} s)"]
    return "\n".join(lines)


def _other(demand: Demand) -> str:
    return f"{demand.worse}" if demand.factor == 1 else f"{demand.factor:g} x {demand.worse}"


def _values(by_seed: Mapping[int, float]) -> str:
    return " ".join(f"{value:.3f}" for _, value in sorted(by_seed.items()))
