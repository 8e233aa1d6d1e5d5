"""Augmentations that are stored as numbers and applied again: a crop, then operations of RandAugment, on a decoded picture.

Cubuk et al., "RandAugment" (2020), table 6, in torchvision's order, ranges and bins; stored and replayed as in MobileCLIP (Vasu et al., CVPR 2024, section 3.1). The same numbers
give the same picture, whatever its size in pixels, so that what a teacher said of it once holds each time. Nothing comes after: a mirror
or another colour would make a picture that the teacher never saw.

Shape legend: H, W height and width in pixels. All pictures are uint8 RGB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from diptych.core import chance
from diptych.pairs.decode import Box, Pixels

TRIES = 10
BINS = 31
SHIFT = 150 / 331
"""The largest shift, in shares of the picture's side."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to a picture.

    Attributes:
        box: the crop in pixels of the picture as it is stored: left, top, width, height.
        operations: places in `OPERATIONS` and signed magnitudes, in the order in which they are applied.
    """

    box: Box
    operations: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What augmentations are drawn from.

    Attributes:
        crop_scale: least and most share of the picture's area that is kept.
        crop_ratio: least and most width / height of the crop.
        operations: how many follow the crop.
        magnitude: the bin of their strength, in [0, 30].
        size_px: side of the result, in which shifts are counted.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    operations: int = 2
    magnitude: int = 9
    size_px: int = 224


def draw(recipe: Recipe, seed: int, key: str, index: int, picture_size: tuple[int, int]) -> Augmentation:
    """The augmentation of a number, drawn from `(seed, key, index)`, of a picture of a (width, height) in pixels."""
    generator = chance.generator(seed, "augmentation", key, index)
    box = _box(recipe, generator, picture_size)
    operations = []
    for _ in range(recipe.operations):
        place = int(generator.integers(len(OPERATIONS)))
        operation = OPERATIONS[place]
        sign = -1 if operation.signed and generator.random() < 0.5 else 1
        operations.append((place, sign * operation.strength(recipe.magnitude / (BINS - 1), recipe.size_px)))
    return Augmentation(box, tuple(operations))


def _box(recipe: Recipe, generator: np.random.Generator, picture_size: tuple[int, int]) -> Box:
    """Area uniform, shape log-uniform; the first of ten tries that fits, else the largest centred box of an allowed shape."""
    width, height = picture_size
    low, high = recipe.crop_ratio
    for _ in range(TRIES):
        area = width * height * generator.uniform(*recipe.crop_scale)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1)), w, h
    allowed = min(max(width / height, low), high)
    w, h = max(1, min(width, round(height * allowed))), max(1, min(height, round(width / allowed)))
    return (width - w) // 2, (height - h) // 2, w, h


def apply(picture_HWC: Pixels, augmentation: Augmentation, size: int, drawn_at: int | None = None) -> Pixels:
    """The augmented picture `[size, size, 3]`.

    Args:
        picture_HWC: the whole picture; the box must lie in it.
        augmentation: what to do.
        size: side of the result in pixels.
        drawn_at: the side in which shifts are counted, in pixels; None: `size`. Shifts of pictures of another side are scaled.
    """
    left, top, width, height = augmentation.box
    inside = min(left, top) >= 0 and 0 < width <= picture_HWC.shape[1] - left and 0 < height <= picture_HWC.shape[0] - top
    assert inside, f"the box {augmentation.box} is not in a picture of {picture_HWC.shape[1]} x {picture_HWC.shape[0]} pixels"
    part = Image.fromarray(np.ascontiguousarray(picture_HWC[top : top + height, left : left + width]))
    picture = part.resize((size, size), Image.Resampling.BICUBIC)
    for place, magnitude in augmentation.operations:
        operation = OPERATIONS[place]
        scaled = magnitude * size / drawn_at if operation.in_pixels and drawn_at is not None else magnitude
        picture = operation.change(picture, scaled)
    return np.asarray(picture)


# ---------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    """One of RandAugment's.

    Attributes:
        name: as torchvision calls it.
        change: the picture with a magnitude.
        strength: magnitude for a share of the largest strength, in [0, 1], and a side in pixels.
        signed: whether it is negative half of the time.
        in_pixels: whether the magnitude is a number of pixels.
    """

    name: str
    change: Callable[[Image.Image, float], Image.Image]
    strength: Callable[[float, int], float] = lambda share, side: 0.0
    signed: bool = False
    in_pixels: bool = False


def _moved(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """`matrix` maps places in the result to places in the picture; the nearest pixel counts, beyond the edge it is black."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, magnitude: kind(picture).enhance(1 + magnitude)


def _shear(share: float, side: int) -> float:
    del side
    return 0.3 * share


def _shift(share: float, side: int) -> float:
    return SHIFT * side * share


def _factor(share: float, side: int) -> float:
    del side
    return 0.9 * share


OPERATIONS: tuple[Operation, ...] = (
    Operation("Identity", lambda picture, _: picture),
    Operation("ShearX", lambda picture, amount: _moved(picture, (1, amount, 0, 0, 1, 0)), _shear, signed=True),
    Operation("ShearY", lambda picture, amount: _moved(picture, (1, 0, 0, amount, 1, 0)), _shear, signed=True),
    Operation("TranslateX", lambda picture, by: _moved(picture, (1, 0, -int(by), 0, 1, 0)), _shift, signed=True, in_pixels=True),
    Operation("TranslateY", lambda picture, by: _moved(picture, (1, 0, 0, 0, 1, -int(by))), _shift, signed=True, in_pixels=True),
    Operation("Rotate", lambda picture, by_deg: picture.rotate(by_deg), lambda share, side: 30.0 * share, signed=True),
    Operation("Brightness", _enhanced(ImageEnhance.Brightness), _factor, signed=True),
    Operation("Color", _enhanced(ImageEnhance.Color), _factor, signed=True),
    Operation("Contrast", _enhanced(ImageEnhance.Contrast), _factor, signed=True),
    Operation("Sharpness", _enhanced(ImageEnhance.Sharpness), _factor, signed=True),
    Operation("Posterize", lambda picture, bits: ImageOps.posterize(picture, int(bits)), lambda share, side: 8.0 - round(4 * share)),
    Operation("Solarize", ImageOps.solarize, lambda share, side: 255.0 * (1 - share)),  # type: ignore[arg-type]
    Operation("AutoContrast", lambda picture, _: ImageOps.autocontrast(picture)),
    Operation("Equalize", lambda picture, _: ImageOps.equalize(picture)),
)
"""In torchvision's order, which stored numbers point into."""
