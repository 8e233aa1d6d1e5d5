from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from diptych.adapt import cache as module
from diptych.adapt.cache import Cache, Grid, correct, first_best, labelled
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_keys_are_means_over_views_normalised_once_and_ordered_by_class() -> None:
    views_ND = unit(noise(5, 8))
    examples = Examples(views_ND, np.array([2, 0, 2, 0, 2]), picture_N=np.array([7, 3, 7, 3, 1]), caption_ND=unit(noise(5, 8, seed=1)))
    found = Cache.of(examples, 4)
    assert found.label_M.tolist() == [0, 2, 2]
    means = [views_ND[[1, 3]].mean(axis=0), views_ND[4], views_ND[[0, 2]].mean(axis=0)]
    np.testing.assert_allclose(found.key_MD, unit(np.stack(means)), atol=1e-6)
    assert found.caption_MD is not None
    np.testing.assert_allclose(found.caption_MD[2], unit(examples.caption_ND[[0, 2]].mean(axis=0)), atol=1e-6)


def test_the_order_of_the_rows_does_not_change_the_keys() -> None:
    views_ND, label_N, picture_N = unit(noise(12, 8)), np.repeat([1, 0, 2], 4), np.repeat(np.arange(6), 2)
    order = np.random.default_rng(3).permutation(12)
    straight = Cache.of(Examples(views_ND, label_N, picture_N), 3)
    shuffled = Cache.of(Examples(views_ND[order], label_N[order], picture_N[order]), 3)
    np.testing.assert_allclose(straight.key_MD, shuffled.key_MD, atol=1e-15)
    np.testing.assert_array_equal(straight.label_M, shuffled.label_M)


def test_views_of_one_picture_must_agree() -> None:
    with pytest.raises(DataError, match="disagree"):
        Cache.of(Examples(unit(noise(2, 4)), np.array([0, 1]), np.array([5, 5])), 2)
    opposite = unit(noise(1, 4))
    with pytest.raises(DataError, match="cancel out"):
        Cache.of(Examples(np.concatenate([opposite, -opposite]), np.array([0, 0]), np.array([5, 5])), 2)


@pytest.mark.parametrize("betas", [np.arange(40) * 0.245 + 1, np.array([1.0, 5.5, 20.0, 20.5, 50.0]), np.array([3.0])])
def test_cache_logits_of_all_betas_are_the_formula(betas: np.ndarray) -> None:
    label_M = np.array([0, 0, 3, 3, 3, 4])  # classes 1 and 2 have no keys
    keys = Cache(unit(noise(6, 8)).astype(np.float64), label_M, 5)
    affinity_MB = keys.key_MD @ unit(noise(9, 8, seed=1)).T.astype(np.float64)
    found = list(keys.logits(affinity_MB, betas))
    assert len(found) == len(betas)
    for beta, cache_CB in zip(betas, found, strict=True):
        np.testing.assert_allclose(cache_CB, (np.exp(-beta * (1 - affinity_MB.T)) @ np.eye(5)[label_M]).T, rtol=1e-13, atol=0)
        assert not cache_CB[[1, 2]].any()


def test_correct_breaks_ties_like_argmax() -> None:
    base_CB = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 2.0]])
    step_GCB = np.stack([np.zeros((3, 3)), np.tile([[0.0], [0.0], [5.0]], 3)])
    for label_B in ([0, 0, 1], [1, 1, 2], [2, 2, 2]):
        expected = [((base_CB + step).argmax(axis=0) == label_B).sum() for step in step_GCB]
        assert correct(base_CB, step_GCB, np.array(label_B)).tolist() == expected


def test_first_best_keeps_the_first_and_wants_a_hit() -> None:
    assert first_best(np.array([[1, 3], [3, 2]])) == (0, 1)
    assert first_best(np.zeros((2, 2), dtype=np.int64)) is None


def test_a_grid_leaves_its_end_out() -> None:
    assert Grid(start=1.0, stop=50.0, steps=200).values().tolist() == [i * (50 - 1) / 200 + 1 for i in range(200)]
    assert Grid(start=0.1, stop=7.0, steps=200).values().tolist() == [i * (7 - 0.1) / 200 + 0.1 for i in range(200)]


def test_tiles_cover_all_rows_once_and_stay_small() -> None:
    keys = Cache(np.zeros((1000, 4)), np.zeros(1000, dtype=np.int64), 10)
    tiles = list(keys.tiles(5000, 20))
    assert np.concatenate([np.arange(5000)[tile] for tile in tiles]).tolist() == list(range(5000))
    assert max(tile.stop - tile.start for tile in tiles) * 1000 <= module.TILE_ELEMENTS


def good(**changes: object) -> Examples:
    fields = {"feature_ND": unit(noise(4, 8)), "label_N": np.array([0, 1, 2, 1]), **changes}
    return Examples(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("examples", "word"),
    [
        (lambda: None, "nothing to learn from"),
        (lambda: good(feature_ND=np.zeros((0, 8), np.float32), label_N=np.zeros(0, np.int64)), "nothing to learn from"),
        (lambda: good(feature_ND=unit(noise(4, 7))), "do not match"),
        (lambda: good(feature_ND=np.full((4, 8), np.nan, np.float32)), "not numbers"),
        (lambda: good(label_N=None), "do not match"),
        (lambda: good(label_N=np.array([0, 1, 2])), "do not match"),
        (lambda: good(label_N=np.array([0, 1, 3, 1])), "no class"),
        (lambda: good(label_N=np.array([0, 1, -1, 1])), "no class"),
        (lambda: good(picture_N=np.array([0, 1])), "Picture numbers"),
        (good, "needs captions"),
        (lambda: good(caption_ND=unit(noise(3, 8))), "Captions do not match"),
    ],
)
def test_examples_that_will_not_do_are_refused(examples: Callable[[], Examples | None], word: str) -> None:
    with pytest.raises(DataError, match=word) as caught:
        labelled(Support(unit(noise(3, 8)), 100.0, examples()), "caps-adapter", captions=True)
    assert caught.value.problems[0].where.startswith("caps-adapter: labelled")
