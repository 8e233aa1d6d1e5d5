"""Augmented views of evaluation pictures, for adapters that learn from several of each.

Shape legend: N pictures, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.core.chance import generator

SCALE = (0.5, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True)
class Crops:
    """A random crop of half to all of the picture, resized to it (bicubic), flipped half of the time; drawn from `(view, key)`."""

    view: int

    @property
    def tag(self) -> str:
        """Names the change in digests."""
        return f"crops-{SCALE[0]}-{SCALE[1]}-view-{self.view}"

    def __call__(self, keys: Sequence[str], image_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The views, uint8 `[N, H, W, C]`."""
        return np.stack([self._view(key, image_HWC) for key, image_HWC in zip(keys, image_NHWC, strict=True)])

    def _view(self, key: str, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        draw = generator(self.view, "view", key)
        height, width = image_HWC.shape[:2]
        left, top, right, bottom = box(draw, width, height)
        crop = Image.fromarray(image_HWC[top:bottom, left:right])
        picture = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))
        return np.ascontiguousarray(picture[:, ::-1]) if draw.random() < 0.5 else picture


def box(draw: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop; the whole picture where no draw fits."""
    for _ in range(TRIES):
        area = draw.uniform(*SCALE) * width * height
        ratio = np.exp(draw.uniform(np.log(RATIO[0]), np.log(RATIO[1])))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(0, width - w + 1)), int(draw.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height
