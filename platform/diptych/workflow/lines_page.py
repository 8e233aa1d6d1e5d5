"""Accuracy under shift over accuracy without, source by source: the points and lines that `quality-not-quantity` measured, as one page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from diptych.core.errors import ConfigError
from diptych.evaluate.effective_robustness import Space, expected, fit_line, transformed
from diptych.pairs import files
from diptych.workflow.charts import COLOURS as ALL_COLOURS
from diptych.workflow.report import STYLE, section, table
from diptych.workflow.results import Result

COLOURS = tuple(ALL_COLOURS[place] for place in (0, 2, 3, 4, 5, 1))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 660, 440, 62, 16, 12, 46
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
LEAST_GAP_PX = 26
_TEXT = {"metric": pl.String, "settings": pl.String}
SHAPES = ("circle", "square", "diamond", "triangle", "down")


@dataclass(frozen=True)
class Shift:
    """The models of all runs on one shift.

    Attributes:
        set, split: the evaluation set and its split under shift.
        space: where lines are straight.
        points: source -> (accuracy without, accuracy under shift, examples) a model.
        figures: (source, metric) -> value, low and high of every run.
        ensembles: the names among `points` that are ensembles.
    """

    set: str
    split: str
    space: Space
    points: dict[str, list[tuple[float, float, int]]]
    figures: dict[tuple[str, str], list[tuple[float, float, float]]]
    ensembles: frozenset[str]


def shifts(rows: pl.DataFrame) -> list[Shift]:
    """What was measured, by set and shift, from the rows of one or more runs. Empty where no run has such rows."""
    found: dict[tuple[str, str], Shift] = {}
    for row in rows.filter(pl.col("metric").str.starts_with("point.") | pl.col("settings").str.contains('"split"')).iter_rows(named=True):
        settings: dict[str, Any] = json.loads(row["settings"])
        if "source" not in settings or "split" not in settings or settings["source"] is None:
            continue
        source, split = str(settings["source"]), str(settings["split"])
        space = cast(Space, settings.get("space", "probit"))
        shift = found.setdefault((row["set"], split), Shift(row["set"], split, space, {}, {}, frozenset(settings.get("ensembles", ()))))
        if "known" in settings and "model" in settings:
            shift.points.setdefault(source, []).append((float(settings["known"]), float(row["value"]), int(row["n"])))
        elif "range" in settings:
            shift.figures.setdefault((source, row["metric"].split(".")[0]), []).append((row["value"], row["low"], row["high"]))
    return [shift for shift in found.values() if shift.points]


def write_runs(runs: Sequence[Result], path: Path, title: str = "Lines of data sources", about: str = "") -> Path:
    """Writes the page of some evaluated runs, their points together. Raises ConfigError if none of them has lines."""
    rows = (
        pl.concat([run.rows for run in runs], how="diagonal")
        if runs
        else pl.DataFrame({"metric": [], "settings": []}, schema_overrides=_TEXT)
    )
    return write(rows, title, about or ", ".join(run.name for run in runs), path)


def has_lines(run: Result) -> bool:
    """Whether a run was evaluated with `quality-not-quantity`."""
    return bool(shifts(run.rows))


def write(rows: pl.DataFrame, title: str, about: str, path: Path) -> Path:
    """Writes the page of the rows of one or more runs. Raises ConfigError if there are no such rows."""
    found = shifts(rows)
    if not found:
        raise ConfigError.at("No lines were measured", title, "no rows of quality-not-quantity", "runs whose evaluation has that benchmark",
                             "add {method: quality-not-quantity, …} to evaluate.benchmarks")  # fmt: skip
    body = "".join(section(f"{shift.set}: {shift.split}", _lead(shift), chart(shift) + _table(shift)) for shift in found)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE.read_text()}</style>"
    page = f"<!doctype html><html lang='en'><head>{head}</head><body><main><header><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p></header>{body}</main></body></html>"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = files.partial_of(path)
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _lead(shift: Shift) -> str:
    models = sum(len(points) for name, points in shift.points.items() if name not in shift.ensembles)
    return (
        f"{models} models. Axes are {shift.space}-scaled, so that models of one source lie on a straight line. "
        "Compare lines at one accuracy without shift, never points at different ones; a line is drawn over the range of its models only."
    )


def chart(shift: Shift) -> str:
    """The scatter with a line a source; hollow marks and dashed lines are ensembles."""
    every = [point for points in shift.points.values() for point in points]
    axes = (
        _Axis.of([x for x, _, _ in every], LEFT, WIDTH - RIGHT, shift.space),
        _Axis.of([y for _, y, _ in every], HEIGHT - BOTTOM, TOP, shift.space),
    )
    parts = [_grid(axes), _diagonal(axes)]
    for place, (name, points) in enumerate(shift.points.items()):
        parts.append(_source(name, points, place, axes, shift.space, hollow=name in shift.ensembles))
    legend = "".join(_key(place, name, name in shift.ensembles) for place, name in enumerate(shift.points))
    label = f"{html.escape(shift.split)} accuracy over accuracy without shift"
    return (
        f"<p class='note'>{legend}</p><svg class='lines' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img' aria-label='{label}'>{''.join(parts)}"
        f"<text x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 8}' text-anchor='middle'>accuracy without shift</text>"
        f"<text transform='translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)' text-anchor='middle'>accuracy under shift</text></svg>"
    )


@dataclass(frozen=True)
class _Axis:
    """Accuracies to places in px, straight in the space of the lines."""

    low: float
    high: float
    start: float
    end: float
    space: Space

    @classmethod
    def of(cls, accuracies: Sequence[float], start: float, end: float, space: Space) -> _Axis:
        low, high = transformed([min(accuracies), max(accuracies)], space, 2000)
        pad = 0.08 * (high - low) or 0.2
        return cls(float(low - pad), float(high + pad), start, end, space)

    def at(self, accuracy: float) -> float:
        """The place of an accuracy."""
        value = float(transformed(accuracy, self.space, 2000))
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round accuracies inside the axis, far enough apart to be read."""
        inside = [tick for tick in TICKS if self.low <= float(transformed(tick, self.space)) <= self.high]
        kept: list[float] = []
        for tick in sorted(inside, key=lambda tick: (round(tick * 100) % 10 != 0, abs(tick - 0.5))):
            if all(abs(self.at(tick) - self.at(other)) >= LEAST_GAP_PX for other in kept):
                kept.append(tick)
        return sorted(kept)


