"""`diptych compare A B …`: the same examples, a paired test, a straight answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.core.errors import ConfigError
from diptych.evaluate import comparable
from diptych.evaluate.comparable import RESAMPLES, Compared, LeftOut, Untested
from diptych.workflow import makers
from diptych.workflow.project import Project
from diptych.workflow.results import Result, find
from diptych.workflow.spec import PHASES

ALPHA, LEVEL = 0.05, 0.95
LOWER_IS_BETTER = {"loss", "rank", "ece", "mce", "brier", "error", "fpr95", "sharpness", "instability"}
NEITHER_IS_BETTER = {"temperature", "shape_bias", "source_side", "plane"}

Verdict = Literal["better", "worse", "higher", "lower", "no difference shown"]
VERDICTS: tuple[Verdict, ...] = ("better", "worse", "higher", "lower", "no difference shown")
ABSENT = "unset"


def direction(metric: str) -> int:
    """1 where a higher value is better, -1 where a lower one is, 0 where neither is: by the words of the name before its first dot."""
    stem = metric.partition(".")[0]
    if stem in NEITHER_IS_BETTER:
        return 0
    return -1 if LOWER_IS_BETTER & set(stem.split("_")) else 1


@dataclass(frozen=True)
class Figure:
    """One figure of `run` beside the baseline's."""

    run: str
    found: Compared

    @property
    def key(self) -> str:
        """`<set>/<task>/<metric>`."""
        return self.found.key

    @property
    def direction(self) -> int:
        """As `direction` of the metric."""
        return direction(self.found.metric)

    @property
    def verdict(self) -> Verdict:
        """What the test shows after Holm's correction."""
        if self.found.p_holm >= ALPHA:
            return "no difference shown"
        rises = self.found.test.difference > 0
        if not self.direction:
            return "higher" if rises else "lower"
        return "better" if rises == (self.direction > 0) else "worse"

    @property
    def examples(self) -> tuple[int, int, int]:
        """Examples on which the run does better than the baseline, as well, and worse; where neither is better, higher counts first."""
        test = self.found.test
        return (test.lower, test.equal, test.higher) if self.direction < 0 else (test.higher, test.equal, test.lower)

    @property
    def effect(self) -> tuple[str, float]:
        """The effect size with its letter: Cohen's h for 0/1 values, else the standardised difference d."""
        return "h" if self.found.test.test == "mcnemar" else "d", self.found.test.effect


@dataclass(frozen=True)
class Side:
    """One run beside the baseline: what was tested, what has no test, what was left out and why."""

    result: Result
    figures: list[Figure]
    untested: list[Untested]
    left_out: list[LeftOut]

    @property
    def verdicts(self) -> Counter[Verdict]:
        """How often each verdict fell."""
        return Counter(figure.verdict for figure in self.figures)


@dataclass(frozen=True)
class Comparison:
    """Runs beside a baseline.

    Attributes:
        baseline, sides: the first run, and the others.
        changed: the parameters that differ, by key path: a value a run, the baseline's first.
        notes: what a reader should know before trusting the figures.
        seed, resamples: of the bootstrap.
    """

    baseline: Result
    sides: list[Side]
    changed: dict[str, tuple[Any, ...]]
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    resamples: int = RESAMPLES

    @property
    def runs(self) -> list[Result]:
        """All runs, the baseline first."""
        return [self.baseline, *(side.result for side in self.sides)]

    @property
    def rows(self) -> list[Figure]:
        """All tested figures: by figure in the baseline's order, then by run."""
        order = list(dict.fromkeys(figure.key for side in self.sides for figure in side.figures))
        by_key = {(figure.key, side.result.name): figure for side in self.sides for figure in side.figures}
        return [by_key[key, side.result.name] for key in order for side in self.sides if (key, side.result.name) in by_key]


def compare(project: Project, baseline: str, *others: str, seed: int = 0, resamples: int = RESAMPLES, common: bool = False) -> Comparison:
    """Compares evaluated runs with the first of them.

    Raises:
        ConfigError: a run that is not there, is named twice, or has nothing to be compared with.
        DataError: figures that were not measured the same way, unless `common`.
    """
    names = [baseline, *others]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError.at("A comparison needs two runs or more, each once", "compare", names, "names, e.g. quickstart quickstart+1a2b3c")
    runs = [find(project, name) for name in names]
    rows = {run.name: run.metrics() for run in runs}
    base = rows.pop(baseline)
    found = comparable.compare(base, rows, seed=seed, level=LEVEL, resamples=resamples, common=common)
    sides = [
        Side(run, [Figure(run.name, row) for row in found[run.name].compared], found[run.name].untested, found[run.name].left_out)
        for run in runs[1:]
    ]
    behind = [makers.records(project, run) for run in runs]
    whole = Comparison(runs[0], sides, differences(behind), _notes(runs, behind), seed, resamples)
    whole.notes.extend(_blunt(whole))
    return whole


