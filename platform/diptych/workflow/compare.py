"""`diptych compare A B`: the same examples, a paired test, a straight answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diptych.evaluate import intervals
from diptych.workflow.project import Project
from diptych.workflow.results import Result, find

ALPHA = 0.05
LOWER_IS_BETTER = ("loss", "_rank", "_ece", "error")


@dataclass(frozen=True)
class Comparison:
    """`b - a` for every figure that both runs have, and what the two runs did differently."""

    a: Result
    b: Result
    rows: list[intervals.Compared]
    changed: dict[str, tuple[Any, Any]]

    def verdict(self, row: intervals.Compared) -> str:
        """`better`, `worse` or `no difference shown` for one figure, after Holm's correction."""
        if row.p_holm >= ALPHA:
            return "no difference shown"
        lower_is_better = row.key.endswith(LOWER_IS_BETTER)
        return "better" if (row.test.difference > 0) != lower_is_better else "worse"


def compare(project: Project, a: str, b: str, seed: int = 0) -> Comparison:
    """Compares two evaluated runs. Raises DataError when their figures were not measured the same way, and says which."""
    left, right = find(project, a), find(project, b)
    return Comparison(left, right, intervals.compare(left.metrics(), right.metrics(), seed), differences(left, right))


def differences(a: Result, b: Result) -> dict[str, tuple[Any, Any]]:
    """Parameters that differ between two runs, by key path; phases that a run took over count with their maker's record."""
    changed: dict[str, tuple[Any, Any]] = {}
    for phase in ("ingest", "curate", "prune", "caption", "train", "compress", "evaluate"):
        left, right = _flat(a.record(phase).get("params", {})), _flat(b.record(phase).get("params", {}))
        if left and right:
            changed |= {
                key: (left.get(key), right.get(key)) for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)
            }
    return changed


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: leaf for key, entry in value.items() for name, leaf in _flat(entry, f"{prefix}{key}.").items()}
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return {name: leaf for i, entry in enumerate(value) for name, leaf in _flat(entry, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): value}


def table(found: Comparison) -> str:
    """The comparison as text."""
    lines = [f"A = {found.a.name}    B = {found.b.name}    difference = B - A, paired, 95 % interval, p after Holm", ""]
    if found.changed:
        lines += ["  what differs:"] + [f"    {key}: {old} -> {new}" for key, (old, new) in list(found.changed.items())[:12]] + [""]
    lines.append(f"  {'figure':<44}{'A':>8}{'B':>8}{'B - A':>9}   {'interval':<20}{'p':>8}  verdict")
    lines += [
        f"  {row.key:<44}{row.a:>8.3f}{row.b:>8.3f}{row.test.difference:>+9.3f}   {row.test.low:+.3f} to {row.test.high:+.3f}    {row.p_holm:>8.2g}  {found.verdict(row)}"
        for row in found.rows
    ]
    wins = sum(found.verdict(row) == "better" for row in found.rows)
    losses = sum(found.verdict(row) == "worse" for row in found.rows)
    lines += ["", f"  B wins {wins}, loses {losses}, ties {len(found.rows) - wins - losses} of {len(found.rows)} figures"]
    return "\n".join(lines)
