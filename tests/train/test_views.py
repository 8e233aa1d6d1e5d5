from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import drawing

from diptych.core.chance import key_hashes
from diptych.core.errors import ConfigError
from diptych.train.augment import AugmentConfig
from diptych.train.views import BLUR_SIGMA, GREY, OPERATIONS, Look, Recipe, recipe, view_seed

SIDE = 24
OWN = AugmentConfig(crop_scale=(0.5, 1.0), flip=True)


def pictures(n: int) -> np.ndarray:
    return np.stack([np.asarray(drawing(row).resize((SIDE, SIDE))).transpose(2, 0, 1) for row in range(n)])


def look(name: str | Recipe, n: int = 64, *, seed: int = 0, epoch: int = 0, first: int = 0) -> Look:
    size_N = np.full(n, SIDE, dtype=np.int64)
    key_N = key_hashes(f"pair-{row}" for row in range(first, first + n))
    made = name if isinstance(name, Recipe) else recipe(name, OWN)
    return Look(made, seed, epoch, key_N=key_N, width_N=size_N, height_N=size_N)


def test_weak_is_the_runs_own_augmentation() -> None:
    assert recipe("weak", OWN) == Recipe(OWN)
    image_NCHW = pictures(8)
    assert np.array_equal(look("weak", 8).finish(image_NCHW), image_NCHW), "no colours were asked for"


@pytest.mark.parametrize("name", ["strong", "simclr"])
def test_a_view_is_named_by_seed_epoch_and_key(name: str) -> None:
    image_NCHW = pictures(64)
    made = look(name).finish(image_NCHW)
    assert made.dtype == np.uint8
    assert made.shape == image_NCHW.shape
    assert np.array_equal(made, look(name).finish(image_NCHW))
    for other in (look(name, seed=1), look(name, epoch=1), look(name, first=64)):
        changed = (other.finish(image_NCHW) != made).any(axis=(1, 2, 3))
        assert changed.mean() > 0.9
    assert np.array_equal(image_NCHW, pictures(64)), "the input is left alone"


@pytest.mark.parametrize("name", ["strong", "simclr"])
def test_a_view_does_not_depend_on_its_neighbours(name: str) -> None:
    image_NCHW = pictures(64)
    whole = look(name).finish(image_NCHW)
    assert np.array_equal(look(name, 10, first=20).finish(image_NCHW[20:30]), whole[20:30])


def test_views_of_one_recipe_are_drawn_apart() -> None:
    assert len({0, view_seed(0, 0), view_seed(0, 1), view_seed(1, 0)}) == 4
    first, second = (look("weak", seed=view_seed(0, view)).draws for view in (0, 1))
    assert (first.box_N4 != second.box_N4).any(axis=1).mean() > 0.9
    assert 0.2 < (first.flip_N == second.flip_N).mean() < 0.8


def test_the_cut_is_a_grey_square_of_at_most_the_given_side() -> None:
    image_NCHW = np.zeros((400, 3, SIDE, SIDE), dtype=np.uint8)
    grey_NHW = (look(Recipe(OWN, cutout=0.5), 400).finish(image_NCHW) == GREY[0]).all(axis=1)
    height_N, width_N = grey_NHW.any(axis=2).sum(axis=1), grey_NHW.any(axis=1).sum(axis=1)
    assert np.array_equal(height_N * width_N, grey_NHW.sum(axis=(1, 2))), "a rectangle each"
    assert max(height_N.max(), width_N.max()) in (SIDE // 2, SIDE // 2 + 1)
    often_HW = grey_NHW.mean(axis=0)
    assert 0 < often_HW.min() < 0.5 * often_HW[6:-6, 6:-6].mean(), "anywhere, less often in the corners"


def test_the_stated_share_is_blurred() -> None:
    image_NCHW = pictures(1).repeat(400, axis=0)
    sharp = look(Recipe(OWN, blur=0.5), 400).finish(image_NCHW)
    share = (sharp != image_NCHW).any(axis=(1, 2, 3)).mean()
    low, high = BLUR_SIGMA
    assert 0 < share <= 0.57, f"half of them, less those whose blur of {low * SIDE:.2f} to {high * SIDE:.2f} pixels does not show"
    assert np.array_equal(look(Recipe(OWN, blur=0.0), 400).finish(image_NCHW), image_NCHW)


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
def test_every_operation_keeps_the_form(index: int) -> None:
    picture = Image.fromarray(pictures(1)[0].transpose(1, 2, 0))
    made = [OPERATIONS[index](picture, strength) for strength in (0.0, 0.5, 1 - 2**-53)]
    assert all(one.size == picture.size and one.mode == "RGB" for one in made)


def test_turns_shears_and_shifts_do_nothing_in_the_middle_of_their_range() -> None:
    picture = Image.fromarray(pictures(1)[0].transpose(1, 2, 0))
    for operation in OPERATIONS[-5:]:
        low, middle, high = (np.asarray(operation(picture, strength)) for strength in (0.0, 0.5, 0.999))
        assert np.array_equal(middle, np.asarray(picture))
        assert not np.array_equal(low, high)


def test_all_operations_are_drawn() -> None:
    counts: dict[int, int] = {}
    spies: list[Any] = []
    for index in range(len(OPERATIONS)):

        def spy(picture: Image.Image, strength: float, index: int = index) -> Image.Image:
            counts[index] = counts.get(index, 0) + 1
            assert 0 <= strength < 1
            return picture

        spies.append(spy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diptych.train.views.OPERATIONS", tuple(spies))
        look(Recipe(OWN, operations=2), 700).finish(np.zeros((700, 3, 2, 2), dtype=np.uint8))
    assert sum(counts.values()) == 1400
    assert all(60 < counts[index] < 145 for index in range(len(OPERATIONS)))


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'strong'"):
        recipe("stron", OWN)


def test_crop_changes_the_crop_alone() -> None:
    assert recipe("crop", OWN).augment == OWN.model_copy(update={"crop_scale": (0.08, 1.0)})


def test_around_lies_around_the_other_views_and_inside_the_picture() -> None:
    size_N = np.full(400, SIDE, dtype=np.int64)
    first, second, around = (look(name, 400, seed=seed) for name, seed in (("weak", 1), ("crop", 2), ("around", 3)))
    around.enclose([first.draws.box_N4, second.draws.box_N4], size_N, size_N)
    left, top, width, height = around.draws.box_N4.T
    assert min(left.min(), top.min()) == 0
    assert max((left + width).max(), (top + height).max()) == SIDE
    for other in (first.draws.box_N4, second.draws.box_N4):
        x, y, w, h = other.T
        assert ((left <= x) & (top <= y) & (left + width >= x + w) & (top + height >= y + h)).all()
    assert (width * height < SIDE * SIDE).mean() > 0.3
    assert not around.draws.flip_N.any()
    assert first.draws.flip_N.any()
    part = look("around", 40, seed=3, first=100)
    part.enclose([each.draws.box_N4[100:140] for each in (first, second)], size_N[:40], size_N[:40])
    assert np.array_equal(part.draws.box_N4, around.draws.box_N4[100:140])
