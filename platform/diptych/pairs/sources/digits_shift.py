"""What can come between a small picture and a model that has seen clean ones only: shifts of the domain, as pure functions.

Grey levels run from 0 (black, the background) to 1 (white, the ink). A shift is a change of the picture, then Gaussian noise; the
drift is a stream that starts clean and whose corruption grows block by block.

Shape legend: H rows, W columns.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Shift = Literal["none", "pixel", "blur", "contrast", "noise", "drift"]
Grey = NDArray[np.float64]

SIGMA: dict[Shift, float] = {"none": 0.0, "pixel": 0.4, "blur": 0.15, "contrast": 0.1, "noise": 0.3, "drift": 0.3}
"""The noise that belongs to a shift unless another is asked for: its standard deviation, where black to white is 1."""

BLOCKS = 12
"""Steps of the drift: the first block is clean, the last wholly corrupted."""


class Corruption(NamedTuple):
    """A shift with its numbers.

    Attributes:
        shift: which change.
        sigma: standard deviation of the noise, in units of the grey range.
        contrast, brightness: of the shift `contrast`: grey levels become `brightness + contrast * grey`.
    """

    shift: Shift
    sigma: float
    contrast: float = 1.0
    brightness: float = 0.0

    def apply(self, grey_HW: Grey, draw: np.random.Generator, strength: float = 1.0) -> Grey:
        """The corrupted picture, float64 `[H, W]`, not clipped to [0, 1]. Only the drift has a `strength` in [0, 1] other than 1."""
        noise_HW = draw.normal(0.0, 1.0, grey_HW.shape)
        return self._changed(grey_HW, strength) + strength * self.sigma * noise_HW

    def _changed(self, grey_HW: Grey, strength: float) -> Grey:
        match self.shift:
            case "pixel":
                return sideways(grey_HW)
            case "blur":
                return blurred(grey_HW)
            case "contrast":
                return self.brightness + self.contrast * grey_HW
            case "drift":
                return (1 - strength) * grey_HW + strength * sideways(grey_HW)
            case "none" | "noise":
                return grey_HW


def sideways(grey_HW: Grey) -> Grey:
    """The picture one pixel to the right; black comes in from the left."""
    return np.pad(grey_HW, ((0, 0), (1, 0)))[:, :-1]


def blurred(grey_HW: Grey) -> Grey:
    """Each pixel's 3 x 3 neighbourhood with weights 1-2-1 both ways, over 16; all is black outside the picture."""
    padded = np.pad(grey_HW, 1)
    tall = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return np.asarray((tall[:, :-2] + 2 * tall[:, 1:-1] + tall[:, 2:]) / 16)


def block_of(row: int, rows: int) -> int:
    """The block, from 0 to 11, of a stream's row: 12 consecutive blocks whose sizes differ by one at most."""
    return row * BLOCKS // rows


def strength_of(block: int) -> float:
    """How much of the whole corruption a block of the drift has: 0 in the first, 1 in the last, linear between."""
    return block / (BLOCKS - 1)
