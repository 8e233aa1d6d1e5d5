from __future__ import annotations

import numpy as np
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import blurs
from diptych.evaluate.corruptions import NAMES, SEVERITIES, Corrupted, corrupt

WITHOUT_DRAWS = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
KEYS = [f"picture {number}" for number in range(6)]


def picture(side: int) -> np.ndarray:
    """Gradients, three discs and stripes, the same at every size."""
    y, x = np.mgrid[0:side, 0:side] / side
    rgb = np.stack([0.25 + 0.5 * x, 0.3 + 0.4 * y, 0.55 - 0.3 * x * y], axis=-1)
    for across, down, radius, colour in [
        (0.3, 0.35, 0.18, (0.85, 0.2, 0.15)), (0.7, 0.6, 0.22, (0.1, 0.45, 0.8)), (0.55, 0.2, 0.1, (0.9, 0.85, 0.3)),
    ]:  # fmt: skip
        rgb[(x - across) ** 2 + (y - down) ** 2 < radius**2] = colour
    rgb[(y > 0.8) & ((np.floor(x * 28) + np.floor(y * 28)) % 2 == 0)] *= 0.4
    return (rgb * 255).round().astype(np.uint8)


def distances(name: str, side: int, keys: list[str] = KEYS) -> list[float]:
    """Mean absolute distance from the clean picture, in grey levels, a severity."""
    clean = picture(side)
    return [float(np.mean([np.abs(corrupt(clean, name, s, key).astype(float) - clean).mean() for key in keys])) for s in SEVERITIES]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_depends_on_key_and_seed_alone(name):
    clean = picture(48)
    before = clean.copy()
    for severity in SEVERITIES:
        first = corrupt(clean, name, severity, "a")
        assert first.dtype == np.uint8
        assert first.shape == clean.shape
        assert (first == corrupt(clean, name, severity, "a")).all()
        assert (first != clean).any()
        for other in (corrupt(clean, name, severity, "b"), corrupt(clean, name, severity, "a", seed=1)):
            assert (first == other).all() == (name in WITHOUT_DRAWS)
    assert (clean == before).all()


@pytest.mark.parametrize("side", [16, 64, 224])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"snow", "frost", "fog", "pixelate"}])
def test_distance_grows_with_severity(name, side):
    found = distances(name, side, KEYS[: 1 if side == 224 or name in WITHOUT_DRAWS else 6])
    assert (np.diff(found) > 0).all(), found


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("name", ["snow", "frost", "fog"])
def test_structure_is_lost_with_severity(name, side):
    """Weather also brightens or darkens the picture, and by the published constants not always more; what it hides does grow."""
    clean = picture(side)

    def lost(severity):
        return np.mean([1 - np.corrcoef(corrupt(clean, name, severity, key).ravel(), clean.ravel())[0, 1] for key in KEYS])

    found = [lost(severity) for severity in SEVERITIES]
    assert found[0] < found[1] < found[2] < max(found[3], found[4])
    assert found[4] > 1.5 * found[0]


def test_pixelation_leaves_ever_fewer_colours():
    noise = np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8)
    cells = [len(np.unique(corrupt(noise, "pixelate", severity, "k").reshape(-1, 3), axis=0)) for severity in SEVERITIES]
    assert cells == pytest.approx([36**2, 30**2, 24**2, 18**2, 15**2], abs=3)  # two cells may have one colour


# Mean distances on `picture(224)` that the package imagecorruptions-imaug 1.1.5 gives (12 draws a severity), in grey levels.
PUBLISHED = {
    "gaussian_noise": (16.16, 23.90, 34.84, 47.84, 63.42),
    "shot_noise": (16.98, 25.92, 36.61, 54.37, 67.94),
    "impulse_noise": (3.81, 7.58, 11.43, 21.73, 34.43),
    "defocus_blur": (6.24, 7.80, 10.51, 12.70, 13.86),
    "glass_blur": (6.15, 6.99, 10.73, 10.84, 12.31),
    "motion_blur": (6.09, 8.77, 11.68, 14.57, 16.60),
    "zoom_blur": (9.44, 11.24, 12.54, 14.05, 15.71),
    "snow": (42.76, 71.47, 70.72, 85.93, 104.15),
    "frost": (62.57, 73.03, 78.34, 74.24, 77.16),
    "fog": (33.15, 36.59, 39.82, 40.46, 42.65),
    "brightness": (18.12, 35.60, 49.73, 60.73, 66.24),
    "contrast": (25.38, 29.59, 33.74, 38.00, 40.08),
    "elastic_transform": (4.07, 5.13, 6.46, 7.41, 8.57),
    "pixelate": (2.18, 0.79, 3.70, 5.16, 1.78),
    "jpeg_compression": (5.00, 5.61, 6.25, 7.20, 9.47),
}


@pytest.mark.parametrize("name", NAMES)
def test_at_224_pixels_distances_are_those_of_the_published_code(name):
    keys = KEYS[:1] if name in WITHOUT_DRAWS else KEYS if name in {"snow", "frost"} else KEYS[:3]
    assert distances(name, 224, keys) == pytest.approx(PUBLISHED[name], rel=0.2 if name == "frost" else 0.12)


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "zoom_blur", "elastic_transform", "snow", "fog"])
def test_small_pictures_are_changed_as_much_as_large_ones(name):
    small, large = distances(name, 64, KEYS[:3]), distances(name, 224, KEYS[:3])
    assert small == pytest.approx(large, rel=0.25)


