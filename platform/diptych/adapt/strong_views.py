"""The two views of an unlabelled picture in NoLA: the plain one for the teacher, a strongly augmented one for the student.

The strong view is SimSiam's: crop, mirror, colours, then a change of perspective, colours again, and a blur. Every draw is a function of
`(seed, epoch, key)`; torchvision only carries it out.

Source: Fazli Imam et al., CLIP meets DINO for Tuning Zero-Shot Classifier using Unlabeled Image Collections (2024), and its released code.
Shape legend: N pictures of a batch, H W height and width, C colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pydantic import Field, model_validator
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import InterpolationMode

from diptych.adapt.prompt_tuning import Views
from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.models.clip import DualEncoder
from diptych.models.preprocess import preprocess

CROP_RATIO, CROP_TRIES = (3 / 4, 4 / 3), 10


class Config(BaseConfig):
    """Strengths of the strong view; the defaults are the released ones, made for photographs of 224 pixels.

    They are not for every set: digits should not be mirrored, and a blur of two pixels leaves little of a picture of sixteen.
    """

    method: Literal["nola-strong-view"] = "nola-strong-view"
    crop_area: tuple[float, float] = Field((0.2, 1.0), description="share of the picture's area that is kept: least, most")
    flip: float = Field(0.5, ge=0, le=1, description="share of visits that are mirrored")
    jitter: float = Field(0.4, ge=0, le=1, description="brightness, contrast, saturation are scaled by 1 - this to 1 + this, twice")
    hue: float = Field(0.1, ge=0, le=0.5, description="largest turn of the colour wheel, either way, in turns")
    first_jitter: float = Field(0.8, ge=0, le=1, description="share of visits with colours changed the first time; the second time: all")
    perspective: float = Field(0.5, ge=0, le=1, description="share of visits with a change of perspective")
    distortion: float = Field(0.2, ge=0, le=1, description="farthest that a corner moves, as a share of half a side")
    blur_sigma_px: tuple[float, float] = Field((0.1, 2.0), description="deviation of the Gaussian blur in pixels of the view: least, most")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area {self.crop_area} must be (least, most) with 0 < least <= most <= 1")
        if not 0 <= self.blur_sigma_px[0] <= self.blur_sigma_px[1]:
            raise ValueError(f"blur_sigma_px {self.blur_sigma_px} must be (least, most) with 0 <= least <= most")
        return self

    def build(self, size: int, seed: int) -> StrongView:
        """The augmentation, for square views of `size` pixels a side."""
        return StrongView(self, size, seed)


Pictures = Sequence[Image.Image]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class StrongView:
    """The augmented picture of a visit. `size` is a side in pixels."""

    config: Config
    size: int
    seed: int

    def __call__(self, image: Image.Image, epoch: int, key: str) -> NDArray[np.uint8]:
        """The visit of a picture, of any mode and size, in an epoch: uint8 `[size, size, 3]`, not normalised."""
        config, draw = self.config, chance.generator(self.seed, "strong view", epoch, key)
        box = crop_box(draw, *image.size, config.crop_area)
        image = image.convert("RGB").crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
        if draw.random() < config.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draw.random() < config.first_jitter:
            image = jitter(draw, image, config.jitter, config.hue)
        if draw.random() < config.perspective:
            image = distort(draw, image, config.distortion)
        image = jitter(draw, image, config.jitter, config.hue)
        return np.asarray(image.filter(ImageFilter.GaussianBlur(draw.uniform(*config.blur_sigma_px))))


def crop_box(draw: np.random.Generator, width: int, height: int, area_share: tuple[float, float]) -> Box:
    """Left, top, right, bottom of a crop with a drawn area and aspect ratio, in pixels.

    Where ten draws do not fit into the picture: the largest central crop with an allowed ratio, as in torchvision.
    """
    low, high = CROP_RATIO
    for _ in range(CROP_TRIES):
        area = width * height * draw.uniform(*area_share)
        ratio = math.exp(draw.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jitter(draw: np.random.Generator, image: Image.Image, reach: float = 0.4, hue: float = 0.1) -> Image.Image:
    """Brightness, contrast, saturation and hue, in a drawn order."""
    steps: list[tuple[Callable[[Image.Image, float], Any], float]] = [
        (functional.adjust_brightness, draw.uniform(1 - reach, 1 + reach)),
        (functional.adjust_contrast, draw.uniform(1 - reach, 1 + reach)),
        (functional.adjust_saturation, draw.uniform(1 - reach, 1 + reach)),
    ]
    if hue:  # a turn by nothing would still round every colour
        steps.append((functional.adjust_hue, draw.uniform(-hue, hue)))
    for place in draw.permutation(len(steps)):
        change, amount = steps[place]
        image = change(image, amount)
    return image


def distort(draw: np.random.Generator, image: Image.Image, distortion: float = 0.2) -> Image.Image:
    """Moves every corner inwards by up to a share of half a side; what comes into view is black."""
    width, height = image.size
    reach_x, reach_y = int(distortion * (width // 2)), int(distortion * (height // 2))
    right, bottom = width - 1, height - 1
    corners = [[0, 0], [right, 0], [right, bottom], [0, bottom]]
    inwards = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    moved = [
        [x + dx * int(draw.integers(reach_x + 1)), y + dy * int(draw.integers(reach_y + 1))]
        for (x, y), (dx, dy) in zip(corners, inwards, strict=True)
    ]
    distorted: Image.Image = functional.perspective(image, corners, moved, interpolation=InterpolationMode.BICUBIC)
    return distorted


def view_batches(
    images: Pictures,
    keys: Sequence[str],
    label_N: NDArray[np.int64],
    *,
    model: DualEncoder,
    strong: Config | None = None,
    batch_size: int = 512,
    seed: int = 7777,
) -> Callable[[int], Iterator[Views]]:
    """What `PromptTuned.fit` takes: an epoch's number -> batches of both views, uint8, in an order that seed, epoch and keys make.

    Args:
        images: pictures of any mode and size, decoded (or decoding on access).
        keys: one a picture, unique.
        label_N: the teacher's labels, int64 `[N]`.
        model: whose evaluation preprocessing makes the weak views.
        strong: strengths of the strong views; None: the released ones.
        batch_size: pictures a step; the last batch of an epoch may be smaller.
        seed: names all draws; the default is the released one.

    Raises DataError if images, keys and labels are not equally many, or a key stands twice.
    """
    if not len(images) == len(keys) == len(label_N) or len(set(keys)) < len(keys):
        got = f"{len(images)} images, {len(set(keys))} different keys, {len(label_N)} labels"
        raise DataError.at("Every picture needs a key of its own and a label", "images, keys, label_N", got, "as many of each")
    size, cfg, hash_N = model.image_size, model.preprocess_cfg, chance.key_hashes(keys)
    strong_view = (strong or Config()).build(size, seed)

    def weak_view(image: Image.Image) -> NDArray[np.uint8]:
        return preprocess(image, size, cfg["resize_mode"], cfg["interpolation"], cfg["fill_color"])

    def batches(epoch: int) -> Iterator[Views]:
        order_N = np.argsort(chance.mix(seed, epoch, hash_N))
        for row_B in np.split(order_N, range(batch_size, len(order_N), batch_size)):
            weak_B, strong_B = zip(*((weak_view(images[row]), strong_view(images[row], epoch, keys[row])) for row in row_B), strict=True)
            yield Views(_stacked(weak_B), _stacked(strong_B), torch.from_numpy(label_N[row_B]))

    return batches


def _stacked(pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Pictures `[H, W, 3]` as one tensor `[N, 3, H, W]`."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
