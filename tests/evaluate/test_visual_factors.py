from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import DataError
from diptych.evaluate.visual_factors import by_factor, class_numbers, coarse, cues, factor_masks, group_numbers


def test_a_factor_without_images_is_nan_and_spoils_nothing():
    mask = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0]], bool)
    found = by_factor(mask, np.array([1, 0, 0, 1]))
    assert found.accuracy[:2].tolist() == [0.5, pytest.approx(1 / 3)]
    assert found.error_ratio[:2] == pytest.approx([1.0, 4 / 3])
    assert np.isnan(found.accuracy[2])
    assert np.isnan(found.error_ratio[2])
    assert np.nanmean(found.accuracy) == pytest.approx(5 / 12)


def test_a_partition_averages_back_to_the_whole():
    rng = np.random.default_rng(0)
    level, correct = rng.integers(0, 4, 200), rng.integers(0, 2, 200)
    mask = level[:, None] == np.arange(4)
    found = by_factor(mask, correct)
    share = mask.mean(axis=0)
    assert found.accuracy @ share == pytest.approx(correct.mean(), abs=1e-15)
    assert found.error_ratio @ share == pytest.approx(1)


def test_without_errors_there_is_no_ratio():
    assert np.isnan(by_factor(np.ones((3, 1), bool), np.ones(3)).error_ratio).all()


def test_shape_bias_by_hand():
    shape, texture = np.array([0, 1, 2, 3, 3]), np.array([1, 2, 0, 0, 3])
    found = cues(np.array([0, 1, 0, 2, 3]), shape, texture)  # shape, shape, texture, neither; the last has no conflict
    assert found.shape_bias == pytest.approx(2 / 3)
    assert found.accuracy == 0.75
    assert np.isnan(cues(np.array([9]), shape[:1], texture[:1]).shape_bias)


def test_groups_are_averaged_and_not_summed():
    prob = np.array([[0.3, 0.3, 0.35, 0.05]])
    assert coarse(prob, np.array([0, 0, 1, -1]), 2) == pytest.approx(np.array([[0.3, 0.35]]))


FRAME = pl.DataFrame(
    {
        "meta.size": ["small", "large", None, "small"],
        "blurred": [True, None, False, True],
        "turn": [0, 90, 0, 0],
        "meta.tags": [["a", "b"], [], None, ["b"]],
        "odd": ["x y", "x_y", "x", "x"],
    }
)


def test_masks_of_columns_of_every_kind():
    masks = factor_masks(FRAME, FRAME, ["meta.size", "blurred", "turn", "meta.tags"])
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "size.large": [False, True, False, False],
        "size.small": [True, False, False, True],
        "blurred": [True, False, False, True],
        "turn.0": [True, False, True, True],
        "turn.90": [False, True, False, False],
        "tags.a": [True, False, False, False],
        "tags.b": [True, False, False, True],
    }


def test_levels_are_those_of_all_pairs():
    masks = factor_masks(FRAME, FRAME[[0, 3]], ["turn"])
    assert not masks["turn.90"].any()


def test_columns_without_factors_are_refused():
    with pytest.raises(DataError, match=r"no column 'meta\.sise'"):
        factor_masks(FRAME, FRAME, ["meta.sise"])
    with pytest.raises(DataError, match="one name"):
        factor_masks(FRAME, FRAME, ["odd"])
    many = pl.DataFrame({"x": list(range(200))})
    with pytest.raises(DataError, match="no visual factors"):
        factor_masks(many, many, ["x"])


def test_classes_by_name_and_by_group():
    names = ["cat", "dog", "owl"]
    assert class_numbers(pl.DataFrame({"c": ["owl", "cat"]}), "c", names).tolist() == [2, 0]
    with pytest.raises(DataError, match="names no class"):
        class_numbers(pl.DataFrame({"c": ["owl", "hen"]}), "c", names)
    assert group_numbers({"bird": ("owl",), "pet": ("cat",)}, names).tolist() == [1, -1, 0]
    for groups in ({"bird": ("hen",)}, {"bird": ("owl",), "night": ("owl",)}, {"bird": ()}):
        with pytest.raises(DataError):
            group_numbers(groups, names)
