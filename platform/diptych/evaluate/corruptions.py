"""The 15 common corruptions of pictures at 5 severities, drawn by key.

Sources: Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (ICLR 2019), appendix B, and
its published severity constants; for the elastic transform those of Michaelis et al., Benchmarking Robustness in Object Detection (2019),
because the first ones do not grow with severity.

Constants in pixels were chosen for 224 x 224. Here such lengths scale with the square root of the area, so that a small picture is blurred
like its enlargement would be; shares, intensities and JPEG qualities stay. Snow, frost, fog and elastic fields are drawn at the size of
224 x 224 and resized.

Why not a library: of those on the package index, imagecorruptions and imgaug no longer run with current scikit-image and NumPy; the one kept
fork (imagecorruptions-imaug) brings OpenCV, Numba with LLVM and scikit-image, about 430 MB installed, draws from NumPy's global state, refuses
pictures below 32 px and does not scale; TorchUncertainty needs OpenCV and Kornia, and downloads pictures of ice. Kornia, Albumentations and
torchvision lack most of the 15. So: NumPy, SciPy and Pillow. Two things differ from the published code on purpose: frost is drawn, not cut out
of six photographs, and with glass blur pixels truly change places (assigning views of an array overwrites one of the two).

Shape legend: N pictures, H W height and width in pixels, C channels (RGB).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.core.chance import generator
from diptych.core.errors import ConfigError, DataError, nearest
from diptych.evaluate.blurs import Unit, blurred, disc, gauss, streak

Name = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog",
    "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip
Pixels = NDArray[np.uint8]

NAMES: tuple[Name, ...] = get_args(Name)
SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 16
REFERENCE = 224
VERSION = 1
"""Part of the tags by which features are kept: raise it when a corruption's pixels change."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
ICE = np.array([0.87, 1.02, 1.11], np.float32)
"""The colour of frost, bluish, with mean 1."""


def corrupt(image_HWC: Pixels, name: Name, severity: int, key: str, seed: int = 0) -> Pixels:
    """A corrupted copy of a picture, uint8 `[H, W, 3]` as it came.

    Args:
        image_HWC: uint8 RGB, both sides at least 16 pixels.
        name: one of `NAMES`.
        severity: 1 (weak) to 5 (strong).
        key, seed: name the draws. All severities of a corruption make the same draws, so that they differ in strength alone.

    Raises:
        ConfigError: an unknown corruption or severity.
        DataError: pixels of another shape or type.
    """
    if name not in NAMES:
        raise ConfigError.at("Unknown corruption", "corruption", name, f"one of {', '.join(NAMES)}", nearest(name, NAMES))
    if severity not in SEVERITIES:
        raise ConfigError.at("Unknown severity", "severity", severity, "1 to 5")
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or min(image_HWC.shape[:2]) < LEAST_SIDE:
        got = (image_HWC.dtype, image_HWC.shape)
        raise DataError.at("This picture cannot be corrupted", key, got, f"uint8 [H, W, 3] with sides of at least {LEAST_SIDE} pixels")
    x: Unit = (image_HWC / 255).astype(np.float32)
    return _pixels(_CORRUPTIONS[name](x, severity - 1, generator(seed, "corruption", name, key)))


@dataclass(frozen=True)
class Corrupted:
    """A `PictureTransform`: one corruption at one severity. Attributes as the arguments of `corrupt`."""

    name: Name
    severity: int
    seed: int = 0

    @property
    def tag(self) -> str:
        """Names the corruption in digests."""
        return f"corruption/{VERSION}/{self.name}/{self.severity}/{self.seed}"

    def __call__(self, keys: Sequence[str], image_NHWC: Pixels) -> Pixels:
        """The corrupted pictures, uint8 `[N, H, W, 3]`. Raises as `corrupt`."""
        changed = [corrupt(image, self.name, self.severity, key, self.seed) for key, image in zip(keys, image_NHWC, strict=True)]
        return np.stack(changed) if changed else image_NHWC


# ---------------------------------------------------------------- lengths and layers


