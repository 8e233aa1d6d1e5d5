"""What happens to a picture on a visit: crop, mirror, turn, colours. Every draw is a function of `(seed, epoch, key)`.

So a picture looks the same whichever batch, rank or thread it is in, and a resumed run sees what the first would have seen.

Shape legend: N pictures, H W height and width, C channels, K tries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from diptych.core import chance
from diptych.core.config import Config
from diptych.pairs.decode import Box, Colour, Pixels

TRIES = 10
LUMA = np.array([0.299, 0.587, 0.114])
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])

# Every draw of a visit has its own number, so that switching one augmentation on does not change the others.
AREA, RATIO, LEFT, TOP, FLIP, ANGLE, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BACKGROUND = range(12)


class AugmentConfig(Config):
    """Strengths of the augmentations; the defaults are CLIP's recipe: a mild random crop and nothing else."""

    crop_scale: tuple[float, float] = Field(default=(0.9, 1.0), description="share of the picture's area that is kept: least, most")
    crop_ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="width / height of the crop: least, most")
    flip: bool = Field(default=False, description="mirror every second picture; hurts where captions say left or right")
    rotate_deg: float = Field(default=0.0, ge=0, le=180, description="largest turn in degrees, either way")
    brightness: float = Field(default=0.0, ge=0, le=1, description="factor is drawn from 1 - b to 1 + b")
    contrast: float = Field(default=0.0, ge=0, le=1, description="as brightness, about the picture's mean luminance")
    saturation: float = Field(default=0.0, ge=0, le=1, description="as brightness, about the picture's greys")
    hue: float = Field(default=0.0, ge=0, le=0.5, description="largest turn of the colour wheel, either way, in turns")
    grayscale: float = Field(default=0.0, ge=0, le=1, description="share of visits without colour")
    background: Literal["white", "random"] = Field(default="white", description="what lies under transparency and beyond turned corners")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} must be (least, most) with 0 < least <= most <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {self.crop_ratio} must be (least, most) with 0 < least <= most")
        return self

    @property
    def recolors(self) -> bool:
        """Whether any colour is ever changed."""
        return max(self.brightness, self.contrast, self.saturation, self.hue, self.grayscale) > 0


@dataclass(frozen=True)
class Draws:
    """What happens to each of N pictures.

    Attributes:
        box_N4: int64, left, top, width, height of the crop in pixels of the picture.
        flip_N: bool.
        angle_N: float64, degrees counter-clockwise.
        background_N3: uint8.
        brightness_N, contrast_N: float64, factors.
        colour_N33: float64, turns saturation and hue; maps greys to themselves.
    """

    box_N4: NDArray[np.int64]
    flip_N: NDArray[np.bool_]
    angle_N: NDArray[np.float64]
    background_N3: NDArray[np.uint8]
    brightness_N: NDArray[np.float64]
    contrast_N: NDArray[np.float64]
    colour_N33: NDArray[np.float64]

    def box(self, place: int) -> Box:
        """The crop of one picture of the batch."""
        left, top, width, height = self.box_N4[place].tolist()
        return left, top, width, height

    @property
    def box_and_flip_N5(self) -> NDArray[np.int64]:
        """Left, top, width, height of every crop, and 1 where it is mirrored."""
        return np.concatenate([self.box_N4, self.flip_N[:, None].astype(np.int64)], axis=1)

    def background(self, place: int) -> Colour:
        """The background of one picture of the batch."""
        red, green, blue = self.background_N3[place].tolist()
        return red, green, blue


def draw(
    config: AugmentConfig, seed: int, epoch: int, *, key_N: NDArray[np.uint64], width_N: NDArray[np.int64], height_N: NDArray[np.int64]
) -> Draws:
    """The draws of one visit to N pictures, named by the hashes of their keys and given by their sizes in pixels."""

    def chance_of(what: int) -> NDArray[np.float64]:
        return chance.uniform(seed, epoch, what, key_N)

    def around(what: int, centre: float, reach: float) -> NDArray[np.float64]:
        return centre + (2 * chance_of(what) - 1) * reach

    grey_N = chance_of(GREY) < config.grayscale
    background_N3 = np.full((len(key_N), 3), 255, dtype=np.uint8)
    if config.background == "random":
        background_N3 = (chance.uniform(seed, epoch, BACKGROUND, key_N[:, None], np.arange(3, dtype=np.uint64)) * 256).astype(np.uint8)
    return Draws(
        box_N4=crop_boxes(config, seed, epoch, key_N=key_N, width_N=width_N, height_N=height_N),
        flip_N=(chance_of(FLIP) < 0.5) & config.flip,
        angle_N=around(ANGLE, 0, config.rotate_deg),
        background_N3=background_N3,
        brightness_N=around(BRIGHTNESS, 1, config.brightness),
        contrast_N=around(CONTRAST, 1, config.contrast),
        colour_N33=_colour_matrices(np.where(grey_N, 0.0, around(SATURATION, 1, config.saturation)), around(HUE, 0, config.hue)),
    )