def differences(behind: Sequence[Mapping[str, makers.Record]]) -> dict[str, tuple[Any, ...]]:
    """The parameters in which runs differ, by key path, from the records behind each run; `unset` where a run has no such parameter.

    A phase that is not known of every run is left to `_notes`.
    """
    changed: dict[str, tuple[Any, ...]] = {}
    for phase in PHASES:
        if all(phase in records for records in behind):
            flat = [_flat(records[phase].get("params", {})) for records in behind]
            for key in dict.fromkeys(name for values in flat for name in values):
                values = tuple(each.get(key, ABSENT) for each in flat)
                if any(value != values[0] for value in values):
                    changed[key] = values
    return changed


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: leaf for key, entry in value.items() for name, leaf in _flat(entry, f"{prefix}{key}.").items()}
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return {name: leaf for i, entry in enumerate(value) for name, leaf in _flat(entry, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): value}


def digests(run: Result) -> dict[str, str]:
    """The digests of a run's rows: `model`, `dataset`, `code`; several are joined, which happens to tables put together by hand."""
    rows = run.rows
    return {
        name: ", ".join(map(str, rows[name].unique(maintain_order=True))) for name in ("model", "dataset", "code") if name in rows.columns
    }


def _notes(runs: Sequence[Result], behind: Sequence[Mapping[str, makers.Record]]) -> list[str]:
    notes = []
    known = [digests(run) for run in runs]
    if len({each.get("dataset") for each in known}) > 1:
        notes.append(
            "The data sets' digests differ. Keys and settings of the compared examples are equal; that their pictures are, is not known."
        )
    if len({each.get("code") for each in known}) > 1:
        notes.append("The runs were evaluated by different versions of the code.")
    if len({each.get("model") for each in known}) < len(known):
        notes.append("Some of the runs evaluated one and the same model.")
    if finished := [run.name for run in runs if not (run.home / ".records").exists()]:
        notes.append(f"Measured as finished checkpoints, so that parameters are not compared: {', '.join(finished)}.")
    notes += [
        f"Of {run.name} the parameters of {', '.join(gone)} are not known: the run that made them is gone."
        for run, records in zip(runs, behind, strict=True)
        if run.name not in finished and (gone := [phase for phase in PHASES if phase not in records])
    ]
    return notes


def _blunt(found: Comparison) -> list[str]:
    """A warning where Holm's factor alone keeps the bootstrap's least p-value from ever being shown."""
    if all(row.found.test.test == "mcnemar" for row in found.rows) or len(found.rows) / (1 + found.resamples) < ALPHA:
        return []
    least = math.ceil(len(found.rows) / ALPHA)
    return [
        f"{found.resamples:,} resamples are too few for {len(found.rows)} tests: no bootstrap can show a difference (--resamples {least} or more)."
    ]


def method(found: Comparison) -> str:
    """The method in two sentences."""
    rows = [figure.found.test for figure in found.rows]
    sizes = sorted({test.n for test in rows})
    n = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return (
        f"Differences are run minus {found.baseline.name} on the same examples (n = {n} a figure), with {100 * LEVEL:g} % percentile bootstrap "
        f"intervals over examples ({found.resamples:,} resamples, seed {found.seed}), each interval on its own. "
        f"The p-value is that of McNemar's exact test where all values are 0 or 1 and that of the paired bootstrap under no mean difference "
        f"elsewhere (never below {1 / (1 + found.resamples):.1g}), corrected by Holm's method over all {len(rows)} tests; the effect is Cohen's h or, "
        f"elsewhere, the mean difference over the root mean variance (d), and a verdict takes a corrected p below {ALPHA:g}."
    )


def summary(side: Side) -> str:
    """`better on 3 of 12 figures, worse on 1, no difference shown on 8; 2 left out`."""
    counts = [(verdict, count) for verdict in VERDICTS if (count := side.verdicts[verdict])]
    words = [
        f"{verdict} on {count}{f' of {len(side.figures)} figures' if place == 0 else ''}" for place, (verdict, count) in enumerate(counts)
    ]
    left_out = f"; {len(side.left_out)} left out" if side.left_out else ""
    return (", ".join(words) or "nothing was tested") + left_out
