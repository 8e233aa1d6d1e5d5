from __future__ import annotations

import math

import pytest

from diptych.core.errors import DataError
from diptych.evaluate.overlap import Counts, contamination, count, report


def binomial_tail(k, n, p, direction):
    picked = range(k, n + 1) if direction == "at least" else range(k + 1)
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in picked)


def test_statistics_against_their_definitions():
    found = contamination(Counts(100, 50, 10, 8))
    assert found.contamination == pytest.approx(10 / 110)
    assert found.all_minus_clean == pytest.approx(58 / 110 - 0.5)
    assert found.p_value == pytest.approx(binomial_tail(8, 10, 0.5, "at least"))
    # Clopper-Pearson: at the bounds either tail has half of what the interval leaves out.
    assert binomial_tail(8, 10, found.low, "at least") == pytest.approx(0.0025, rel=1e-6)
    assert binomial_tail(8, 10, found.high, "at most") == pytest.approx(0.0025, rel=1e-6)


def test_edges_of_the_interval():
    assert contamination(Counts(10, 5, 4, 4)).high == 1.0
    assert contamination(Counts(10, 5, 4, 0)).low == 0.0
    assert contamination(Counts(10, 0, 4, 0)).p_value == 1.0


def test_a_set_without_overlap_shows_nothing():
    found = contamination(Counts(10, 5, 0, 0))
    assert (found.p_value, found.low, found.high, found.all_minus_clean, found.contamination) == (1.0, 0.0, 1.0, 0.0, 0.0)


def test_report_corrects_over_the_sets_that_overlap():
    sets = {"a": Counts(100, 50, 10, 8), "b": Counts(100, 50, 10, 9), "c": Counts(100, 50, 0, 0)}
    found = report(sets)
    assert found["a"].p_bonferroni == pytest.approx(2 * found["a"].p_value)
    assert found["c"].p_bonferroni == 1.0
    assert report({"a": Counts(10, 5, 4, 1)})["a"].p_bonferroni <= 1.0


def test_counts_come_from_hits_and_flags():
    assert count([1, 0, 1, 1], [False, False, True, True]) == Counts(2, 1, 2, 2)
    with pytest.raises(DataError):
        count([1, 0], [True])


@pytest.mark.parametrize("counts", [Counts(0, 0, 5, 5), Counts(5, 6, 1, 1), Counts(5, 1, 1, 2), Counts(5, -1, 1, 1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(DataError):
        contamination(counts)