def crop_boxes(
    config: AugmentConfig, seed: int, epoch: int, *, key_N: NDArray[np.uint64], width_N: NDArray[np.int64], height_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Random crops int64 `[N, 4]` (left, top, width, height), all inside their pictures.

    Area uniform in `crop_scale`, aspect log-uniform in `crop_ratio`; the first of ten tries that fits, else the largest centred
    box of an allowed aspect (Szegedy et al. 2015, section 6, as torchvision does it).
    """
    try_K = np.arange(TRIES, dtype=np.uint64)
    draw_NK = [chance.uniform(seed, epoch, what, key_N[:, None], try_K) for what in (AREA, RATIO)]
    (least, most), (low, high) = config.crop_scale, config.crop_ratio
    area_NK = (width_N * height_N)[:, None] * (least + draw_NK[0] * (most - least))
    ratio_NK = np.exp(math.log(low) + draw_NK[1] * (math.log(high) - math.log(low)))
    w_NK, h_NK = np.rint(np.sqrt(area_NK * ratio_NK)), np.rint(np.sqrt(area_NK / ratio_NK))
    fits_NK = (w_NK >= 1) & (w_NK <= width_N[:, None]) & (h_NK >= 1) & (h_NK <= height_N[:, None])
    first_N, row_N, found_N = fits_NK.argmax(axis=1), np.arange(len(key_N)), fits_NK.any(axis=1)

    allowed_N = np.clip(width_N / height_N, low, high)
    w_N = np.where(found_N, w_NK[row_N, first_N], np.minimum(width_N, np.rint(height_N * allowed_N)))
    h_N = np.where(found_N, h_NK[row_N, first_N], np.minimum(height_N, np.rint(width_N / allowed_N)))
    w_N, h_N = np.maximum(w_N, 1), np.maximum(h_N, 1)
    left_N = np.where(found_N, np.floor(chance.uniform(seed, epoch, LEFT, key_N) * (width_N - w_N + 1)), (width_N - w_N) // 2)
    top_N = np.where(found_N, np.floor(chance.uniform(seed, epoch, TOP, key_N) * (height_N - h_N + 1)), (height_N - h_N) // 2)
    return np.stack([left_N, top_N, w_N, h_N], axis=1).astype(np.int64)


def turn(picture_HWC: Pixels, angle_deg: float, background: Colour) -> Pixels:
    """A square picture `[H, W, 3]` turned about its centre; corners from beyond its edge show the background."""
    turned = Image.fromarray(picture_HWC).rotate(angle_deg, Image.Resampling.BILINEAR, fillcolor=background)
    return np.asarray(turned)


def recolor(picture_NCHW: Pixels, draws: Draws) -> Pixels:
    """Applies brightness, contrast, saturation and hue, in this order, to `[N, 3, H, W]`.

    All of it is one affine map of a picture's colours: contrast moves towards the mean luminance, which the other two leave alone.
    Plain products and sums in float32, so the result of a picture does not depend on its neighbours in the batch.
    """
    gain_N = draws.brightness_N * draws.contrast_N
    mean_N = (picture_NCHW.mean(axis=(2, 3), dtype=np.float64) * LUMA).sum(axis=1)
    shift_N11 = (mean_N * draws.brightness_N * (1 - draws.contrast_N))[:, None, None].astype(np.float32)
    map_NCC11 = (draws.colour_N33 * gain_N[:, None, None]).astype(np.float32)[..., None, None]
    pixel_NCHW = picture_NCHW.astype(np.float32)
    result_NCHW = np.empty_like(picture_NCHW)
    for c in range(3):
        sum_NHW = shift_N11 + map_NCC11[:, c, 0] * pixel_NCHW[:, 0]
        sum_NHW += map_NCC11[:, c, 1] * pixel_NCHW[:, 1]
        sum_NHW += map_NCC11[:, c, 2] * pixel_NCHW[:, 2]
        np.clip(np.rint(sum_NHW, out=sum_NHW), 0, 255, out=sum_NHW)
        result_NCHW[:, c] = sum_NHW
    return result_NCHW


def _colour_matrices(saturation_N: NDArray[np.float64], hue_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Saturation, then a turn of the colour wheel (in YIQ, about the grey axis): `[N, 3, 3]` on RGB columns."""
    saturation_N33 = saturation_N[:, None, None] * np.eye(3) + (1 - saturation_N)[:, None, None] * np.outer(np.ones(3), LUMA)
    cos_N, sin_N = np.cos(2 * np.pi * hue_N), np.sin(2 * np.pi * hue_N)
    turn_N33 = np.zeros((len(hue_N), 3, 3))
    turn_N33[:, 0, 0] = 1
    turn_N33[:, 1, 1], turn_N33[:, 1, 2], turn_N33[:, 2, 1], turn_N33[:, 2, 2] = cos_N, -sin_N, sin_N, cos_N
    matrices: NDArray[np.float64] = np.linalg.inv(YIQ) @ turn_N33 @ YIQ @ saturation_N33
    return matrices
