"""Which rows of two checkpoints may be compared, and what the paired tests say of those that may.

Two rows are comparable when set, task, metric and settings (class names, templates, preprocessing) are equal and they hold the same
examples. Others are refused, or left out with the reason when the caller asks for what is common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from diptych.core import digest
from diptych.core.errors import DataError, Problem
from diptych.core.points import Metric
from diptych.evaluate.intervals import Paired, holm, paired

RESAMPLES = 10_000
"""More than a single figure's interval takes: the least p-value of the bootstrap, 1 / (resamples + 1), has to survive Holm's factor."""

Key = tuple[str, str, str]


class Compared(NamedTuple):
    """A figure of one checkpoint beside the baseline's: both values, the paired test of `value - base`, Holm's p over the whole family."""

    set: str
    task: str
    metric: str
    base: float
    value: float
    test: Paired
    p_holm: float
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """`<set>/<task>/<metric>`."""
        return f"{self.set}/{self.task}/{self.metric}"


class LeftOut(NamedTuple):
    """A figure that was not compared, and why."""

    key: str
    why: str


class Untested(NamedTuple):
    """A comparable figure that is no mean over examples (a median, a ratio, an area): its values are shown, no paired test exists."""

    key: str
    base: float
    value: float


@dataclass
class Against:
    """One checkpoint beside the baseline. Every row of either side is in exactly one of the three lists."""

    compared: list[Compared] = field(default_factory=list)
    untested: list[Untested] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def compare(
    base: Sequence[Metric],
    others: Mapping[str, Sequence[Metric]],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    common: bool = False,
) -> dict[str, Against]:
    """The paired comparison of checkpoints with one baseline, in the baseline's order; Holm's correction is over all tests of all of them.

    Args:
        base: the baseline's rows.
        others: rows by checkpoint.
        seed: names the bootstrap's draws.
        level: coverage of the intervals, each on its own.
        resamples: bootstrap replicates.
        common: compare what is comparable and list the rest, in place of refusing.

    Raises:
        DataError: rows that are not comparable, with every reason, unless `common`; nothing to test at all.
    """
    matched = {name: _matched(base, rows) for name, rows in others.items()}
    if not common:
        _refuse({name: left_out for name, (_, left_out) in matched.items()})
    tests = {
        (name, key): paired(a.per_example, b.per_example, a.keys, b.keys, seed=seed, level=level, resamples=resamples)
        for name, (pairs, _) in matched.items()
        for key, (a, b) in pairs.items()
        if a.per_example is not None and b.per_example is not None
    }
    if not tests:
        raise _nothing({name: left_out for name, (_, left_out) in matched.items()})
    corrected = holm({name: test.p_value for name, test in tests.items()})
    return {name: _against(name, pairs, left_out, tests, corrected) for name, (pairs, left_out) in matched.items()}


def _against(
    name: str,
    pairs: Mapping[Key, tuple[Metric, Metric]],
    left_out: list[LeftOut],
    tests: Mapping[tuple[str, Key], Paired],
    corrected: Mapping[tuple[str, Key], float],
) -> Against:
    found = Against(left_out=left_out)
    for key, (a, b) in pairs.items():
        if (name, key) in tests:
            found.compared.append(Compared(*key, a.value, b.value, tests[name, key], corrected[name, key], a.settings))
        else:
            found.untested.append(Untested("/".join(key), a.value, b.value))
    return found


# ---------------------------------------------------------------- what is comparable


def _matched(base: Sequence[Metric], rows: Sequence[Metric]) -> tuple[dict[Key, tuple[Metric, Metric]], list[LeftOut]]:
    left, right = _by_key(base), _by_key(rows)
    pairs: dict[Key, tuple[Metric, Metric]] = {}
    left_out: list[LeftOut] = []
    for key in dict.fromkeys([*left, *right]):
        ours, theirs = left.get(key, []), right.get(key, [])
        if why := _fault(ours, theirs):
            left_out.append(LeftOut("/".join(key), why))
        else:
            pairs[key] = ours[0], theirs[0]
    return pairs, left_out


def _by_key(rows: Sequence[Metric]) -> dict[Key, list[Metric]]:
    found: dict[Key, list[Metric]] = {}
    for row in rows:
        found.setdefault((row.set, row.task, row.metric), []).append(row)
    return found


def _fault(ours: list[Metric], theirs: list[Metric]) -> str:
    """Why the rows of one name on both sides cannot be compared; empty if they can."""
    if not ours or not theirs:
        return f"only the {'baseline' if ours else 'other run'} has it"
    if len(ours) > 1 or len(theirs) > 1:
        return "several rows of one name: give the benchmarks tasks of their own"
    a, b = ours[0], theirs[0]
    if unequal := differing(a.settings, b.settings):
        return "; ".join(f"{name} differs: {_shown(x)} and {_shown(y)}" for name, (x, y) in unequal.items())
    return _examples_fault(a, b)


def _examples_fault(a: Metric, b: Metric) -> str:
    if (a.per_example is None) != (b.per_example is None):
        return "one side has no values by example"
    if a.per_example is None or b.per_example is None:
        return ""
    if list(a.keys) != list(b.keys) and (other := set(a.keys) ^ set(b.keys)):
        few = ", ".join(sorted(other)[:3])
        return f"other examples: {len(other):,} keys are on one side only ({few}{', …' if len(other) > 3 else ''})"
    finite = np.isfinite(a.per_example).all() and np.isfinite(b.per_example).all()
    return "" if finite else "a value is not a finite number"


def differing(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The entries in which two nested mappings differ, by dotted path; None stands for a missing one."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found |= differing(x, y, f"{prefix}{name}.")
        elif x != y:
            found[f"{prefix}{name}"] = (x, y)
    return found


def _shown(value: Any) -> str:
    text = digest.short(value) if isinstance(value, str) and value.startswith("sha256:") else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


# ---------------------------------------------------------------- refusals


def _refuse(left_out: Mapping[str, Sequence[LeftOut]]) -> None:
    if problems := _problems(left_out):
        raise DataError("The figures were not measured the same way", problems)


def _nothing(left_out: Mapping[str, Sequence[LeftOut]]) -> DataError:
    whole = Problem("compare", "no figure that both sides have by example", "at least one", "evaluate both with one workflow")
    return DataError("There is nothing to compare", [whole, *_problems(left_out)])


def _problems(left_out: Mapping[str, Sequence[LeftOut]]) -> list[Problem]:
    """A problem a reason and checkpoint, with the figures it concerns."""
    concerned: dict[tuple[str, str], list[str]] = {}
    for name, rows in left_out.items():
        for row in rows:
            concerned.setdefault((name, row.why), []).append(row.key)
    fix = "evaluate both with one workflow, or compare what is common (--common)"
    return [
        Problem(
            f"{name}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}", why, "equal settings and examples", fix
        )
        for (name, why), keys in concerned.items()
    ]
