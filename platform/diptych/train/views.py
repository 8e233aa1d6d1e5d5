"""Further pictures of a pair for objectives that compare several: a recipe a view, on top of `augment.py`.

`weak` is the run's own augmentation, drawn anew. `strong` adds two operations of RandAugment's kind and a cut-out, as FixMatch does
(Sohn et al. 2020, appendix E); `simclr` is the recipe of SimCLR and SLIP: a small crop, a mirror, colours, a blur; `crop` is its crop alone,
for captions that name sides and colours. `around` is a random part of the picture in which all other views of the pair lie (Yang et al. 2023).
Every draw is a function of `(seed, epoch, key, view)`, all of it works on uint8, one picture never depends on another.

Shape legend: N pictures, H W height and width, C channels, K operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from diptych.core import chance
from diptych.core.errors import ConfigError, nearest
from diptych.pairs.decode import Pixels
from diptych.train.augment import AugmentConfig, Draws, draw, recolor

STREAM = chance.key_hash("view")
GREY = (127, 127, 127)
BLUR_SIGMA = (0.1 / 224, 2.0 / 224)
"""Standard deviation of the blur in shares of the picture's side."""

# Numbers of the draws, after those of `augment.py`.
BLUR, SIGMA, OPERATION, STRENGTH, CUT, CUT_LEFT, CUT_TOP, AROUND = range(32, 40)


@dataclass(frozen=True)
class Recipe:
    """What makes a view.

    Attributes:
        augment: crop, mirror, turn and colours.
        blur: share of the views that are blurred, in [0, 1].
        operations: how many of `OPERATIONS` each view goes through, drawn with replacement.
        cutout: the largest side of the grey square, in shares of the picture's side; its side is uniform below that.
        around: the crop is drawn around those of all other views.
    """

    augment: AugmentConfig
    blur: float = 0.0
    operations: int = 0
    cutout: float = 0.0
    around: bool = False


SIMCLR = {"crop_scale": (0.08, 1.0), "flip": True, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}

CROP: dict[str, Any] = {"crop_scale": SIMCLR["crop_scale"]}
PLAIN: dict[str, Any] = {"flip": False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0}

RECIPES: dict[str, Callable[[AugmentConfig], Recipe]] = {
    "weak": Recipe,
    "strong": lambda own: Recipe(own, operations=2, cutout=0.5),
    "simclr": lambda own: Recipe(own.model_copy(update=SIMCLR), blur=0.5),
    "crop": lambda own: Recipe(own.model_copy(update=CROP)),
    "around": lambda own: Recipe(own.model_copy(update=PLAIN), around=True),
}


def recipe(name: str, own: AugmentConfig) -> Recipe:
    """The recipe of a name, given the run's own augmentation. Raises ConfigError for an unknown one."""
    if name not in RECIPES:
        raise ConfigError.at("Unknown kind of view", "views", name, f"one of {', '.join(RECIPES)}", nearest(name, RECIPES))
    return RECIPES[name](own)


