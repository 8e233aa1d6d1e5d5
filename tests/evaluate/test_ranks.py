from __future__ import annotations

import numpy as np
import pytest

from diptych.evaluate import ranks
from diptych.evaluate.ranks import chunks, target_rank


def test_rank_is_the_place_in_the_stable_order():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 5, (200, 12)).astype(np.float32)  # many ties
    target = rng.integers(0, 12, 200)
    order = rng.permutation(12)
    for order_M in (None, order):
        tie = np.arange(12) if order_M is None else order_M
        expected = [list(np.lexsort((tie, -line))).index(own) for line, own in zip(score, target, strict=True)]
        assert target_rank(score, target, order_M).tolist() == expected


def test_constant_scores_are_at_chance():
    score, target = np.zeros((10, 10)), np.arange(10)
    assert target_rank(score, target).tolist() == list(range(10))


def test_a_score_that_is_not_a_number_comes_last():
    assert target_rank(np.array([[np.nan, 1.0, 2.0], [3.0, np.nan, 0.0]]), np.array([0, 0])).tolist() == [2, 0]


@pytest.mark.parametrize(("rows", "width"), [(10, 3), (1, 100), (7, 1)])
def test_chunks_cover_every_row_once(monkeypatch, rows, width):
    monkeypatch.setattr(ranks, "CHUNK", 7)
    cuts = chunks(rows, width)
    assert [row for cut in cuts for row in range(rows)[cut]] == list(range(rows))
    assert all(cut.stop - cut.start == 1 or (cut.stop - cut.start) * width <= 7 for cut in cuts)