def _grid(axes: tuple[_Axis, _Axis]) -> str:
    x_axis, y_axis = axes
    across = "".join(
        f"<path class='axis' d='M{x_axis.at(tick):.1f} {TOP}V{HEIGHT - BOTTOM}'/><text x='{x_axis.at(tick):.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{tick:.0%}</text>"
        for tick in x_axis.ticks()
    )
    return across + "".join(
        f"<path class='axis' d='M{LEFT} {y_axis.at(tick):.1f}H{WIDTH - RIGHT}'/><text x='{LEFT - 6}' y='{y_axis.at(tick) + 4:.1f}' text-anchor='end'>{tick:.0%}</text>"
        for tick in y_axis.ticks()
    )


def _diagonal(axes: tuple[_Axis, _Axis]) -> str:
    """Where accuracy does not suffer, as far as the chart shows it."""
    low, high = max(axis.low for axis in axes), min(axis.high for axis in axes)
    if low >= high:
        return ""
    x, y = ([axis.start + (value - axis.low) / (axis.high - axis.low) * (axis.end - axis.start) for value in (low, high)] for axis in axes)
    return f"<path d='M{x[0]:.1f} {y[0]:.1f}L{x[1]:.1f} {y[1]:.1f}' stroke='#98a2b3' stroke-dasharray='2 5' fill='none'><title>no loss under shift</title></path>"


def _source(
    name: str, points: Sequence[tuple[float, float, int]], place: int, axes: tuple[_Axis, _Axis], space: Space, *, hollow: bool
) -> str:
    colour = COLOURS[place % len(COLOURS)]
    marks = "".join(
        f"<g transform='translate({axes[0].at(x):.1f} {axes[1].at(y):.1f})'><title>{html.escape(name)}: {x:.1%} without, {y:.1%} under shift</title>{_mark(place, colour, hollow)}</g>"
        for x, y, _ in points
    )
    return _line(points, axes, space, colour, hollow) + marks


def _line(points: Sequence[tuple[float, float, int]], axes: tuple[_Axis, _Axis], space: Space, colour: str, hollow: bool) -> str:
    x_M, y_M = np.array([x for x, _, _ in points]), np.array([y for _, y, _ in points])
    n = min(n for _, _, n in points)
    if len(set(x_M.tolist())) < 2:
        return ""
    line = fit_line(x_M, y_M, space, n)
    ends = " ".join(f"{axes[0].at(x):.1f},{axes[1].at(float(expected(line, x, space, n))):.1f}" for x in (x_M.min(), x_M.max()))
    dash = " stroke-dasharray='7 4'" if hollow else ""
    return f"<polyline points='{ends}' fill='none' stroke='{colour}' stroke-width='2'{dash}/>"


def _mark(place: int, colour: str, hollow: bool) -> str:
    fill = "#fff" if hollow else colour
    style = f"fill='{fill}' stroke='{colour}' stroke-width='1.6'"
    match SHAPES[place % len(SHAPES)]:
        case "circle":
            return f"<circle r='4.4' {style}/>"
        case "square":
            return f"<rect x='-4' y='-4' width='8' height='8' {style}/>"
        case "diamond":
            return f"<path d='M0 -5.6L5.6 0L0 5.6L-5.6 0Z' {style}/>"
        case "triangle":
            return f"<path d='M0 -5.2L5 4.2H-5Z' {style}/>"
        case _:
            return f"<path d='M0 5.2L5 -4.2H-5Z' {style}/>"


def _key(place: int, name: str, hollow: bool) -> str:
    mark = _mark(place, COLOURS[place % len(COLOURS)], hollow)
    return f"<svg width='16' height='14' viewBox='-8 -7 16 14'>{mark}</svg> {html.escape(name)}{' (ensemble)' if hollow else ''} &nbsp; "


def _table(shift: Shift) -> str:
    """A line a source: the lines read at one accuracy, slope, fit, and accuracy beyond the reference's line; means over runs."""
    metrics = sorted({metric for _, metric in shift.figures}, key=lambda metric: (not metric.startswith("at"), metric))
    order = [name for name in metrics if name.startswith("at")] + [
        name for name in ("effective_robustness", "slope", "r2") if name in metrics
    ]
    heads = [f"at {name[2:].replace('_', '.')} % without" if name.startswith("at") else name.replace("_", " ") for name in order]
    rows = [[name, *(_cell(shift.figures.get((name, metric), [])) for metric in order)] for name in shift.points]
    return table(["source", *heads], rows)


def _cell(values: Sequence[tuple[float, float, float]]) -> str:
    if not values:
        return ""
    mean = float(np.mean([value for value, _, _ in values]))
    if len(values) == 1:
        _, low, high = values[0]
        return f"{mean:.3f} ({low:.3f} to {high:.3f})"
    spread = sorted(value for value, _, _ in values)
    return f"{mean:.3f} (runs {spread[0]:.3f} to {spread[-1]:.3f})"
