from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError
from diptych.train.order import BatchOrder, MixedOrder, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 97, 1000, 1024, 65_537])
def test_permute_is_a_permutation(size: int) -> None:
    image = permute(np.arange(size), size, 7, 0)
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


def test_permute_needs_only_the_indices_asked_for() -> None:
    size = 10**9
    some = np.array([0, 1, size // 2, size - 1])
    image = permute(some, size, 3, 1)
    assert image.min() >= 0
    assert image.max() < size
    assert len(set(image.tolist())) == 4
    np.testing.assert_array_equal(permute(some[2:], size, 3, 1), image[2:])


def test_permute_spreads_evenly() -> None:
    """Every image of a position is equally likely over the keys, and so is every order of three (chi-square, 99.9 %)."""
    draws = 3000
    at_zero = Counter(int(permute(np.array([0]), 6, seed, 0)[0]) for seed in range(draws))
    orders = Counter(tuple(permute(np.arange(3), 3, seed, 0).tolist()) for seed in range(draws))
    for counts in (at_zero, orders):
        assert len(counts) == 6
        chi_square = sum((count - draws / 6) ** 2 / (draws / 6) for count in counts.values())
        assert chi_square < 20.5


def test_neighbours_and_epochs_are_not_correlated() -> None:
    size = 4096
    first, second = (permute(np.arange(size), size, 5, epoch).astype(float) for epoch in (0, 1))
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.06
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_an_epoch_sees_every_row_at_most_once_and_drops_others_each_time() -> None:
    order = BatchOrder(rows=103, batch_size=10, seed=1)
    assert order.steps_per_epoch == 10
    dropped = []
    for epoch in range(3):
        seen = np.concatenate([order.batch(epoch * 10 + step) for step in range(10)])
        assert len(set(seen.tolist())) == 100
        dropped.append(frozenset(range(103)) - set(seen.tolist()))
    assert len(set(dropped)) == 3


@pytest.mark.parametrize("avoid", [None, pl.Series("label", [row % 20 for row in range(120)])])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_global_batch(world: int, avoid: pl.Series | None) -> None:
    order = BatchOrder(120, 12, seed=4, avoid=avoid)
    for step in (0, 5, 23):
        parts = [BatchOrder(120, 12, seed=4, avoid=avoid).batch(step, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), order.batch(step))


def test_seed_and_epoch_change_the_order() -> None:
    batches = [BatchOrder(100, 100, seed).batch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(batch) for batch in batches}) == 4


def test_avoid_keeps_equal_values_apart() -> None:
    rng = np.random.default_rng(0)
    label = pl.Series("label", rng.permutation(np.repeat(np.arange(40), rng.integers(1, 9, 40))))
    order = BatchOrder(len(label), 16, seed=2, avoid=label)
    for epoch in range(4):
        seen: list[int] = []
        for step in range(order.steps_per_epoch):
            rows = order.batch(epoch * order.steps_per_epoch + step)
            assert label.gather(rows).n_unique() == 16
            seen += rows.tolist()
        assert len(set(seen)) == len(seen) == order.steps_per_epoch * 16
    assert set(order.batch(0).tolist()) != set(order.batch(order.steps_per_epoch).tolist())


def test_avoid_mixes_the_batches_anew_in_every_epoch() -> None:
    label = pl.Series("label", [f"thing {row // 2}" for row in range(200)])
    order = BatchOrder(200, 20, seed=0, avoid=label)
    mates: Counter[frozenset[int]] = Counter()
    for step in range(40 * order.steps_per_epoch):
        rows = order.batch(step).tolist()
        mates.update(frozenset((rows[0], other)) for other in rows[1:])
    assert mates.most_common(1)[0][1] <= 8


def test_avoid_does_not_bring_the_same_values_in_neighbouring_batches() -> None:
    label = pl.Series("label", [row // 2 for row in range(200)])
    order = BatchOrder(200, 20, seed=0, avoid=label)
    shared = []
    for epoch in range(10):
        batches = [set(label.gather(order.batch(10 * epoch + step)).to_list()) for step in range(10)]
        shared += [len(a & b) / 20 for a, b in itertools.pairwise(batches)]
    assert np.mean(shared) < 0.25  # chance: 1/9


def test_nulls_are_equal_to_nothing() -> None:
    label = pl.Series("label", [None] * 30 + ["a"] * 3, dtype=pl.String)
    order = BatchOrder(33, 11, seed=0, avoid=label)
    assert all((order.batch(step) >= 30).sum() == 1 for step in range(3))


def test_a_value_that_must_repeat_is_refused_with_the_largest_batch() -> None:
    label = pl.Series("label", ["a"] * 9 + [f"b{i}" for i in range(31)])
    with pytest.raises(ConfigError, match="batch_size at most 4") as error:
        BatchOrder(40, 8, seed=0, avoid=label)
    assert "'a' in 9 of 40" in str(error.value)
    BatchOrder(40, 4, seed=0, avoid=label)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="smaller than one batch"):
        BatchOrder(31, 32, seed=0)


def test_a_mixed_batch_has_both_kinds_in_their_shares_and_each_goes_round() -> None:
    marked = np.arange(50) % 10 == 3  # five of them
    order = MixedOrder(marked, 8, 0.25, seed=4)
    assert order.steps_per_epoch == 45 // 6
    assert [order.epoch(step) for step in (0, 6, 7)] == [0, 0, 1]
    for step in range(14):
        rows = order.batch(step)
        assert marked[rows].tolist() == [True] * 2 + [False] * 6
    for start in range(0, 14, 2):  # an epoch of the five is two batches of two
        assert len({row for step in (start, start + 1) for row in order.batch(step)[:2]}) == 4
    others = [row for step in range(7) for row in order.batch(step)[2:]]
    assert len(set(others)) == 42
    assert {row for step in range(40) for row in order.batch(step)[:2]} == set(np.flatnonzero(marked))


def test_ranks_share_both_kinds_of_a_mixed_batch() -> None:
    order = MixedOrder(np.arange(50) < 20, 8, 0.5, seed=4)
    parts = [order.batch(3, rank, 2) for rank in (0, 1)]
    assert [part.tolist() for part in parts] == [
        np.concatenate([order.batch(3)[i : i + 2], order.batch(3)[4 + i : 6 + i]]).tolist() for i in (0, 2)
    ]
    with pytest.raises(ConfigError, match="multiple of 3"):
        order.batch(0, 0, 3)


def test_a_marked_row_has_a_new_name_in_each_of_its_epochs() -> None:
    order = MixedOrder(np.arange(50) < 4, 8, 0.5, seed=4)
    names = {}
    for step in range(5):
        rows = order.batch(step)
        for row, name in zip(rows, order.visit_keys(rows.astype(np.uint64), step), strict=True):
            names.setdefault(int(row), []).append(int(name))
    assert all(len(set(names[row])) == 5 for row in range(4))
    assert all(names[row] == [row] * len(names[row]) for row in names if row >= 4)


@pytest.mark.parametrize(("marked", "share"), [(3, 0.5), (48, 0.5), (20, 0.01)])
def test_a_mix_that_cannot_be_is_refused(marked: int, share: float) -> None:
    with pytest.raises(ConfigError, match="cannot have that many"):
        MixedOrder(np.arange(50) < marked, 8, share, seed=0)
