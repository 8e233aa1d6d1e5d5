"""Stored augmentations: drawn by key, the same picture each time, and the same at another size."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from diptych.pairs.augmentations import OPERATIONS, Augmentation, Recipe, apply, draw

PLACE = {operation.name: place for place, operation in enumerate(OPERATIONS)}


def picture(height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    """A gradient with a bright square off its centre."""
    ramp_HW = np.add.outer(np.arange(height) * 2, np.arange(width)).astype(np.uint8)
    picture_HWC = np.stack([ramp_HW, ramp_HW[::-1], 80 + ramp_HW // 2], axis=2)
    picture_HWC[8:20, 10:26] = (250, 200, 30)
    return picture_HWC


def test_draws_depend_on_seed_key_and_number_alone() -> None:
    recipe = Recipe(size_px=32)
    found = [draw(recipe, 0, "a", index, (60, 40)) for index in range(20)]
    assert found == [draw(recipe, 0, "a", index, (60, 40)) for index in range(20)]
    assert len(set(found)) == 20
    assert not set(found) & {draw(recipe, 1, "a", index, (60, 40)) for index in range(20)}
    assert not set(found) & {draw(recipe, 0, "b", index, (60, 40)) for index in range(20)}


@pytest.mark.parametrize("size", [(60, 40), (1, 1), (300, 7), (5, 200)])
def test_boxes_lie_in_the_picture_and_keep_their_share(size: tuple[int, int]) -> None:
    shares = []
    for index in range(60):
        left, top, width, height = draw(Recipe(crop_scale=(0.3, 0.9), operations=0), 3, "k", index, size).box
        assert left >= 0 <= top
        assert 0 < width <= size[0] - left
        assert 0 < height <= size[1] - top
        shares.append(width * height / (size[0] * size[1]))
    if size == (60, 40):
        assert 0.25 < min(shares) < 0.4 < 0.7 < max(shares) < 0.95


def test_strengths_are_those_of_the_bin() -> None:
    seen: dict[str, set[float]] = {}
    for index in range(400):
        for place, magnitude in draw(Recipe(size_px=24), 0, "k", index, (60, 40)).operations:
            seen.setdefault(OPERATIONS[place].name, set()).add(round(magnitude, 4))
    assert seen.keys() == PLACE.keys(), "all of them are drawn"
    assert seen["ShearX"] == {-0.09, 0.09}
    assert seen["TranslateY"] == {-3.2628, 3.2628}
    assert seen["Rotate"] == {-9.0, 9.0}
    assert seen["Color"] == {-0.27, 0.27}
    assert seen["Posterize"] == {7.0}
    assert seen["Solarize"] == {178.5}
    assert seen["Equalize"] == {0.0}


@pytest.mark.parametrize("name", [name for name in PLACE if name != "Identity"])
def test_every_operation_changes_the_picture_and_does_so_again(name: str) -> None:
    magnitude = OPERATIONS[PLACE[name]].strength(0.7, 32)
    plain, changed = (Augmentation((0, 0, 60, 40), operations) for operations in ((), ((PLACE[name], magnitude),)))
    assert not np.array_equal(apply(picture(), changed, 32), apply(picture(), plain, 32))
    assert np.array_equal(apply(picture(), changed, 32), apply(picture(), changed, 32))


def test_signs_point_in_opposite_directions() -> None:
    for name, amount in (("TranslateX", 6.0), ("ShearY", 0.3), ("Rotate", 30.0), ("Brightness", 0.5)):
        left, right = (apply(picture(), Augmentation((0, 0, 40, 40), ((PLACE[name], sign * amount),)), 40) for sign in (-1, 1))
        assert not np.array_equal(left, right)
    moved = apply(picture(), Augmentation((0, 0, 40, 40), ((PLACE["TranslateX"], 6.0),)), 40)
    assert (moved[:, :6] == 0).all()
    assert np.array_equal(moved[:, 6:], picture()[:, :34])


def test_the_order_of_operations_counts() -> None:
    pair = ((PLACE["Solarize"], 100.0), (PLACE["Brightness"], 0.8))
    there, back = (apply(picture(), Augmentation((0, 0, 40, 40), operations), 24) for operations in (pair, pair[::-1]))
    assert not np.array_equal(there, back)


def test_shifts_scale_with_the_picture() -> None:
    stored = Augmentation((0, 0, 40, 40), ((PLACE["TranslateX"], 5.0),))
    large = apply(picture(), stored, 80, drawn_at=40)
    assert (large[:, :10] == 0).all()
    assert (large[:, 10:].sum(axis=2) > 0).all()


def test_a_box_beyond_the_picture_is_no_crop() -> None:
    with pytest.raises(AssertionError, match="not in a picture of 60 x 40"):
        apply(picture(), Augmentation((30, 0, 40, 40)), 24)
