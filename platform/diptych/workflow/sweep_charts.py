"""A sweep as pictures: a heat map over two axes, parallel coordinates over more, and the front of what no setting beats in both figures."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diptych.workflow.charts import COLOURS

OWN = ("id", "status", "metric", "value", "low", "high")
ENDS = "ends of the intervals"
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH = 92, 26, 250
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 60, 40, 26, 40
LABEL_CHARACTERS = 34
LIGHT_FROM = 0.45
"""Opacity of a cell above which its number is white."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's settings that were measured.

    Attributes:
        axes: names of the axes.
        rows: a mapping a setting: each axis to its value, each figure to its number, and `ENDS` to the intervals of the figures that have one.
        metric, mode: what the winner was chosen by.
        pareto: two figures or axes with their better sides, or None.
    """

    axes: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    metric: str
    mode: str
    pareto: Mapping[str, str] | None

    @classmethod
    def read(cls, path: Path, figures: Mapping[str, Any]) -> Sweep:
        """From `sweep.parquet` and the sweep's figures in the run's record."""
        frame = pl.read_parquet(path)
        axes = [name for name in frame.columns if name not in OWN]
        rows = []
        for part in frame.partition_by("id", maintain_order=True):
            setting = {axis: _value(part[axis][0]) for axis in axes}
            ends = {metric: (low, high) for metric, low, high in part.select("metric", "low", "high").iter_rows() if low is not None}
            rows.append({**setting, **dict(zip(part["metric"], part["value"], strict=True)), ENDS: ends})
        return cls(axes, rows, figures["metric"], figures.get("mode", "max"), figures.get("pareto"))

    def best(self, count: int) -> list[tuple[float, Mapping[str, Any]]]:
        """The best settings with their value, best first."""
        measured = [(float(row[self.metric]), row) for row in self.rows if row.get(self.metric) is not None]
        return sorted(measured, key=lambda pair: pair[0], reverse=self.mode == "max")[:count]

    def chart(self) -> str:
        """A heat map where two axes span a grid, parallel coordinates otherwise; nothing for a single setting."""
        if len(self.rows) < 2:
            return ""
        levels = [_levels(self.rows, axis) for axis in self.axes]
        if len(self.axes) == 2 and len(levels[0]) * len(levels[1]) == len(self.rows):
            return self._heat_map(levels[0], levels[1])
        return self._parallel(levels)

    def _shade(self) -> tuple[float, float]:
        values = [value for value, _ in self.best(len(self.rows))]
        return min(values), max(values)

    def _heat_map(self, down: Sequence[str], across: Sequence[str]) -> str:
        low, high = self._shade()
        value_of = {(_label(row[self.axes[0]]), _label(row[self.axes[1]])): value for value, row in self.best(len(self.rows))}
        winner = max(value_of.values()) if self.mode == "max" else min(value_of.values())
        parts = [_text(LABEL_WIDTH - 8, 14, self.axes[0], "end"), _text(LABEL_WIDTH, 14, f"{self.axes[1]} \N{RIGHTWARDS ARROW}")]
        parts += [_text(LABEL_WIDTH + (column + 0.5) * CELL_WIDTH, 36, name, "middle") for column, name in enumerate(across)]
        for line, left in enumerate(down):
            y = 44 + line * CELL_HEIGHT
            parts.append(_text(LABEL_WIDTH - 8, y + 17, left, "end"))
            for column, top in enumerate(across):
                parts.append(_cell(LABEL_WIDTH + column * CELL_WIDTH, y, value_of[left, top], low, high, value_of[left, top] == winner))
        width, height = LABEL_WIDTH + len(across) * CELL_WIDTH + 4, 50 + len(down) * CELL_HEIGHT
        return f"<svg viewBox='0 0 {width} {height}' width='{width}' role='img'><title>heat map</title>{''.join(parts)}</svg>"

    def _parallel(self, levels: Sequence[Sequence[str]]) -> str:
        """A line a setting through its place on every axis to its figure on the last; the best fifth stands out."""
        names = [*self.axes, self.metric]
        xs = [LEFT + index * (WIDTH - LEFT - RIGHT) / max(1, len(names) - 1) for index in range(len(names))]
        low, high = self._shade()
        ordered = self.best(len(self.rows))
        parts = [
            f"<path class='axis' d='M{x:.1f} {TOP}V{HEIGHT - BOTTOM}'/>" + _text(x, HEIGHT - 22, name, "middle")
            for x, name in zip(xs, names, strict=True)
        ]
        for rank, (value, row) in reversed(list(enumerate(ordered))):
            ys = [_place(row[axis], level) for axis, level in zip(self.axes, levels, strict=True)] + [_between(value, low, high)]
            points = " ".join(f"{x:.1f},{HEIGHT - BOTTOM - y * (HEIGHT - BOTTOM - TOP):.1f}" for x, y in zip(xs, ys, strict=True))
            colour, opacity = (COLOURS[0], 0.9) if rank < max(1, len(ordered) // 5) else (COLOURS[5], 0.35)
            parts.append(
                f"<polyline fill='none' stroke='{colour}' opacity='{opacity}' points='{points}'><title>{html.escape(_said(row, self.axes))}: {value:.4g}</title></polyline>"
            )
        parts += [_text(xs[-1] + 4, TOP + 4, f"{high:.3g}"), _text(xs[-1] + 4, HEIGHT - BOTTOM, f"{low:.3g}")]
        return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'><title>parallel coordinates</title>{''.join(parts)}</svg>"

    def pareto_chart(self) -> str:
        """The settings over two figures, those that no other beats in both joined by a line; nothing where none were named."""
        points = self._points()
        if not points or self.pareto is None:
            return ""
        (x_name, x_side), (y_name, y_side) = self.pareto.items()
        front = pareto_front([(x, y) for x, y, _ in points], x_side, y_side)
        x_low, x_high = _reach([(x, row.get(ENDS, {}).get(x_name)) for x, _, row in points])
        y_low, y_high = _reach([(y, row.get(ENDS, {}).get(y_name)) for _, y, row in points])

        def at(x: float, y: float) -> tuple[float, float]:
            return (
                LEFT + _between(x, x_low, x_high) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - _between(y, y_low, y_high) * (HEIGHT - BOTTOM - TOP),
            )

        whiskers = [_whisker(at, x, y, *(row.get(ENDS, {}).get(name) for name in (x_name, y_name))) for x, y, row in points]
        dots = [_dot(*at(x, y), index in front, f"{_said(row, self.axes)}: {x:.4g}, {y:.4g}") for index, (x, y, row) in enumerate(points)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(at(points[i][0], points[i][1]) for i in front))
        labels = _text(WIDTH / 2, HEIGHT - 8, f"{x_name} ({x_low:.3g} to {x_high:.3g}), {x_side}imal is better", "middle", limit=WIDTH)
        labels += _text(LEFT, 14, f"{y_name} ({y_low:.3g} to {y_high:.3g}), {y_side}imal is better", limit=WIDTH)
        labels += "".join(self._name(at(*points[i][:2]), points[i][2]) for i in front)
        curve = f"<polyline class='curve' points='{line}'/>"
        return f"<h3>What no other setting beats in both</h3><svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'><title>Pareto front</title>{labels}{curve}{''.join(whiskers)}{''.join(dots)}</svg>"

    def _name(self, place: tuple[float, float], row: Mapping[str, Any]) -> str:
        """What a point on the front is, beside it: its values on the axes that the picture does not span."""
        x, y = place
        text = ", ".join(_label(row[axis]) for axis in self.axes if axis not in (self.pareto or ()))
        return _text(x - 8, y + 15, text, "end") if x > WIDTH / 2 else _text(x + 8, y - 7, text)

    def _points(self) -> list[tuple[float, float, Mapping[str, Any]]]:
        if self.pareto is None:
            return []
        x_name, y_name = self.pareto
        numbers = (int, float)
        return [
            (float(row[x_name]), float(row[y_name]), row)
            for row in self.rows
            if isinstance(row.get(x_name), numbers) and isinstance(row.get(y_name), numbers)
        ]


def _reach(values: Sequence[tuple[float, tuple[float, float] | None]]) -> tuple[float, float]:
    """The least and the largest of values and the ends of their intervals."""
    every = [each for value, ends in values for each in (value, *(ends or ()))]
    return min(every), max(every)


def _whisker(
    at: Callable[[float, float], tuple[float, float]],
    x: float,
    y: float,
    x_ends: tuple[float, float] | None,
    y_ends: tuple[float, float] | None,
) -> str:
    """The intervals of a point as lines through it."""
    lines = [((low, y), (high, y)) for low, high in ([x_ends] if x_ends else [])]
    lines += [((x, low), (x, high)) for low, high in ([y_ends] if y_ends else [])]
    drawn = [(*at(*first), *at(*last)) for first, last in lines]
    return "".join(f"<path stroke='{COLOURS[5]}' d='M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}'/>" for x1, y1, x2, y2 in drawn)


def pareto_front(points: Sequence[tuple[float, float]], x_side: str, y_side: str) -> list[int]:
    """Indices of the points that no other is at least as good as in both and better than in one; sides are `max` or `min`."""
    signed = [(x if x_side == "max" else -x, y if y_side == "max" else -y) for x, y in points]
    return [i for i, (x, y) in enumerate(signed) if not any(a >= x and b >= y and (a > x or b > y) for a, b in signed)]


def _value(text: Any) -> Any:
    return json.loads(text) if isinstance(text, str) else text


def _levels(rows: Sequence[Mapping[str, Any]], axis: str) -> list[str]:
    """An axis' values as labels: numbers in their order, anything else in the order of the settings."""
    values = list({_label(row[axis]): row[axis] for row in rows}.values())
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    return [_label(value) for value in values]


