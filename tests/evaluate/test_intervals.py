from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.evaluate import intervals
from diptych.evaluate.intervals import compare, difference, holm, interval, mcnemar, mean_over_seeds, median_interval, paired

RNG = np.random.default_rng(7)


def plain_bootstrap(values, resamples, weights=None):
    """The definition, row by row, from draws of its own."""
    rng = np.random.default_rng(1)
    weights = np.ones(len(values)) if weights is None else weights
    index = rng.integers(0, len(values), (resamples, len(values)))
    return (values[index] * weights[index]).sum(1) / weights[index].sum(1)


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ((RNG.random(400) < 0.3).astype(float), None),
        (RNG.standard_normal(60), None),
        (RNG.choice([1.0, 0.5, 1 / 3], 500), None),
        ((RNG.random(300) < 0.6).astype(float), RNG.choice([0.5, 2.0], 300)),
        ((RNG.random(30) < 0.6).astype(float), RNG.random(30) + 0.1),
    ],
    ids=["binary-cells", "rows", "few-values", "weighted-cells", "weighted-rows"],
)
def test_cells_and_rows_draw_from_the_bootstrap_distribution(values, weights):
    ours = intervals.bootstrap_means(values, 0, 20_000, weights)
    theirs = plain_bootstrap(values, 20_000, weights)
    assert len(ours) == 20_000
    spread = theirs.std()
    assert abs(ours.mean() - theirs.mean()) < 0.05 * spread
    assert ours.std() == pytest.approx(spread, rel=0.03)
    assert np.quantile(ours, [0.025, 0.975]) == pytest.approx(np.quantile(theirs, [0.025, 0.975]), abs=0.1 * spread)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        low, high = interval((rng.random(200) < 0.4).astype(float), seed=trial, level=0.9, resamples=1000)
        covered += low <= 0.4 <= high
    assert 0.85 < covered / 400 < 0.945


def test_interval_is_named_by_its_seed():
    values = RNG.random(50)
    assert interval(values, 4) == interval(values, 4)
    assert interval(values, 4) != interval(values, 5)
    assert interval(values, 4, level=0.99)[0] < interval(values, 4, level=0.5)[0]


def test_interval_does_not_depend_on_the_chunks(monkeypatch):
    hits, values = (RNG.random(300) < 0.5).astype(float), RNG.random(40)
    whole = interval(hits, 0), interval(values, 0)
    monkeypatch.setattr(intervals, "CHUNK", 1000)
    assert (interval(hits, 0), interval(values, 0)) == whole


def test_weighted_interval_stays_within_the_range_of_the_values():
    weights = np.where(np.arange(40) < 4, 5.0, 0.5)
    assert interval(np.ones(40), 0, weights=weights) == (1.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0, 2.0]], [np.inf]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(DataError, match="no mean"):
        interval(values, 0)


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0.0}, {"resamples": 10}])
def test_senseless_bootstraps_are_refused(options):
    with pytest.raises(ConfigError):
        interval([0.0, 1.0], 0, **options)


def test_median_interval_agrees_with_the_bootstrap_of_the_median():
    values = RNG.exponential(10, 301)
    medians = np.median(values[np.random.default_rng(0).integers(0, 301, (5000, 301))], axis=1)
    low, high = median_interval(values)
    expected = np.quantile(medians, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected, rel=0.05)
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval(np.arange(1, 11)) == (2.0, 9.0)  # the textbook's ranks of the sign test's interval


def test_paired_joins_by_key_and_not_by_order():
    keys = [f"k{i}" for i in range(50)]
    a, b = RNG.random(50), RNG.random(50)
    straight = paired(a, b, keys, keys, seed=0)
    shuffle = RNG.permutation(50)
    assert paired(a, b[shuffle], keys, [keys[i] for i in shuffle], seed=0) == straight
    assert straight.difference == pytest.approx(float(np.mean(b - a)))
    assert straight.low < straight.difference < straight.high


def test_paired_is_sharper_than_two_intervals():
    a = RNG.random(200)
    b = a + 0.01 + 0.02 * RNG.standard_normal(200)
    result = paired(a, b, list(map(str, range(200))), list(map(str, range(200))), seed=0)
    assert result.low > 0
    assert interval(b, 0)[0] < interval(a, 0)[1]
    assert result.p_value == result.p_bootstrap == 1 / 2001
    assert result.test == "bootstrap"
    assert result.effect == pytest.approx(np.mean(b - a) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))


