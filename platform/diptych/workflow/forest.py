"""A forest plot as an SVG string: differences with their intervals around zero, one line a figure."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from diptych.workflow.charts import COLOURS

WIDTH, ROW, HEADING, TOP, BOTTOM = 1032, 22, 26, 0, 44
NAME_X, NUMBERS_WIDTH, P_WIDTH, GAP = 12, 286, 92, 18
CHARACTER = 6.4
"""The mean width of a character at 12 px, in px: what labels are cut by."""
COLOUR_OF = {"better": COLOURS[3], "worse": COLOURS[4], "higher": COLOURS[0], "lower": COLOURS[0]}
UNDECIDED = COLOURS[5]
WORDS = {1: ("← worse", "better →"), -1: ("← better", "worse →"), 0: ("← lower", "higher →")}


@dataclass(frozen=True)
class Line:
    """A difference with its interval. `label` stands left, then `run`, empty where there is one run only; `figures` stand right: the difference in digits, and p."""

    label: str
    run: str
    value: float
    low: float
    high: float
    verdict: str
    figures: tuple[str, str]


@dataclass(frozen=True)
class Group:
    """Lines under a heading."""

    heading: str
    lines: Sequence[Line]


def forest(groups: Sequence[Group], direction: int) -> str:
    """All groups on one axis.

    Filled squares are differences that the test shows, hollow ones are not; colour says better or worse, and the words under the axis say
    which side is which (`direction`: 1 where higher is better, -1 where lower is, 0 where neither is).
    """
    lines = [line for group in groups for line in group.lines]
    place = _Place.of(lines)
    y = float(TOP)
    parts: list[str] = []
    for group in groups:
        y += HEADING
        parts.append(f"<text class='heading' x='0' y='{y - 9:.0f}'>{html.escape(group.heading)}</text>")
        for line in group.lines:
            parts.append(_line(line, y + ROW / 2, place))
            y += ROW
    axis = _axis(place, y, direction)
    height = y + BOTTOM
    return f"<svg class='forest' viewBox='0 0 {WIDTH} {height:.0f}' role='img' aria-label='differences with their intervals'>{axis}{''.join(parts)}</svg>"


@dataclass(frozen=True)
class _Place:
    """Where things stand: the columns, in px, and the range of values that the plot spans."""

    run_x: float
    left: float
    right: float
    low: float
    high: float
    ticks: Sequence[float]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> _Place:
        longest = max((len(line.label) for line in lines), default=0)
        longest_run = max((len(line.run) for line in lines), default=0)
        run_x = NAME_X + min(longest, 34) * CHARACTER + GAP
        left = run_x + min(longest_run, 30) * CHARACTER + (GAP if longest_run else 0)
        reach = [bound for line in lines for bound in (line.low, line.high, line.value, 0.0) if math.isfinite(bound)]
        low, high = min(reach, default=0.0), max(reach, default=0.0)
        pad = 0.06 * (high - low) or 0.01
        return cls(run_x, left, WIDTH - NUMBERS_WIDTH - GAP, low - pad, high + pad, ticks(low - pad, high + pad))

    def x(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, zero among them where it lies between."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axis(place: _Place, bottom: float, direction: int) -> str:
    digits = max(0, -math.floor(math.log10(abs(place.ticks[1] - place.ticks[0])) + 1e-9)) if len(place.ticks) > 1 else 3
    marks = "".join(
        f"<path class='axis' d='M{place.x(tick):.1f} {TOP + HEADING}V{bottom + 4:.0f}'/>"
        f"<text x='{place.x(tick):.1f}' y='{bottom + 18:.0f}' text-anchor='middle'>{_signed(tick, digits)}</text>"
        for tick in place.ticks
    )
    zero = f"<path class='zero' d='M{place.x(0):.1f} {TOP + HEADING}V{bottom + 4:.0f}'/>"
    left, right = WORDS[direction]
    words = (
        f"<text x='{place.left:.1f}' y='{bottom + 36:.0f}'>{left}</text>"
        f"<text x='{place.right:.1f}' y='{bottom + 36:.0f}' text-anchor='end'>{right}</text>"
    )
    return marks + zero + words


def _line(line: Line, y: float, place: _Place) -> str:
    colour, shown = COLOUR_OF.get(line.verdict, UNDECIDED), line.verdict in COLOUR_OF
    low, value, high = (place.x(bound) for bound in (line.low, line.value, line.high))
    fill = colour if shown else "#fff"
    mark = (
        f"<path d='M{low:.1f} {y - 3.5:.1f}v7m0 -3.5H{high:.1f}m0 -3.5v7' fill='none' stroke='{colour}' stroke-width='1.6'/>"
        f"<rect x='{value - 4:.1f}' y='{y - 4:.1f}' width='8' height='8' fill='{fill}' stroke='{colour}' stroke-width='1.6'/>"
    )
    base, said = y + 4, " ".join(line.figures)
    return (
        f"<g><title>{html.escape(f'{line.label} {line.run}: {said}, {line.verdict}')}</title>"
        f"<text class='name' x='{NAME_X}' y='{base:.1f}'>{html.escape(_cut(line.label, 34))}</text>"
        f"<text x='{place.run_x:.1f}' y='{base:.1f}'>{html.escape(_cut(line.run, 30))}</text>{mark}"
        f"<text class='figures' x='{WIDTH - P_WIDTH}' y='{base:.1f}' text-anchor='end'>{html.escape(line.figures[0])}</text>"
        f"<text class='figures' x='{WIDTH}' y='{base:.1f}' text-anchor='end'>{html.escape(line.figures[1])}</text></g>"
    )


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")
