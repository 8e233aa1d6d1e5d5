"""Concepts by rank and frequency, before and after curation: where the head was cut and what became of the tail."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.workflow.charts import COLOURS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 300, 62, 14, 24, 40
POINTS = 160

Counts = NDArray[np.integer[Any]]


def rank_frequency(before_E: Counts, after_E: Counts) -> str:
    """Both axes logarithmic; a concept keeps the rank that it had before, so that a cut head is seen where it was."""
    order = np.argsort(-before_E, kind="stable")
    before_R, after_R = before_E[order], after_E[order]
    ranks = int((before_R > 0).sum())
    if not ranks:
        return ""
    most = max(int(before_R[0]), int(after_R.max()), 2)
    places = np.unique(np.rint(np.geomspace(1, ranks, POINTS)).astype(int))

    def at(rank: float, count: float) -> tuple[float, float]:
        x = LEFT + np.log(rank) / max(np.log(ranks), 1e-9) * (WIDTH - LEFT - RIGHT)
        return float(x), float(HEIGHT - BOTTOM - np.log(max(count, 0.8) / 0.8) / np.log(most / 0.8) * (HEIGHT - BOTTOM - TOP))

    def curve(values_R: Counts, colour: str, width: float) -> str:
        # The mean over the ranks that a point stands for: single ranks of the tail would flicker between 0 and 1.
        edges = np.append(places, ranks + 1)
        means = [float(values_R[low - 1 : high - 1].mean()) for low, high in itertools.pairwise(edges)]
        spots = " ".join("{:.1f},{:.1f}".format(*at(rank, mean)) for rank, mean in zip(places, means, strict=True))
        return f"<polyline points='{spots}' fill='none' stroke='{colour}' stroke-width='{width}'/>"

    powers = [10**power for power in range(7)]
    grid = "".join(
        f"<path class='axis' d='M{LEFT} {at(1, count)[1]:.1f}H{WIDTH - RIGHT}'/><text x='{LEFT - 6}' y='{at(1, count)[1] + 4:.1f}' text-anchor='end'>{count:,}</text>"
        for count in powers if count <= most
    ) + "".join(
        f"<path class='axis' d='M{at(rank, 1)[0]:.1f} {TOP}V{HEIGHT - BOTTOM}'/><text x='{at(rank, 1)[0]:.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{rank:,}</text>"
        for rank in powers if rank <= ranks
    )  # fmt: skip
    legend = f"<text x='{WIDTH - RIGHT}' y='14' text-anchor='end'><tspan fill='{COLOURS[5]}'>■</tspan> before &#160; <tspan fill='{COLOURS[0]}'>■</tspan> after</text>"
    names = (
        f"<text x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 6}' text-anchor='middle'>rank of the concept before</text>"
        f"<text x='{LEFT}' y='14'>pairs that name it</text>"
    )
    curves = curve(before_R, COLOURS[5], 2.4) + curve(after_R, COLOURS[0], 1.6)
    return f"<svg class='concepts' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img' aria-label='concepts by rank and frequency'>{grid}{curves}{names}{legend}</svg>"
