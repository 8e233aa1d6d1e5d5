"""What can be said of a small drawing in white on black without knowing what it means: how bold, how wide, how many loops.

It looks at pixels by rule, so it is the same on every machine and at every size of the picture, and never names a thing.

Shape legend: H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

INK = 0.3
"""Grey level from which a pixel belongs to a stroke; black is 0, white 1."""
TONES = ((0.288, "faint"), (0.32, "plain"), (float("inf"), "bold"))
"""Mean grey level below which a drawing is called so: thirds of the handwritten digits."""
WIDTHS = ((0.65, "narrow"), (0.8, "medium"), (float("inf"), "wide"))
"""Share of the picture's width below which strokes are called so."""
LOOPS = ("without a loop", "with one loop", "with two loops")


def describe(grey_HW: NDArray[np.floating[Any]]) -> str:
    """One of 27 descriptions, e.g. `bold narrow drawing with one loop`, of grey levels in [0, 1]; of a black picture, `empty drawing`."""
    from scipy import ndimage

    ink_HW = grey_HW >= INK
    columns = np.flatnonzero(ink_HW.any(axis=0))
    if not len(columns):
        return "empty drawing"
    tone, width = float(grey_HW.mean()), (columns[-1] - columns[0] + 1) / grey_HW.shape[1]
    _, grounds = ndimage.label(np.pad(~ink_HW, 1, constant_values=True))
    return f"{_first(TONES, tone)} {_first(WIDTHS, width)} drawing {LOOPS[min(grounds - 1, len(LOOPS) - 1)]}"


def _first(names: tuple[tuple[float, str], ...], value: float) -> str:
    return next(name for below, name in names if value < below)
