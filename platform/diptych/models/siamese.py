"""Augmentations that gradients pass through: one kind is drawn for a batch, its strength for each picture.

They change the pictures that an expert learns from and the synthetic ones alike, so that what is learnt into pixels stands them.

Source: Zhao & Bilen, Dataset Condensation with Differentiable Siamese Augmentation (ICML 2021), section 3.2.

Shape legend: N pictures, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

Kind = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
KINDS: tuple[Kind, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
SHIFT_SHARE, CUTOUT_SHARE = 0.125, 0.5
SCALE, ROTATE_DEG = 1.2, 15.0


def augment(image_NCHW: torch.Tensor, kinds: Sequence[Kind], draw: np.random.Generator) -> torch.Tensor:
    """The batch after one of `kinds`, drawn for all of it; the batch itself without kinds. Normalised pictures, same shape and dtype."""
    if not kinds:
        return image_NCHW
    return _KINDS[kinds[int(draw.integers(len(kinds)))]](image_NCHW, draw)


def _uniform(image_NCHW: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """A draw in [0, 1) a picture, `[N, 1, 1, 1]`."""
    return torch.as_tensor(draw.random(len(image_NCHW)), dtype=image_NCHW.dtype).view(-1, 1, 1, 1)


def _color(image_NCHW: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """Brightness, then saturation, then contrast."""
    image_NCHW = image_NCHW + BRIGHTNESS * (_uniform(image_NCHW, draw) - 0.5)
    grey_N1HW = image_NCHW.mean(dim=1, keepdim=True)
    image_NCHW = (image_NCHW - grey_N1HW) * (SATURATION * _uniform(image_NCHW, draw)) + grey_N1HW
    mean_N111 = image_NCHW.mean(dim=(1, 2, 3), keepdim=True)
    return (image_NCHW - mean_N111) * (_uniform(image_NCHW, draw) + CONTRAST) + mean_N111


def _crop(image_NCHW: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """Shifts a picture by up to an eighth of its side; zeros come in."""
    count, _, height, width = image_NCHW.shape
    down, right = (int(side * SHIFT_SHARE + 0.5) for side in (height, width))
    padded_NCHW = functional.pad(image_NCHW, (right, right, down, down))
    top_N, left_N = draw.integers(0, 2 * down + 1, count).tolist(), draw.integers(0, 2 * right + 1, count).tolist()
    parts = [picture[:, top : top + height, left : left + width] for picture, top, left in zip(padded_NCHW, top_N, left_N, strict=True)]
    return torch.stack(parts)


def _cutout(image_NCHW: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """Puts zeros into a square of half the side somewhere in the picture, cut off at its edges."""
    count, _, height, width = image_NCHW.shape
    tall, wide = int(height * CUTOUT_SHARE + 0.5), int(width * CUTOUT_SHARE + 0.5)
    top_N, left_N = draw.integers(-(tall // 2), height - tall // 2, count), draw.integers(-(wide // 2), width - wide // 2, count)
    row_H, column_W = np.arange(height), np.arange(width)
    hidden_NH = (row_H >= top_N[:, None]) & (row_H < top_N[:, None] + tall)
    hidden_NW = (column_W >= left_N[:, None]) & (column_W < left_N[:, None] + wide)
    keep_N1HW = ~(hidden_NH[:, :, None] & hidden_NW[:, None, :])[:, None]
    return image_NCHW * torch.from_numpy(keep_N1HW)


def _flip(image_NCHW: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    return torch.where(_uniform(image_NCHW, draw) < 0.5, image_NCHW.flip(3), image_NCHW)


def _scale(image_NCHW: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """Stretches either axis by up to a fifth, or shrinks it."""
    wide_N, tall_N = (_uniform(image_NCHW, draw).flatten() * (SCALE - 1 / SCALE) + 1 / SCALE for _ in range(2))
    zero_N = torch.zeros_like(wide_N)
    return _warped(image_NCHW, torch.stack([wide_N, zero_N, zero_N, tall_N], dim=1))


def _rotate(image_NCHW: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    angle_N = (_uniform(image_NCHW, draw).flatten() - 0.5) * (2 * math.radians(ROTATE_DEG))
    return _warped(image_NCHW, torch.stack([angle_N.cos(), -angle_N.sin(), angle_N.sin(), angle_N.cos()], dim=1))


def _warped(image_NCHW: torch.Tensor, matrix_N4: torch.Tensor) -> torch.Tensor:
    theta_N23 = functional.pad(matrix_N4.view(-1, 2, 2), (0, 1))
    grid = functional.affine_grid(theta_N23, list(image_NCHW.shape), align_corners=False)
    return functional.grid_sample(image_NCHW, grid, align_corners=False)


_KINDS: Mapping[Kind, Callable[[torch.Tensor, np.random.Generator], torch.Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
