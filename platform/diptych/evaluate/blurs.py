"""Blurs as weighted means of displaced pictures. Displacements are real numbers, so that a blur of 0.3 pixels is weaker than one of 0.4.

Shape legend: H W height and width in pixels, C channels, P displacements.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Unit = NDArray[np.float32]


def kernel_of(offset_P2: NDArray[np.float64], weight_P: NDArray[np.float64]) -> Unit:
    """The kernel, odd and square, of the weighted mean of displaced pictures.

    Args:
        offset_P2: displacements (down, right) in pixels; one that falls between pixels is shared by the four around it, as in bilinear
            interpolation.
        weight_P: weights, not negative; the kernel's sum is 1.
    """
    reach = int(np.abs(offset_P2).max()) + 1
    low_P2 = np.floor(offset_P2)
    past_P2 = offset_P2 - low_P2
    row_P, column_P = (low_P2.astype(np.int64) + reach).T
    kernel = np.zeros((2 * reach + 2, 2 * reach + 2))
    for down in (0, 1):
        for right in (0, 1):
            share_P = np.abs(1 - down - past_P2[:, 0]) * np.abs(1 - right - past_P2[:, 1])
            np.add.at(kernel, (row_P + down, column_P + right), weight_P * share_P)
    return np.asarray(kernel[:-1, :-1] / kernel.sum(), np.float32)


def blurred(unit_HWC: Unit, kernel: Unit) -> Unit:
    """Convolves each channel (or a lone layer `[H, W]`) with an odd square kernel; beyond the border the picture is mirrored."""
    from scipy.signal import fftconvolve

    reach = len(kernel) // 2
    width = [(reach, reach), (reach, reach), (0, 0)][: unit_HWC.ndim]
    shaped = kernel if unit_HWC.ndim == 2 else kernel[..., None]
    return np.asarray(fftconvolve(np.pad(unit_HWC, width, mode="reflect"), shaped, mode="valid", axes=(0, 1)), np.float32)


def _grid(half: float) -> NDArray[np.float64]:
    """Points `[P, 2]` of a regular grid over a square, at most half a pixel apart."""
    line = np.linspace(-half, half, max(33, 4 * math.ceil(half) + 1))
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def disc(radius: float) -> Unit:
    """The blur of a lens out of focus: the mean over a disc, its radius in pixels."""
    offset = _grid(radius)
    return kernel_of(offset, ((offset**2).sum(axis=1) <= radius**2).astype(np.float64))


def gauss(sigma: float) -> Unit:
    """A Gaussian blur, `sigma` in pixels, cut at 3.5 of them."""
    offset = _grid(3.5 * sigma)
    return kernel_of(offset, np.exp(-(offset**2).sum(axis=1) / (2 * sigma**2)))


def streak(length: float, sigma: float, degrees: float) -> Unit:
    """The blur of a motion over `length` pixels in one direction, fading like half a Gaussian with `sigma` pixels."""
    path = np.linspace(0, length, max(65, 2 * math.ceil(length)))
    direction = np.array([math.sin(math.radians(degrees)), math.cos(math.radians(degrees))])
    return kernel_of(path[:, None] * direction, np.exp(-(path**2) / (2 * sigma**2)))
