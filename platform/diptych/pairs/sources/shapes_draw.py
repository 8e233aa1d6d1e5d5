"""Draws coloured shapes on coloured backgrounds, antialiased: pure functions of their arguments, without any chance.

Lengths are shares of the picture's side, so that a picture can have any size. Shape legend: H rows, W columns (equal), S rows and
columns of the finer grid on which a picture is drawn before it is averaged.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Collection
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import ConfigError, nearest

Pattern = Literal["rows", "columns", "slashes", "checks", "dots"]
Rgb = tuple[int, int, int]
Mask = NDArray[np.bool_]
Real = NDArray[np.float64]

SUBPIXELS = 4
"""Finer rows and columns a pixel: 17 levels of coverage at an edge."""

PATTERN_PERIOD = 0.25


class Texture(NamedTuple):
    """A pattern of two colours, in the frame of the picture and centred on the shape."""

    pattern: Pattern
    first: Rgb
    second: Rgb


COLOURS: dict[str, Rgb] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (38, 84, 208),
    "yellow": (240, 212, 48),
    "purple": (142, 60, 176),
    "orange": (244, 134, 36),
    "crimson": (190, 24, 64),
    "teal": (24, 140, 140),
}
"""The later ones are close to some of the first five: harder to tell apart."""

BACKGROUNDS: dict[str, Rgb] = {"black": (12, 12, 12), "white": (244, 244, 244), "brown": (120, 76, 42), "gray": (128, 128, 128)}
RADIUS: dict[str, float] = {"small": 0.24, "large": 0.38}

ROUND = ("circle", "ring", "crescent")
_STAR = [(math.sin(k * math.pi / 5), math.cos(k * math.pi / 5)) for k in range(10)]
_CROSS = [(0.35, 1.0), (0.35, 0.35), (1.0, 0.35)]
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (-0.86, 0.86), (0.86, 0.86), (0.86, -0.86)],
    "triangle": [(-1.0, -0.78), (0.0, 1.05), (1.0, -0.78)],
    "diamond": [(-0.78, 0.0), (0.0, 1.1), (0.78, 0.0), (0.0, -1.1)],
    "cross": [
        *_CROSS,
        *[(x, -y) for x, y in reversed(_CROSS)],
        *[(-x, -y) for x, y in _CROSS],
        *[(-x, y) for x, y in reversed(_CROSS)],
    ],
    "star": [(1.1 * x, 1.1 * y) if k % 2 == 0 else (0.46 * x, 0.46 * y) for k, (x, y) in enumerate(_STAR)],
    "arrow": [(0.0, 1.0), (0.9, 0.05), (0.32, 0.05), (0.32, -1.0), (-0.32, -1.0), (-0.32, 0.05), (-0.9, 0.05)],
}
"""Corners of a shape of radius 1, x to the right and y up."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent", "arrow")

TEXTURES: dict[str, Texture] = {
    "circle": Texture("rows", COLOURS["red"], COLOURS["yellow"]),
    "square": Texture("columns", COLOURS["blue"], COLOURS["yellow"]),
    "triangle": Texture("checks", COLOURS["green"], COLOURS["purple"]),
    "diamond": Texture("dots", COLOURS["orange"], COLOURS["blue"]),
    "cross": Texture("slashes", COLOURS["red"], COLOURS["blue"]),
    "star": Texture("checks", COLOURS["teal"], COLOURS["yellow"]),
    "ring": Texture("rows", COLOURS["green"], COLOURS["blue"]),
    "crescent": Texture("slashes", COLOURS["purple"], COLOURS["yellow"]),
    "arrow": Texture("columns", COLOURS["teal"], COLOURS["red"]),
}
"""The texture that belongs to a shape, where shapes have textures of their own."""


def render(
    shape: str,
    colour: str | Rgb | Texture,
    background: str | Rgb,
    size: str | float,
    jitter: tuple[float, float] = (0.0, 0.0),
    size_px: int = 16,
    turn_deg: float = 0.0,
) -> NDArray[np.uint8]:
    """A picture of one shape, uint8 `[size_px, size_px, 3]`.

    Args:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`, a colour of one's own, or a texture.
        background: one of `BACKGROUNDS`, or a colour of one's own.
        size: one of `RADIUS`, or a radius as a share of the picture's side.
        jitter: how far the centre lies to the right of and below the picture's, as shares of its side.
        turn_deg: turned against the clock by this angle.

    Raises ConfigError for a name that is not known.
    """
    radius = size if isinstance(size, float) else RADIUS[known("size", size, RADIUS)]
    ground = BACKGROUNDS[known("background", background, BACKGROUNDS)] if isinstance(background, str) else background
    inside_SS = _inside(shape, radius, jitter, size_px, turn_deg)
    if isinstance(colour, Texture):
        second_SS = _pattern(colour.pattern, jitter, size_px)
        layers = [(colour.first, inside_SS & ~second_SS), (colour.second, inside_SS & second_SS)]
    else:
        layers = [(COLOURS[known("colour", colour, COLOURS)] if isinstance(colour, str) else colour, inside_SS)]
    picture_HWC = np.tile(np.asarray(ground, dtype=np.float64), (size_px, size_px, 1))
    for paint, mask_SS in layers:
        picture_HWC += _covered(mask_SS)[:, :, None] * np.subtract(paint, ground)
    return np.rint(picture_HWC).astype(np.uint8)