def _scale(image_HWC: NDArray[Any]) -> float:
    """Pixels of this picture per pixel of a 224 x 224 one."""
    return math.sqrt(image_HWC.shape[0] * image_HWC.shape[1]) / REFERENCE


def _canvas(image_HWC: NDArray[Any]) -> tuple[int, int]:
    """Height and width of a picture of this shape with the area of 224 x 224."""
    scale = _scale(image_HWC)
    return max(2, round(image_HWC.shape[0] / scale)), max(2, round(image_HWC.shape[1] / scale))


def _resized(layer_HW: NDArray[Any], height: int, width: int) -> Unit:
    """A layer brought to another size, bilinear and antialiased."""
    layer = Image.fromarray(np.ascontiguousarray(layer_HW, np.float32))
    return np.asarray(layer.resize((width, height), Image.Resampling.BILINEAR))


def _pixels(unit_HWC: Unit) -> Pixels:
    return np.asarray(np.rint(np.clip(unit_HWC, 0, 1) * 255), np.uint8)


def _picture(unit_HWC: Unit) -> Image.Image:
    return Image.fromarray(_pixels(unit_HWC))


def _unit(picture: Image.Image) -> Unit:
    return np.asarray(np.asarray(picture, np.float32) / 255, np.float32)


def _plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> Unit:
    """Clouds in [0, 1] by the diamond-square algorithm; the amplitude falls by `decay` squared an octave. The tile of 256 x 256 repeats."""
    tile = np.zeros((256, 256))
    step, swing = 256, 1.0

    def displaced(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(total / 4 + swing * rng.uniform(-1, 1, total.shape))

    while step >= 2:
        half = step // 2
        corner = tile[::step, ::step]
        pair = corner + np.roll(corner, -1, axis=0)
        centre = displaced(pair + np.roll(pair, -1, axis=1))
        tile[half::step, half::step] = centre
        tile[::step, half::step] = displaced(centre + np.roll(centre, 1, axis=0) + corner + np.roll(corner, -1, axis=1))
        tile[half::step, ::step] = displaced(centre + np.roll(centre, 1, axis=1) + corner + np.roll(corner, -1, axis=0))
        step, swing = half, swing / decay**2
    tile = (tile - tile.min()) / np.ptp(tile)
    return np.asarray(tile[np.arange(height) % 256][:, np.arange(width) % 256], np.float32)


# ---------------------------------------------------------------- the corruptions: picture in [0, 1], severity from 0, draws


def _gaussian_noise(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    return np.asarray(x + sigma * rng.standard_normal(x.shape, np.float32), np.float32)


def _shot_noise(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    photons = (60, 25, 12, 5, 3)[level]
    return np.asarray(rng.poisson(x * photons) / photons, np.float32)


def _impulse_noise(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    struck, white = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(struck, white.astype(np.float32), x)


def _defocus_blur(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    del rng
    return blurred(x, disc((3, 4, 6, 8, 10)[level] * _scale(x)))


def _glass_blur(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    kernel = gauss(sigma * _scale(x))
    shuffled = blurred(x, kernel).reshape(-1, 3)[_shuffle(x.shape[0], x.shape[1], reach * _scale(x), rounds, rng)]
    return blurred(shuffled.reshape(x.shape), kernel)


def _shuffle(height: int, width: int, reach: float, rounds: int, rng: np.random.Generator) -> list[int]:
    """The pixels, row by row, after each has changed places with one at most `reach` away (rounded up or down at random), `rounds` times."""
    margin = math.ceil(reach)
    row, column = np.meshgrid(np.arange(height - margin - 1, margin - 1, -1), np.arange(width - margin - 1, margin - 1, -1), indexing="ij")
    order = list(range(height * width))
    for _ in range(rounds):
        down, right = np.floor(rng.uniform(-reach, reach, (2, *row.shape)) + rng.random((2, *row.shape))).astype(np.int64)
        places = (row * width + column).ravel().tolist()
        others = ((row + down) * width + column + right).ravel().tolist()
        # One after the other: a pixel may travel on with a later change.
        for place, other in zip(places, others, strict=True):
            order[place], order[other] = order[other], order[place]
    return order


def _motion_blur(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    scale = _scale(x)
    return blurred(x, streak(2 * radius * scale, sigma * scale, rng.uniform(-45, 45)))


def _zoom_blur(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    del rng
    step, count = ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))[level]
    picture = _picture(x)
    width, height = picture.size
    total = x.copy()
    for factor in 1 + step * np.arange(count):
        left, top = (width - width / factor) / 2, (height - height / factor) / 2
        zoomed = picture.resize(picture.size, Image.Resampling.BILINEAR, box=(left, top, width - left, height - top))
        total += _unit(zoomed)
    return np.asarray(total / (count + 1), np.float32)


def _snow(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    mean, spread, flake, threshold, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    degrees = rng.uniform(-135, -45)
    height, width = _canvas(x)
    flakes = _resized(rng.normal(mean, spread, (math.ceil(height / flake), math.ceil(width / flake))), height, width)
    fallen = blurred(np.where(flakes < threshold, 0, np.clip(flakes, 0, 1)).astype(np.float32), streak(2 * radius, sigma, degrees))
    layer = _resized(fallen, *x.shape[:2])[..., None]
    pale = np.maximum(x, (x @ LUMA)[..., None] * 1.5 + 0.5)
    return np.asarray(keep * x + (1 - keep) * pale + layer + np.rot90(layer, 2), np.float32)


def _frost(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    keep, amount = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return np.asarray(keep * x + amount * _resized(_ice(*_canvas(x), rng), *x.shape[:2])[..., None] * ICE, np.float32)


def _ice(height: int, width: int, rng: np.random.Generator) -> Unit:
    """A frosted pane: patches, with needles in two directions. Its mean and spread are about those of the photographs of the published code."""
    turn = rng.uniform(0, 180)
    needles = sum(
        blurred((rng.random((height, width)) > 0.97).astype(np.float32), streak(12, 6, angle))
        for angle in (turn, turn + rng.uniform(45, 90))
    )
    patches = _plasma(height, width, 1.4, rng)
    rough = _standard(_standard(patches) + _standard(np.asarray(needles)))
    return np.asarray(np.clip(rng.uniform(0.4, 0.8) + 0.13 * rough, 0, 1), np.float32)


def _standard(layer: Unit) -> Unit:
    return np.asarray((layer - layer.mean()) / (layer.std() + 1e-6), np.float32)


def _fog(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    clouds = _resized(_plasma(*_canvas(x), decay, rng), *x.shape[:2])[..., None]
    return np.asarray((x + amount * clouds) * x.max() / (x.max() + amount), np.float32)


def _brightness(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    del rng
    # Hue and saturation stay when all three channels are multiplied; black has neither and turns grey.
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.asarray(np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised), np.float32)


def _contrast(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    del rng
    mean = x.mean(axis=(0, 1))
    return np.asarray((x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean, np.float32)


def _elastic_transform(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    from scipy.ndimage import gaussian_filter, map_coordinates

    strength = (12.5, 16.25, 21.25, 25.0, 30.0)[level] * _scale(x)
    size = x.shape[:2]
    sway = 0.005 * REFERENCE
    shift = [
        strength * _resized(gaussian_filter(rng.uniform(-sway, sway, _canvas(x)), 0.01 * REFERENCE, truncate=3), *size) for _ in range(2)
    ]
    place = np.indices(size, np.float32) + np.stack(shift)
    return np.stack([map_coordinates(x[..., channel], place, order=1, mode="reflect") for channel in range(3)], axis=-1)


def _pixelate(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    del rng
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    picture = _picture(x)
    coarse = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.BOX)
    return _unit(coarse.resize(picture.size, Image.Resampling.NEAREST))


def _jpeg_compression(x: Unit, level: int, rng: np.random.Generator) -> Unit:
    del rng
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    with Image.open(file, formats=["JPEG"]) as decoded:
        return _unit(decoded.convert("RGB"))


_CORRUPTIONS: dict[Name, Callable[[Unit, int, np.random.Generator], Unit]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