def _place(value: Any, levels: Sequence[str]) -> float:
    """Where a value stands on its axis, in [0, 1]: numbers by size, on a logarithmic scale where they span two decades."""
    numbers = [json.loads(level) for level in levels if _is_number(level)]
    if len(numbers) == len(levels) and len(levels) > 1:
        if min(numbers) > 0 and max(numbers) / min(numbers) >= 100:
            return _between(math.log(value), math.log(min(numbers)), math.log(max(numbers)))
        return _between(value, min(numbers), max(numbers))
    return _between(levels.index(_label(value)), 0, len(levels) - 1)


def _is_number(text: str) -> bool:
    try:
        return isinstance(json.loads(text), int | float)
    except ValueError:
        return False


def _between(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _said(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    return ", ".join(f"{axis} = {_label(row[axis])}" for axis in axes)


def _text(x: float, y: float, text: str, anchor: str = "start", *, limit: int = LABEL_CHARACTERS, light: bool = False) -> str:
    short = text if len(text) <= limit else f"\N{HORIZONTAL ELLIPSIS}{text[1 - limit :]}"
    style = " style='fill: #fff'" if light else ""  # an attribute would not win over the page's own rule for texts
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'{style}><title>{html.escape(text)}</title>{html.escape(short)}</text>"


def _cell(x: float, y: float, value: float, low: float, high: float, wins: bool) -> str:
    frame = f" stroke='{COLOURS[4]}' stroke-width='2'" if wins else ""
    shade = 0.08 + 0.8 * _between(value, low, high)
    rectangle = f"<rect x='{x + 1}' y='{y + 1}' width='{CELL_WIDTH - 2}' height='{CELL_HEIGHT - 2}' fill='{COLOURS[0]}' fill-opacity='{shade:.2f}'{frame}/>"
    return rectangle + _text(x + CELL_WIDTH / 2, y + 17, f"{value:.4g}", "middle", light=shade > LIGHT_FROM)


def _dot(x: float, y: float, on_front: bool, text: str) -> str:
    colour = COLOURS[0] if on_front else COLOURS[5]
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'><title>{html.escape(text)}</title></circle>"
