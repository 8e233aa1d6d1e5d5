"""The report's pictures: small SVGs as strings."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 340, 190, 62, 24, 22
COLOURS = ("#2f6fde", "#9db8ef", "#e6a23c", "#16794c", "#b42318", "#667085")


def line(title: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    """A curve over steps with its range on the axes; at most 400 points are drawn."""
    stride = max(1, len(xs) // 400)
    xs, ys = xs[::stride], ys[::stride]
    low, high = min(ys), max(ys)
    x_low, x_high = min(xs), max(xs)
    points = " ".join(
        f"{_scale(x, x_low, x_high, LEFT, WIDTH - 8):.1f},{_scale(y, low, high, HEIGHT - BOTTOM, TOP):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    labels = (
        f"<text x='{LEFT - 6}' y='{TOP + 4}' text-anchor='end'>{high:.3g}</text><text x='{LEFT - 6}' y='{HEIGHT - BOTTOM}' text-anchor='end'>{low:.3g}</text>"
        f"<text x='{LEFT}' y='{HEIGHT - 6}'>{x_low:,.0f}</text><text x='{WIDTH - 8}' y='{HEIGHT - 6}' text-anchor='end'>{x_high:,.0f}</text>"
    )
    axes = f"<path class='axis' fill='none' d='M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - 8}'/>"
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'><text x='{LEFT}' y='13'>{html.escape(title)}</text>{axes}{labels}<polyline class='curve' points='{points}'/></svg>"


def _scale(value: float, low: float, high: float, start: float, end: float) -> float:
    return start if high == low else start + (value - low) / (high - low) * (end - start)


def interval(value: float, low: float, high: float, width: int = 220) -> str:
    """A share in [0, 1] as a dot with its interval as a bar."""
    x = [round(4 + position * (width - 8), 1) for position in (low, value, high)]
    return (
        f"<svg width='{width}' height='16' role='img'><title>{low:.3f} to {high:.3f}</title><path class='axis' d='M4 8H{width - 4}'/>"
        f"<path d='M{x[0]} 8H{x[2]}' stroke='{COLOURS[0]}' stroke-width='5' opacity='.35'/><circle cx='{x[1]}' cy='8' r='3.2' fill='{COLOURS[0]}'/></svg>"
    )


def shares(values: Mapping[str, float], width: int = 680) -> str:
    """Named shares of a whole as one bar with a legend."""
    total = sum(values.values()) or 1.0
    parts, legend, x = [], [], 0.0
    for position, (name, value) in enumerate(values.items()):
        colour, length = COLOURS[position % len(COLOURS)], value / total * width
        parts.append(
            f"<rect x='{x:.1f}' y='0' width='{length:.1f}' height='18' fill='{colour}'><title>{html.escape(name)} {value / total:.1%}</title></rect>"
        )
        legend.append(f"<span style='color:{colour}'>■</span> {html.escape(name)} {value / total:.1%}")
        x += length
    return f"<p class='note'>of a training step: {' &nbsp; '.join(legend)}</p><svg viewBox='0 0 {width} 18' width='100%' height='18'>{''.join(parts)}</svg>"
