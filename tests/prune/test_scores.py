from __future__ import annotations

from functools import reduce

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.prune.scores import Cut, figures, folds, threshold_of, verdict


def score_of(batch: pl.DataFrame) -> np.ndarray:
    return batch["s"].to_numpy().astype(np.float64)


def find(cut: Cut, batches: list[pl.DataFrame]):
    state = None
    for fold in folds(cut, score_of, -1.0, 1.0):
        state = fold.finish(reduce(fold.merge, [fold.map(batch, state) for batch in batches]), state)
    return state


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.5, 1.0])
def test_the_share_is_exact_for_distinct_scores(keep: float, cut) -> None:
    values = np.random.default_rng(0).uniform(-0.1, 0.4, 3000).astype(np.float32)
    table = pl.DataFrame({"key": [f"p{row}" for row in range(3000)], "s": values})
    state = find(Cut(keep=keep), [table])
    kept = values[values >= state.low]
    assert len(kept) == round(keep * 3000)
    assert set(kept) == set(np.sort(values)[::-1][: len(kept)])
    assert find(Cut(keep=keep), cut(table, [1, 2000], 3)) == state


def test_ties_stay_together_and_ends_count() -> None:
    table = pl.DataFrame({"s": [1.0] * 3 + [0.5] * 5 + [-1.0] * 2})
    assert (table["s"].to_numpy() >= threshold_of(Cut(keep=0.5), find(Cut(keep=0.5), [table]))).sum() == 8
    assert threshold_of(Cut(keep=1.0), find(Cut(keep=1.0), [table])) <= -1.0


def test_pairs_without_a_score_leave_and_do_not_count() -> None:
    table = pl.DataFrame({"key": list("abcd"), "s": [0.9, np.nan, 0.2, 0.5]})
    state = find(Cut(keep=0.34), [table])
    assert (state.scored, figures(Cut(keep=0.34), state)["scored"]) == (3, 3)
    found = verdict(table, score_of(table), state.low, "low", "none", "meta.s")
    assert found.kept["key"].to_list() == ["a"]
    assert found.kept["meta.s"].to_list() == pytest.approx([0.9])
    assert dict(zip(found.rejected["key"], found.rejected["reason"], strict=True)) == {"b": "none", "c": "low", "d": "low"}
    assert found.rejected["score"].to_list() == [None, pytest.approx(0.2), 0.5]
    with pytest.raises(DataError, match="No pair has a score"):
        find(Cut(keep=0.5), [table.filter(pl.col("key") == "b")])


def test_one_of_threshold_and_share() -> None:
    assert threshold_of(Cut(threshold=0.3), None) == 0.3
    for wrong in ({}, {"threshold": 0.3, "keep": 0.5}, {"keep": 0}):
        with pytest.raises(ConfigError):
            Cut.parse(wrong)
