"""The drawings: areas and places by geometry, colours where they belong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diptych.core.errors import ConfigError
from diptych.pairs.sources.shapes_draw import BACKGROUNDS, COLOURS, CORNERS, RADIUS, SHAPES, TEXTURES, of_hue, render, silhouette

AREA = {
    "circle": math.pi,
    "ring": 0.7 * math.pi,
    "square": 1.72**2,
    "triangle": 1.83,
    "diamond": 2 * 0.78 * 1.1,
    "cross": 4 * 0.7 - 0.7**2,
}
"""Of a shape of radius 1."""


@pytest.mark.parametrize("shape", AREA)
@pytest.mark.parametrize("size", RADIUS)
def test_areas_are_those_of_the_shapes(shape: str, size: str) -> None:
    covered = silhouette(shape, size, size_px=64).mean()
    assert covered == pytest.approx(AREA[shape] * RADIUS[size] ** 2, rel=0.02)


def test_the_star_has_the_area_of_its_corners() -> None:
    x, y = np.transpose(CORNERS["star"])
    shoelace = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert silhouette("star", 0.4, size_px=64).mean() == pytest.approx(shoelace * 0.16, rel=0.02)


def test_jitter_moves_the_centre() -> None:
    for shape in ("circle", "square", "diamond", "cross"):
        covered = silhouette(shape, "small", (0.125, -0.25), size_px=32)
        rows, columns = np.indices(covered.shape) + 0.5
        assert (covered * columns).sum() / covered.sum() / 32 == pytest.approx(0.625, abs=1e-3)
        assert (covered * rows).sum() / covered.sum() / 32 == pytest.approx(0.25, abs=1e-3)


def test_shapes_stand_upright_and_turn_against_the_clock() -> None:
    triangle = silhouette("triangle", "large")
    assert triangle[:8].sum() < triangle[8:].sum(), "the tip is up"
    for shape in SHAPES:
        upright = silhouette(shape, "large", size_px=16)
        assert np.array_equal(silhouette(shape, "large", turn_deg=360.0), upright)
        assert np.abs(silhouette(shape, "large", turn_deg=90.0) - np.rot90(upright)).max() <= 0.25


def test_every_shape_is_its_own() -> None:
    drawn = {shape: silhouette(shape, "small") for shape in SHAPES}
    for one, other in itertools.combinations(SHAPES, 2):
        assert np.abs(drawn[one] - drawn[other]).sum() > 0.1 * drawn[one].sum(), (one, other)


@pytest.mark.parametrize("size_px", [8, 16, 33])
def test_a_pixel_mixes_shape_and_ground_by_coverage(size_px: int) -> None:
    picture = render("star", "red", "white", "large", (0.03, 0.05), size_px, 20.0)
    assert picture.dtype == np.uint8
    assert picture.shape == (size_px, size_px, 3)
    covered = silhouette("star", "large", (0.03, 0.05), size_px, 20.0)[:, :, None]
    assert np.array_equal(picture, np.rint(covered * COLOURS["red"] + (1 - covered) * BACKGROUNDS["white"]))
    assert len(np.unique(covered)) > 4, "edges are smooth"


def test_textures_fill_the_silhouette_with_two_colours() -> None:
    for texture in TEXTURES.values():
        picture = render("square", texture, (0, 0, 0), 0.5, size_px=64)
        inside = picture[silhouette("square", 0.5, size_px=64) == 1]
        pure = [np.mean((inside == colour).all(axis=1)) for colour in (texture.first, texture.second)]
        assert min(pure) > 0.2
        assert sum(pure) > 0.5
        assert not picture[silhouette("square", 0.5, size_px=64) == 0].any()
    assert len({(texture.pattern, texture.first, texture.second) for texture in TEXTURES.values()}) == len(SHAPES)


def test_own_colours_and_sizes() -> None:
    assert np.array_equal(
        render("circle", COLOURS["blue"], BACKGROUNDS["gray"], RADIUS["large"]), render("circle", "blue", "gray", "large")
    )
    assert of_hue(0.0)[0] == max(of_hue(0.0))
    assert of_hue(480.0) == of_hue(120.0)
    assert np.argmax(of_hue(240.0)) == 2


def test_unknown_names_are_refused_with_the_nearest() -> None:
    for wrong in (
        ("cirle", "red", "black", "small"),
        ("circle", "rad", "black", "small"),
        ("circle", "red", "blak", "small"),
        ("circle", "red", "black", "smal"),
    ):
        with pytest.raises(ConfigError, match="did you mean") as error:
            render(*wrong)
        assert "no such" in str(error.value)
