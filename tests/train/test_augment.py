from __future__ import annotations

import colorsys

import numpy as np
import pytest

from diptych.core.chance import key_hashes
from diptych.core.errors import ConfigError
from diptych.train.augment import LUMA, AugmentConfig, Draws, draw, recolor, turn

KEYS = key_hashes(f"pair-{row}" for row in range(2000))


def drawn(seed: int = 0, epoch: int = 0, keys: np.ndarray = KEYS, width: int = 64, height: int = 48, **settings: object) -> Draws:
    sizes = {"width_N": np.full(len(keys), width), "height_N": np.full(len(keys), height)}
    return draw(AugmentConfig.parse(settings), seed, epoch, key_N=keys, **sizes)


def pictures(count: int, side: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(40, 216, (count, 3, side, side), dtype=np.uint8)


def test_crops_lie_inside_and_have_the_area_and_aspect_asked_for() -> None:
    box = drawn(crop_scale=[0.3, 0.6], crop_ratio=[0.8, 1.25]).box_N4
    left, top, width, height = box.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 64).all()
    assert (top + height <= 48).all()
    share, aspect = width * height / (64 * 48), width / height
    assert share.min() > 0.28
    assert share.max() < 0.62
    assert 0.43 < share.mean() < 0.47
    assert aspect.min() > 0.76
    assert aspect.max() < 1.32
    assert np.corrcoef(left, top)[0, 1] ** 2 < 0.01
    assert len(np.unique(left)) > 20


@pytest.mark.parametrize(("width", "height"), [(400, 20), (20, 400), (1, 1), (2, 900)])
def test_pictures_of_extreme_aspect_get_the_largest_allowed_box(width: int, height: int) -> None:
    left, top, w, h = drawn(width=width, height=height).box_N4.T
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()
    if min(width, height) == 20:
        assert (np.maximum(w, h) == 27).all()
        assert (np.minimum(w, h) == 20).all()
        assert (np.abs(left + w / 2 - width / 2) <= 1).all()


def test_draws_depend_on_key_seed_and_epoch_alone() -> None:
    settings = {"flip": True, "rotate_deg": 20.0, "brightness": 0.4, "hue": 0.1, "grayscale": 0.3, "background": "random"}
    whole, part = drawn(**settings), drawn(keys=KEYS[500:600][::-1], **settings)
    for name in Draws.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[500:600][::-1])
    for other in (drawn(seed=1, **settings), drawn(epoch=1, **settings)):
        assert (other.box_N4 != whole.box_N4).any(axis=1).mean() > 0.9
        assert 0.4 < (other.flip_N != whole.flip_N).mean() < 0.6


def test_one_augmentation_does_not_move_the_draws_of_another() -> None:
    plain, more = drawn(crop_scale=[0.5, 1.0]), drawn(crop_scale=[0.5, 1.0], flip=True, hue=0.2, grayscale=0.5)
    np.testing.assert_array_equal(plain.box_N4, more.box_N4)


def test_the_default_recipe_only_crops() -> None:
    draws = drawn()
    assert not draws.flip_N.any()
    assert not draws.angle_N.any()
    assert (draws.background_N3 == 255).all()
    assert not AugmentConfig().recolors
    np.testing.assert_array_equal(recolor(pictures(2000), draws), pictures(2000))


def test_shares_are_kept() -> None:
    draws = drawn(flip=True, grayscale=0.3, rotate_deg=15.0, background="random")
    assert 0.46 < draws.flip_N.mean() < 0.54
    grey = np.isclose(draws.colour_N33, np.outer(np.ones(3), LUMA)).all(axis=(1, 2))
    assert 0.26 < grey.mean() < 0.34
    assert draws.angle_N.min() > -15
    assert draws.angle_N.max() < 15
    assert abs(draws.angle_N.mean()) < 1
    assert 110 < draws.background_N3.mean() < 145


def only(count: int, **factors: np.ndarray | float) -> Draws:
    """Draws that change colours as told, nothing else."""
    from diptych.train import augment

    saturation, hue = (np.broadcast_to(factors.get(name, value), count) for name, value in (("saturation", 1.0), ("hue", 0.0)))
    empty = drawn(keys=KEYS[:count])
    return Draws(
        empty.box_N4, empty.flip_N, empty.angle_N, empty.background_N3,
        np.broadcast_to(factors.get("brightness", 1.0), count), np.broadcast_to(factors.get("contrast", 1.0), count),
        augment._colour_matrices(np.asarray(saturation, dtype=float), np.asarray(hue, dtype=float)),
    )  # fmt: skip


def test_brightness_contrast_and_saturation_are_what_their_names_say() -> None:
    image = pictures(4)
    luma = np.tensordot(LUMA, image.astype(float).transpose(1, 0, 2, 3), 1)[:, None]
    np.testing.assert_allclose(recolor(image, only(4, brightness=0.5)), image * 0.5, atol=0.51)
    mean = luma.mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(recolor(image, only(4, contrast=0.6)), mean + 0.6 * (image - mean), atol=0.51)
    np.testing.assert_allclose(recolor(image, only(4, saturation=0.3)), luma + 0.3 * (image - luma), atol=0.51)
    grey = recolor(image, only(4, saturation=0.0))
    assert (grey[:, 0] == grey[:, 1]).all()
    assert (grey[:, 1] == grey[:, 2]).all()


def test_brightness_and_contrast_combine_in_this_order() -> None:
    image = pictures(3)
    together = recolor(image, only(3, brightness=0.7, contrast=0.5))
    one_by_one = recolor(recolor(image, only(3, brightness=0.7)), only(3, contrast=0.5))
    np.testing.assert_allclose(together.astype(int), one_by_one, atol=1)


def test_hue_turns_the_colour_wheel_and_leaves_greys() -> None:
    grey = np.full((1, 3, 2, 2), 90, dtype=np.uint8)
    np.testing.assert_array_equal(recolor(grey, only(1, hue=0.3)), grey)
    red = np.array([200, 60, 60], dtype=np.uint8).reshape(1, 3, 1, 1)
    third = recolor(red, only(1, hue=1 / 3)).ravel() / 255
    turned = (colorsys.rgb_to_hsv(*third)[0] - colorsys.rgb_to_hsv(*(red.ravel() / 255))[0]) % 1
    assert min(abs(turned - 1 / 3), abs(turned - 2 / 3)) < 0.06


def test_recolouring_does_not_depend_on_the_batch() -> None:
    settings = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}
    image = pictures(60, side=13)
    together = recolor(image, drawn(keys=KEYS[:60], **settings))
    alone = np.concatenate([recolor(image[row : row + 1], drawn(keys=KEYS[row : row + 1], **settings)) for row in range(60)])
    np.testing.assert_array_equal(together, alone)
    assert (together != image).any(axis=(1, 2, 3)).mean() > 0.9


def test_turning_shows_the_background_in_the_corners() -> None:
    image = np.zeros((21, 21, 3), dtype=np.uint8)
    turned = turn(image, 45.0, (10, 200, 30))
    assert tuple(turned[0, 0]) == (10, 200, 30)
    assert tuple(turned[10, 10]) == (0, 0, 0)


@pytest.mark.parametrize(
    "wrong", [{"crop_scale": [0.9, 0.5]}, {"crop_scale": [0.0, 1.0]}, {"crop_ratio": [2.0, 1.0]}, {"hue": 0.7}, {"crop": 1}]
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AugmentConfig.parse(wrong)
