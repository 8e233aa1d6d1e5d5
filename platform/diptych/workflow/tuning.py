"""Arms of a claim that choose some of their values themselves, so that no side is compared at a setting that suits the other.

In an arm, `{tune: [3.0e-4, 1.0e-3, 3.0e-3]}` in place of a value is an axis. Every point of an arm's grid is measured once, on the split and
with the seed that the claim's `tuning` names; the best is then what the arm runs with, on the claim's own seeds and splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from diptych.core.config import Config
from diptych.core.errors import DataError

TUNE = "tune"
Values = dict[str, Any]


class Tuning(Config):
    """How axes are chosen, the same for every arm."""

    metric: str = Field(description="the figure that chooses")
    mode: Literal["max", "min"] = Field("max", description="which side of it is better")
    split: Literal["train", "val", "test"] = Field("val", description="the split that benchmarks look at meanwhile; problems have none")
    seed: int = Field(1_000, ge=0, description="of the trials")


@dataclass(frozen=True)
class Tuned:
    """What came of an arm's axes.

    Attributes:
        axes: key path -> choices.
        tried: every point with its figure, None where it failed.
        chosen: the best point.
    """

    axes: Mapping[str, Sequence[Any]]
    tried: Sequence[tuple[Values, float | None]]
    chosen: Values

    @property
    def at_edge(self) -> list[str]:
        """The axes of which the first or the last of several numbers was chosen: a wider axis might do better."""
        return [
            key
            for key, choices in self.axes.items()
            if len(choices) > 1
            and all(isinstance(each, int | float) for each in choices)
            and self.chosen[key] in (min(choices), max(choices))
        ]

    def plain(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {"axes": {key: list(choices) for key, choices in self.axes.items()}, "tried": [list(each) for each in self.tried],
                "chosen": self.chosen}  # fmt: skip


def axes(arm: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The axes of an arm: key path -> choices."""
    return {key: value[TUNE] for key, value in arm.items() if isinstance(value, Mapping) and set(value) == {TUNE}}


def points(arm: Mapping[str, Any]) -> list[Values]:
    """Every point of an arm's grid; none for an arm without axes."""
    found = axes(arm)
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())] if found else []


def settled(arm: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An arm with its axes replaced by values, the first choices if none are given."""
    first = {key: choices[0] for key, choices in axes(arm).items()}
    return {**arm, **first, **(values or {})}


def choose(arms: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], tuning: Tuning) -> dict[str, Tuned]:
    """The best point of every arm with axes; the first of equals.

    Args:
        rows: of the trials, with `setting` (`arm`, `values`), `status` and `metrics`.

    Raises DataError where all points of an arm failed.
    """
    found = {}
    for name, arm in arms.items():
        grid = points(arm)
        if not grid:
            continue
        own = [row for row in rows if row["setting"]["arm"] == name]
        tried = [(values, _figure(own, values, tuning.metric)) for values in grid]
        measured = [(values, figure) for values, figure in tried if figure is not None]
        if not measured:
            error = next((row["error"] for row in own if row.get("error")), f"{tuning.metric} was not measured")
            raise DataError.at("An arm failed at every point of its axes", f"arms.{name}", grid, "a training that can be measured", error)
        best = (max if tuning.mode == "max" else min)(measured, key=lambda pair: pair[1])
        found[name] = Tuned(axes(arm), tried, best[0])
    return found


def _figure(rows: Sequence[Mapping[str, Any]], values: Values, metric: str) -> float | None:
    row = next((row for row in rows if row["setting"]["values"] == values), None)
    return None if row is None or row["status"] == "error" or metric not in row["metrics"] else float(row["metrics"][metric])
