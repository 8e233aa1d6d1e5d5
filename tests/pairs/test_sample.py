from __future__ import annotations

from functools import reduce

import numpy as np
import polars as pl
import pytest

from diptych.core.points import Fold
from diptych.pairs.sample import Bar, BarFold, Draw, Drawn, DrawnFold, in_order

ROWS, LIMIT = 300, 40


def pool(rows: int = ROWS) -> pl.DataFrame:
    return pl.DataFrame({"key": [f"k{row}" for row in range(rows)], "value": np.arange(rows, dtype=np.float32)})


def values(batch: pl.DataFrame) -> np.ndarray:
    return batch["value"].to_numpy().reshape(-1, 1)


def folds(seed: int = 0, limit: int = LIMIT) -> tuple[BarFold, DrawnFold]:
    draw = Draw(limit, "test", seed)
    return BarFold(draw), DrawnFold(draw, values, lambda feature_SD, bar: (bar.rows, feature_SD.ravel().tolist()))


def run(fold: Fold, batches: list[pl.DataFrame], state: object = None) -> object:
    return fold.finish(reduce(fold.merge, [fold.map(batch, state) for batch in batches]), state)


def sampled(batches: list[pl.DataFrame], seed: int = 0, limit: int = LIMIT) -> tuple[int, list[float]]:
    first, second = folds(seed, limit)
    found = run(second, batches, run(first, batches))
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("sizes", [[100, 200], [1, 0, 299], [30] * 10, [299, 1]])
def test_the_sample_is_the_same_however_the_pool_is_cut_and_shuffled(sizes: list[int]) -> None:
    shuffled = pool().sample(fraction=1, shuffle=True, seed=3)
    starts = np.cumsum([0, *sizes[:-1]])
    assert sampled([shuffled.slice(start, size) for start, size in zip(starts, sizes, strict=True)]) == sampled([pool()])


def test_it_is_the_smallest_ranks_in_their_order() -> None:
    rows, drawn = sampled([pool()])
    rank_N = Draw(LIMIT, "test", 0).ranks(pool())
    assert (rows, drawn) == (ROWS, np.argsort(rank_N)[:LIMIT].astype(float).tolist())


def test_a_small_pool_is_drawn_whole_and_an_empty_one_not_at_all() -> None:
    rows, drawn = sampled([pool(7)])
    assert (rows, sorted(drawn)) == (7, [0, 1, 2, 3, 4, 5, 6])
    assert sampled([pool(0)]) == (0, [])


def test_seed_and_name_draw_other_pairs() -> None:
    assert len(set(sampled([pool()], 0)[1]) & set(sampled([pool()], 1)[1])) < LIMIT / 2
    rank_N, other_N = (Draw(LIMIT, name, 0).ranks(pool()) for name in ("test", "other"))
    assert not np.array_equal(rank_N, other_N)


def test_merging_is_associative() -> None:
    first, second = folds()
    a, b, c = (pool().slice(start, 100) for start in (0, 100, 200))
    ranks = [first.map(batch, None) for batch in (a, b, c)]
    left, right = first.merge(first.merge(ranks[0], ranks[1]), ranks[2]), first.merge(ranks[0], first.merge(ranks[1], ranks[2]))
    assert first.finish(left, None) == first.finish(right, None)
    parts = [second.map(batch, first.finish(left, None)) for batch in (a, b, c)]
    assert second.merge(second.merge(parts[0], parts[1]), parts[2]) == second.merge(parts[0], second.merge(parts[1], parts[2]))


def test_only_what_is_drawn_travels() -> None:
    first, second = folds(limit=5)
    bar = first.finish(first.map(pool(), None), None)
    assert isinstance(bar, Bar)
    (drawn,) = second.map(pool(), bar)
    assert drawn.feature_SD.shape == (5, 1)
    assert first.map(pool(), None).nbytes == 8 * 6


def test_parts_are_put_in_the_order_of_their_ranks() -> None:
    parts = [Drawn(np.array(ranks, dtype=np.uint64), np.array(ranks, dtype=np.float32)[:, None]) for ranks in ([9, 2], [5], [1, 7])]
    assert in_order(parts).ravel().tolist() == [1, 2, 5, 7, 9]