class Look:
    """The draws of one recipe for the N pictures of a batch.

    Args:
        recipe: what is drawn.
        seed, epoch, key_N: name the draws; `seed` is that of a view (`view_seed`) or of the run.
        width_N, height_N: sizes of the pictures in pixels.

    Attributes:
        draws: where a picture is cropped, mirrored and turned, and on which background.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        epoch: int,
        *,
        key_N: NDArray[np.uint64],
        width_N: NDArray[np.int64],
        height_N: NDArray[np.int64],
    ) -> None:
        self.recipe, self.seed, self.epoch, self.key_N = recipe, seed, epoch, key_N
        self.draws: Draws = draw(recipe.augment, seed, epoch, key_N=key_N, width_N=width_N, height_N=height_N)

    def enclose(self, box_VN4: Sequence[NDArray[np.int64]], width_N: NDArray[np.int64], height_N: NDArray[np.int64]) -> None:
        """Draws the crop anew: each of its edges lies anywhere between the boxes of the other views and the picture's own edge."""
        boxes = np.stack(box_VN4)
        low_N2, high_N2 = boxes[..., :2].min(axis=0), (boxes[..., :2] + boxes[..., 2:]).max(axis=0)
        room_N2 = np.stack([width_N, height_N], axis=1) - high_N2
        draw_N4 = self._uniform(AROUND, np.arange(4, dtype=np.uint64))
        start_N2 = np.floor(draw_N4[:, :2] * (low_N2 + 1)).astype(np.int64)
        stop_N2 = high_N2 + np.floor(draw_N4[:, 2:] * (room_N2 + 1)).astype(np.int64)
        self.draws = replace(self.draws, box_N4=np.concatenate([start_N2, stop_N2 - start_N2], axis=1))

    def finish(self, image_NCHW: Pixels) -> Pixels:
        """Colours, then what else the recipe has, on the cropped pictures."""
        if self.recipe.augment.recolors:
            image_NCHW = recolor(image_NCHW, self.draws)
        if self.recipe.blur:
            image_NCHW = self._blurred(image_NCHW)
        if self.recipe.operations:
            image_NCHW = self._operated(image_NCHW)
        return self._cut_out(image_NCHW) if self.recipe.cutout else image_NCHW

    def _uniform(self, what: int, *more: NDArray[np.uint64] | int) -> NDArray[np.float64]:
        key = self.key_N if not more else self.key_N[:, None]
        return chance.uniform(self.seed, self.epoch, what, key, *more)

    def _blurred(self, image_NCHW: Pixels) -> Pixels:
        low, high = BLUR_SIGMA
        sigma_N = (low + (high - low) * self._uniform(SIGMA)) * image_NCHW.shape[-1]
        result_NCHW = image_NCHW.copy()
        for n in np.flatnonzero(self._uniform(BLUR) < self.recipe.blur):
            result_NCHW[n] = _channels_first(_picture(image_NCHW[n]).filter(ImageFilter.GaussianBlur(float(sigma_N[n]))))
        return result_NCHW

    def _operated(self, image_NCHW: Pixels) -> Pixels:
        turn_K = np.arange(self.recipe.operations, dtype=np.uint64)
        operation_NK = (self._uniform(OPERATION, turn_K) * len(OPERATIONS)).astype(np.int64)
        strength_NK = self._uniform(STRENGTH, turn_K)
        result_NCHW = np.empty_like(image_NCHW)
        for n, image_CHW in enumerate(image_NCHW):
            picture = _picture(image_CHW)
            for operation, strength in zip(operation_NK[n], strength_NK[n], strict=True):
                picture = OPERATIONS[operation](picture, float(strength))
            result_NCHW[n] = _channels_first(picture)
        return result_NCHW

    def _cut_out(self, image_NCHW: Pixels) -> Pixels:
        """Lays a grey square on each picture; its centre is anywhere, so part of it may lie outside."""
        height, width = image_NCHW.shape[2:]
        half_N = self._uniform(CUT) * self.recipe.cutout * width / 2
        x_N, y_N = self._uniform(CUT_LEFT) * width, self._uniform(CUT_TOP) * height
        left_N, right_N, top_N, bottom_N = (
            np.clip(np.rint(edge), 0, None).astype(np.int64) for edge in (x_N - half_N, x_N + half_N, y_N - half_N, y_N + half_N)
        )
        result_NCHW = image_NCHW.copy()
        for n in range(len(result_NCHW)):
            result_NCHW[n, :, top_N[n] : bottom_N[n], left_N[n] : right_N[n]] = GREY[0]
        return result_NCHW


def view_seed(seed: int, view: int) -> int:
    """Names the draws of a view, apart from those of the others and of the pair's own picture."""
    return int(chance.mix(seed, STREAM, view))


# ---------------------------------------------------------------- operations: (picture, strength in [0, 1)) -> picture

Operation = Callable[[Image.Image, float], Image.Image]


def _between(low: float, high: float, strength: float) -> float:
    return low + (high - low) * strength


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """A factor of 0.05 to 0.95, as in FixMatch: towards black, grey, flat or smooth, never beyond the original."""
    return lambda picture, strength: kind(picture).enhance(_between(0.05, 0.95, strength))


def _affine(matrix: Callable[[float, int], tuple[float, ...]], reach: float = 0.3) -> Operation:
    """`matrix` gives the map from places in the result to places in the picture, for an amount within `reach` and a side in pixels."""
    return lambda picture, strength: picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        matrix(_between(-reach, reach, strength), picture.width),
        Image.Resampling.BILINEAR,
        fillcolor=GREY,
    )


OPERATIONS: tuple[Operation, ...] = (
    lambda picture, _: picture,
    lambda picture, _: ImageOps.autocontrast(picture),
    lambda picture, _: ImageOps.equalize(picture),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Sharpness),
    lambda picture, strength: ImageOps.posterize(picture, 4 + int(5 * strength)),
    lambda picture, strength: ImageOps.solarize(picture, int(256 * strength)),
    lambda picture, strength: picture.rotate(_between(-30, 30, strength), Image.Resampling.BILINEAR, fillcolor=GREY),
    _affine(lambda amount, side: (1, amount, -amount * side / 2, 0, 1, 0)),
    _affine(lambda amount, side: (1, 0, 0, amount, 1, -amount * side / 2)),
    _affine(lambda amount, side: (1, 0, amount * side, 0, 1, 0)),
    _affine(lambda amount, side: (1, 0, 0, 0, 1, amount * side)),
)
"""The pool of FixMatch's RandAugment with its ranges: identity, colours, bits, turn, two shears, two shifts."""


def _picture(image_CHW: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image_CHW.transpose(1, 2, 0)))


def _channels_first(picture: Image.Image) -> Pixels:
    return np.asarray(picture).transpose(2, 0, 1)