@pytest.mark.parametrize("shape", [(16, 16), (16, 200), (131, 17), (256, 300)])
def test_any_shape_from_16_pixels_up(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for name in NAMES:
        assert corrupt(image, name, 3, "k").shape == image.shape


@pytest.mark.parametrize("shade", [0, 255])
def test_plain_pictures_stay_in_range(shade):
    plain = np.full((24, 24, 3), shade, np.uint8)
    for name in set(NAMES) - {"snow", "frost", "fog", "brightness", "gaussian_noise", "shot_noise", "impulse_noise"}:
        assert np.abs(corrupt(plain, name, 5, "k").astype(int) - shade).max() <= 1, name
    assert (corrupt(plain, "shot_noise", 5, "k") == 0).all() == (shade == 0)
    assert (corrupt(plain, "brightness", 5, "k") == (128 if shade == 0 else 255)).all()


def test_brightness_keeps_hue_and_saturation():
    import colorsys

    colour = np.array([[[120, 60, 30]]], np.uint8).repeat(16, 0).repeat(16, 1)
    before, after = (colorsys.rgb_to_hsv(*(c / 255)) for c in (colour[0, 0], corrupt(colour, "brightness", 2, "k")[0, 0]))
    assert after[:2] == pytest.approx(before[:2], abs=0.01)
    assert after[2] == pytest.approx(before[2] + 0.2, abs=0.005)


def test_glass_moves_pixels_and_invents_none():
    from diptych.core.chance import generator
    from diptych.evaluate.corruptions import _shuffle

    order = np.array(_shuffle(20, 30, 2.0, 3, generator(0)))
    assert (np.sort(order) == np.arange(600)).all()
    moved = np.abs(order // 30 - np.arange(600) // 30)
    assert (order != np.arange(600)).mean() > 0.5
    assert 0 < moved.mean() < 4


def test_the_transform_is_the_corruption_picture_by_picture():
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    transform = Corrupted("shot_noise", 2, seed=4)
    found = transform(["a", "b", "c"], image)
    assert (found[1] == corrupt(image[1], "shot_noise", 2, "b", 4)).all()
    assert (found[::-1] == transform(["c", "b", "a"], image[::-1])).all()
    assert transform([], image[:0]).shape == (0, 20, 20, 3)
    tags = {Corrupted(name, severity, seed).tag for name in NAMES for severity in SEVERITIES for seed in (0, 1)}
    assert len(tags) == len(NAMES) * len(SEVERITIES) * 2


def test_what_cannot_be_corrupted_is_refused():
    image = picture(16)
    with pytest.raises(ConfigError, match="did you mean 'snow'"):
        corrupt(image, "snov", 1, "k")
    with pytest.raises(ConfigError, match="severity"):
        corrupt(image, "snow", 6, "k")
    for wrong in (image[:15], image[..., :1], image / 255, image[..., 0]):
        with pytest.raises(DataError, match="cannot be corrupted"):
            corrupt(wrong, "snow", 1, "k")


# ---------------------------------------------------------------- blurs


def spread(kernel: np.ndarray) -> np.ndarray:
    """Second moments (down, right) about the centre, in square pixels."""
    place = np.arange(len(kernel)) - len(kernel) // 2
    return np.array([(kernel.sum(axis=1 - axis) * place**2).sum() for axis in (0, 1)])


@pytest.mark.parametrize("size", [0.1, 0.6, 3.0, 9.5])
def test_kernels_are_even_and_as_wide_as_they_say(size):
    for kernel, moment in ((blurs.disc(size), size**2 / 4), (blurs.gauss(size), size**2)):
        assert len(kernel) % 2 == 1
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert kernel == pytest.approx(kernel[::-1, ::-1], abs=1e-6)
        # Sharing a displacement among its neighbours adds at most a quarter.
        assert (spread(kernel) > 0.97 * moment).all()
        assert (spread(kernel) < 1.03 * moment + 0.26).all()


def test_blurs_below_a_pixel_differ_in_strength():
    centre = [blurs.disc(radius)[1, 1] for radius in (0.2, 0.3, 0.4, 0.5)]
    assert 1 > centre[0] > centre[1] > centre[2] > centre[3] > 0.5


def test_a_streak_points_where_it_should():
    down, right = (blurs.streak(8, 20, degrees) for degrees in (90, 0))
    middle = len(down) // 2
    assert down[middle:, middle].sum() == pytest.approx(1, abs=1e-5)
    assert right[middle, middle:].sum() == pytest.approx(1, abs=1e-5)
    assert right[middle, middle + 1] > right[middle, middle + 7] > 0


def test_a_whole_displacement_is_exact():
    image = np.random.default_rng(0).random((9, 12, 3)).astype(np.float32)
    kernel = blurs.kernel_of(np.array([[2.0, -1.0]]), np.ones(1))
    moved = blurs.blurred(image, kernel)
    assert moved[2:, :-1] == pytest.approx(image[:-2, 1:], abs=1e-5)
    assert blurs.blurred(image[..., 0], kernel) == pytest.approx(moved[..., 0], abs=1e-6)