def silhouette(
    shape: str, size: str | float, jitter: tuple[float, float] = (0.0, 0.0), size_px: int = 16, turn_deg: float = 0.0
) -> NDArray[np.float64]:
    """How much of each pixel the shape covers, float64 `[size_px, size_px]` in [0, 1]; arguments as in `render`.

    A mask for segmentation is `silhouette(…) >= 0.5`.
    """
    radius = size if isinstance(size, float) else RADIUS[known("size", size, RADIUS)]
    return _covered(_inside(shape, radius, jitter, size_px, turn_deg))


def of_hue(hue_deg: float) -> Rgb:
    """A saturated colour of this hue; 0 is red, 120 green, 240 blue."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue_deg % 360 / 360, 0.85, 0.85))
    return red, green, blue


def known(what: str, name: str, names: Collection[str]) -> str:
    """The name itself. Raises ConfigError, with the nearest name, if it is not one of `names`."""
    if name not in names:
        raise ConfigError.at(f"There is no such {what}", what, name, f"one of {', '.join(names)}", nearest(name, names))
    return name


@lru_cache(maxsize=16)
def _grid(size_px: int) -> Real:
    """Centres of the finer rows or columns, from the middle of the picture, float64 `[S]` in (-1/2, 1/2)."""
    fine = size_px * SUBPIXELS
    grid_S = (np.arange(fine) + 0.5) / fine - 0.5
    grid_S.flags.writeable = False
    return grid_S


def _inside(shape: str, radius: float, jitter: tuple[float, float], size_px: int, turn_deg: float) -> Mask:
    known("shape", shape, SHAPES)
    right_S, up_S = (_grid(size_px) - jitter[0]) / radius, (jitter[1] - _grid(size_px)) / radius
    cos, sin = math.cos(math.radians(turn_deg)), math.sin(math.radians(turn_deg))
    x_SS = cos * right_S[None, :] + sin * up_S[:, None]
    y_SS = cos * up_S[:, None] - sin * right_S[None, :]
    return _in_round(shape, x_SS, y_SS) if shape in ROUND else _in_corners(CORNERS[shape], x_SS, y_SS)


def _in_round(shape: str, x_SS: Real, y_SS: Real) -> Mask:
    square_SS = x_SS**2 + y_SS**2
    inside_SS = square_SS <= 1
    if shape == "ring":
        inside_SS &= square_SS >= 0.3
    if shape == "crescent":
        inside_SS &= (x_SS - 0.5) ** 2 + y_SS**2 >= 0.7
    return np.asarray(inside_SS)


def _in_corners(corners: list[tuple[float, float]], x_SS: Real, y_SS: Real) -> Mask:
    """A point is inside if a ray to its right crosses an odd number of edges."""
    inside_SS = np.zeros(x_SS.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if y0 != y1:
            inside_SS ^= ((y0 > y_SS) != (y1 > y_SS)) & (x_SS < x0 + (y_SS - y0) * ((x1 - x0) / (y1 - y0)))
    return inside_SS


def _pattern(pattern: Pattern, jitter: tuple[float, float], size_px: int) -> Mask:
    """Where the second colour is, bool `[S, S]`; about half of the plane, a third for dots."""
    across_SS = ((_grid(size_px) - jitter[0]) / PATTERN_PERIOD)[None, :]
    down_SS = ((_grid(size_px) - jitter[1]) / PATTERN_PERIOD)[:, None]
    match pattern:
        case "rows":
            second_SS = down_SS % 1 < 0.5
        case "columns":
            second_SS = across_SS % 1 < 0.5
        case "slashes":
            second_SS = (across_SS + down_SS) % 1 < 0.5
        case "checks":
            second_SS = (across_SS % 1 < 0.5) != (down_SS % 1 < 0.5)
        case "dots":
            second_SS = (across_SS % 1 - 0.5) ** 2 + (down_SS % 1 - 0.5) ** 2 < 0.11
    return np.broadcast_to(second_SS, (down_SS.size, across_SS.size))


def _covered(mask_SS: Mask) -> Real:
    """The share of each pixel that the mask has, float64 `[H, W]`."""
    side = len(mask_SS) // SUBPIXELS
    return np.asarray(mask_SS.reshape(side, SUBPIXELS, side, SUBPIXELS).mean(axis=(1, 3)))