def test_paired_of_equal_values_is_no_difference():
    hits = [1.0, 0.0, 1.0]
    result = paired(hits, hits, "abc", "abc", seed=0)
    assert (result.difference, result.low, result.high, result.p_value, result.p_bootstrap, result.effect) == (0, 0, 0, 1, 1, 0)


def test_bootstrap_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(11)
    keys = list(map(str, range(80)))
    p_values = [paired(rng.random(80), rng.random(80), keys, keys, seed=i, resamples=500).p_value for i in range(300)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_hits_are_compared_by_mcnemars_test():
    a = np.array([1] * 30 + [0] * 12 + [1] * 5 + [0] * 3, float)
    b = np.array([1] * 30 + [1] * 12 + [0] * 5 + [0] * 3, float)
    keys = list(map(str, range(50)))
    result = paired(a, b, keys, keys, seed=0)
    assert result.test == "mcnemar"
    assert result.p_value == pytest.approx(2 * sum(math.comb(17, k) for k in range(6)) / 2**17)
    assert result.effect == pytest.approx(2 * math.asin(math.sqrt(0.84)) - 2 * math.asin(math.sqrt(0.70)))
    assert result.p_bootstrap == pytest.approx(result.p_value, abs=0.12)
    assert mcnemar([1, 0], [1, 0]) == 1.0


@pytest.mark.parametrize(
    ("keys_a", "keys_b"),
    [(["a", "b"], ["a", "c"]), (["a", "a"], ["a", "b"]), (["a", "b"], ["b", "b"]), (["a"], ["a", "b"])],
)
def test_paired_refuses_other_examples(keys_a, keys_b):
    with pytest.raises(DataError):
        paired([0.0, 1.0], [1.0, 1.0], keys_a, keys_b, seed=0)


def test_holm_against_its_definition():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def row(values, *, task="zero-shot", settings=None, keys=None):
    values = np.asarray(values, np.float32)
    keys = keys or [str(i) for i in range(len(values))]
    return Metric("s", task, "acc1", float(values.mean()), len(values), 0, 1, settings or {}, keys, values)


def test_compare_corrects_over_all_rows_and_skips_medians():
    better, worse = np.ones(40), np.arange(40) % 2
    median = Metric("s", "retrieval", "median_rank", 3, 40, 1, 5)
    found = compare([row(worse), row(worse, task="x"), median], [row(better), row(worse, task="x"), median], seed=0)
    assert [entry.key for entry in found] == ["s/zero-shot/acc1", "s/x/acc1"]
    assert found[0].p_holm == pytest.approx(2 * found[0].test.p_value)
    assert (found[0].a, found[0].b, found[1].p_holm) == (0.5, 1.0, 1.0)


def test_compare_refuses_unequal_settings_and_lonely_rows():
    with pytest.raises(DataError, match="templates") as caught:
        compare([row([1], settings={"templates": "x", "n": 1})], [row([1], settings={"templates": "y", "n": 1})], seed=0)
    assert "'n'" not in str(caught.value)
    with pytest.raises(DataError, match="classes"):
        compare([row([1], settings={"classes": 3})], [row([1])], seed=0)
    with pytest.raises(DataError, match="s/x/acc1"):
        compare([row([1]), row([1], task="x")], [row([1])], seed=0)


def test_mean_over_seeds_is_students_interval():
    values = [0.61, 0.66, 0.58, 0.63]
    estimate = mean_over_seeds(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((np.mean(values), low, high))
    with pytest.raises(DataError, match="One run"):
        mean_over_seeds([0.5])


def test_difference_is_paired_where_the_seeds_are_the_same():
    a, b = {0: 0.5, 1: 0.6, 2: 0.4}, {2: 0.45, 0: 0.56, 1: 0.64}
    expected = stats.ttest_rel([b[s] for s in range(3)], [a[s] for s in range(3)])
    ours = difference(a, b)
    assert (ours.mean, ours.p_value, ours.degrees) == pytest.approx((0.05, expected.pvalue, 2))
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_difference_is_welchs_where_they_are_not():
    a, b = {0: 0.5, 1: 0.6, 2: 0.4}, {5: 0.7, 6: 0.72, 7: 0.69, 8: 0.71}
    expected = stats.ttest_ind(list(b.values()), list(a.values()), equal_var=False)
    ours = difference(a, b)
    assert (ours.p_value, ours.degrees) == pytest.approx((expected.pvalue, expected.df))
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_runs_without_spread():
    assert difference({0: 0.5, 1: 0.5}, {0: 0.75, 1: 0.75}).p_value == 0
    same = difference({0: 0.5, 1: 0.5}, {2: 0.5, 3: 0.5})
    assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1)
