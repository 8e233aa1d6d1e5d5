"""The page of a claim: its arms with intervals and curves, and what was demanded, as one static file."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from diptych.workflow.charts import COLOURS
from diptych.workflow.claim import ClaimResult, curve_path
from diptych.workflow.compare_table import save
from diptych.workflow.project import Project
from diptych.workflow.report import STYLE, section, table
from diptych.workflow.tuning import Tuned

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 46, 8, 22, 24
POINTS = 120
"""Points drawn of a curve; each is the mean of the steps that it stands for."""

Curve = tuple[list[float], list[float]]


def path_of(project: Project, claim: str) -> Path:
    """Where the page of a claim lies."""
    return project.runs / ".claims" / f"{claim}.html"


def write(result: ClaimResult, project: Project) -> Path:
    """Writes the page and gives its path."""
    return save(path_of(project, result.file.claim), page(result, project))


def page(result: ClaimResult, project: Project) -> str:
    """The page as HTML: no server, no script, nothing from elsewhere."""
    file = result.file
    verdict = "Every demand was met." if result.shown else "Not every demand was met."
    head = f"<header><h1>{html.escape(file.claim)}</h1><p>{html.escape(file.about)}</p><p class='answer'>{verdict}</p></header>"
    seeds = f"Mean over the seeds {', '.join(map(str, file.seeds))} with the 95 % t interval, and the values by seed."
    sections = [
        head,
        section("Arms", seeds, "".join(_bars(result, metric) + _arms(result, metric) for metric in result.metrics)),
        _tuned(result),
        section("Demands", "Differences are means over seeds with the paired 95 % t interval.", _demands(result)),
        section("Loss by step", "Bold: mean over seeds; thin: each seed. All panels share both axes.", _curves(result, project)),
        section("Settings", "", f"<details><summary>base and arms</summary><pre>{html.escape(_settings(result))}</pre></details>"),
    ]
    body = "\n".join(part for part in sections if part)
    title = html.escape(f"claim {file.claim}")
    return f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{STYLE.read_text()}</style></head><body><main>{body}</main></body></html>"


def _arms(result: ClaimResult, metric: str) -> str:
    rows = []
    for arm in result.file.arms:
        found = result.summary(arm, metric)
        if found is not None:
            frame = result.table.filter(result.table["arm"] == arm).sort("seed")
            values = " ".join(f"{value:.4g}" for value in frame[metric].drop_nulls())
            rows.append([arm, f"{found.mean:.4g}", f"{found.low:.4g} to {found.high:.4g}", values])
    return table(["arm", metric, "95 % interval", "by seed"], rows)


def _bars(result: ClaimResult, metric: str) -> str:
    """Every arm as a dot with its interval on one axis, the best mean on top; nothing for a single arm."""
    found = [(arm, estimate) for arm in result.file.arms if (estimate := result.summary(arm, metric)) is not None]
    found = [(arm, estimate) for arm, estimate in found if math.isfinite(estimate.low) and math.isfinite(estimate.high)]
    if len(found) < 2:
        return ""
    lower = any(finding.demand.direction == "lower" for finding in result.findings if finding.demand.metric == metric)
    found.sort(key=lambda pair: pair[1].mean, reverse=not lower)
    low, high = min(e.low for _, e in found), max(e.high for _, e in found)
    left, width, row = 150, 720, 22

    def x(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (width - left - 20)

    parts = []
    for index, (arm, estimate) in enumerate(found):
        y = 14 + index * row
        tip = html.escape(f"{arm}: {estimate.mean:.4g} ({estimate.low:.4g} to {estimate.high:.4g})")
        parts.append(
            f"<g><title>{tip}</title><text x='{left - 10}' y='{y + 4}' text-anchor='end'>{html.escape(arm)}</text>"
            f"<path d='M{x(estimate.low):.1f} {y}H{x(estimate.high):.1f}' stroke='{COLOURS[0]}' stroke-width='5' opacity='.35'/>"
            f"<circle cx='{x(estimate.mean):.1f}' cy='{y}' r='3.5' fill='{COLOURS[0]}'/></g>"
        )
    bottom = 14 + len(found) * row
    axis = f"<path class='axis' fill='none' d='M{left} {bottom}H{width - 20}'/>"
    ends = (
        f"<text x='{left}' y='{bottom + 16}'>{low:.4g}</text><text x='{width - 20}' y='{bottom + 16}' text-anchor='end'>{high:.4g}</text>"
    )
    title = f"<h3>{html.escape(metric)} {'↓' if lower else '↑'}</h3>"
    return f"{title}<svg viewBox='0 0 {width} {bottom + 22}' width='100%' role='img'><title>{html.escape(metric)}</title>{''.join(parts)}{axis}{ends}</svg>"


def _tuned(result: ClaimResult) -> str:
    tuning = result.file.tuning
    if tuning is None:
        return ""
    text = f"Each arm chose for itself: the best {tuning.metric} on {tuning.split} with seed {tuning.seed}, which no other seed here is. Bold: chosen."
    rows = [[arm, _tried(found), ", ".join(found.at_edge) or "no"] for arm, found in result.tuned.items()]
    return section("What each arm chose from", text, table(["arm", "tried", "at the edge of its axis"], rows, raw=[1]))


def _tried(found: Tuned) -> str:
    cells = []
    for values, figure in found.tried:
        words = ", ".join(
            f"{key.rsplit('.', 1)[-1]} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        text = html.escape(f"{words}: {'failed' if figure is None else f'{figure:.4g}'}")
        cells.append(f"<b>{text}</b>" if values == found.chosen else text)
    return "; ".join(cells)


def _demands(result: ClaimResult) -> str:
    rows = []
    for finding in result.findings:
        estimate = finding.estimate
        interval = f"{estimate.low:+.4g} to {estimate.high:+.4g}"
        rows.append(
            [finding.demand.title, f"{estimate.mean:+.4g}", interval, finding.demand.text, "shown" if finding.shown else "not shown"]
        )
    return table(["compared", "difference", "95 % interval", "demanded", "result"], rows)


def _curves(result: ClaimResult, project: Project) -> str:
    found = {arm: [curve for seed in result.file.seeds if (curve := _curve(result, project, arm, seed))] for arm in result.file.arms}
    drawn = [curve for curves in found.values() for curve in curves]
    if not drawn:
        return ""
    heights = sorted(y for _, ys in drawn for y in ys)
    x_high = max(max(xs) for xs, _ in drawn)
    low, high = heights[0], heights[min(len(heights) - 1, int(0.995 * len(heights)))]  # one divergence must not flatten the rest
    return "<div>" + "".join(_panel(arm, curves, (low, high), x_high) for arm, curves in found.items() if curves) + "</div>"


def _curve(result: ClaimResult, project: Project, arm: str, seed: int) -> Curve | None:
    path = curve_path(project.root, f"claims/{result.file.claim}/{arm}-s{seed}")
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    pairs = [(x, y) for x, y in zip(data["step"], data["loss"], strict=True) if math.isfinite(y)]
    size = max(1, math.ceil(len(pairs) / POINTS))
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return ([part[-1][0] for part in parts], [sum(y for _, y in part) / len(part) for part in parts]) if parts else None


def _panel(arm: str, curves: Sequence[Curve], span: tuple[float, float], x_high: float) -> str:
    low, high = span
    mean = _mean(curves)
    lines = [*(_line(curve, span, x_high, 0.8, 0.4) for curve in curves), *([_line(mean, span, x_high, 2.0, 1.0)] if mean else [])]
    labels = (
        f"<text x='{LEFT - 6}' y='{TOP + 4}' text-anchor='end'>{high:.3g}</text><text x='{LEFT - 6}' y='{HEIGHT - BOTTOM}' text-anchor='end'>{low:.3g}</text>"
        f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 6}' text-anchor='end'>{x_high:,.0f}</text>"
    )
    axes = f"<path class='axis' fill='none' d='M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}'/>"
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'><title>loss of {html.escape(arm)}</title><text x='{LEFT}' y='13'>{html.escape(arm)}</text>{axes}{labels}{''.join(lines)}</svg>"


def _mean(curves: Sequence[Curve]) -> Curve | None:
    """The mean of curves over the same steps; None where they are not the same."""
    xs = curves[0][0]
    if len(curves) < 2 or any(other != xs for other, _ in curves):
        return None
    return xs, [sum(ys) / len(ys) for ys in zip(*(ys for _, ys in curves), strict=True)]


def _line(curve: Curve, span: tuple[float, float], x_high: float, width: float, opacity: float) -> str:
    low, high = span
    points = " ".join(f"{_x(x, x_high):.1f},{_y(min(max(y, low), high), low, high):.1f}" for x, y in zip(*curve, strict=True))
    return f"<polyline fill='none' stroke='{COLOURS[0]}' stroke-width='{width}' opacity='{opacity}' points='{points}'/>"


def _x(value: float, high: float) -> float:
    return LEFT + value / (high or 1.0) * (WIDTH - RIGHT - LEFT)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1.0) * (HEIGHT - BOTTOM - TOP)


def _settings(result: ClaimResult) -> str:
    file = result.file
    return "\n".join(_flat({"base": file.base, "arms": file.arms}))


def _flat(value: object, prefix: str = "") -> Iterable[str]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{prefix}{key}.")
    else:
        yield f"{prefix.rstrip('.')}: {json.dumps(value, ensure_ascii=False)}"
