from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import intervals
from diptych.evaluate.intervals import difference, holm, interval, mcnemar, mean_over_seeds, paired, quantile_interval

RNG = np.random.default_rng(7)


def plain_bootstrap(values, resamples, weights=None):
    """The definition, row by row, from draws of its own."""
    rng = np.random.default_rng(1)
    weights = np.ones(len(values)) if weights is None else weights
    summands = values * weights
    draws = (rng.integers(0, len(values), len(values)) for _ in range(resamples))
    return np.array([summands[index].sum() / weights[index].sum() for index in draws])


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ((RNG.random(400) < 0.3).astype(float), None),
        (RNG.standard_normal(60), None),
        (RNG.choice([1.0, 0.5, 1 / 3], 500), None),
        ((RNG.random(300) < 0.6).astype(float), RNG.choice([0.5, 2.0], 300)),
        ((RNG.random(30) < 0.6).astype(float), RNG.random(30) + 0.1),
        (RNG.standard_normal(4200), None),
        (np.concatenate([RNG.exponential(1e-3, 4190), RNG.exponential(1.0, 10)]), None),
    ],
    ids=["binary-cells", "rows", "few-values", "weighted-cells", "weighted-rows", "strata", "strata-heavy-tail"],
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


def test_strata_hold_every_example_and_their_mean_and_variance():
    values = np.concatenate([RNG.exponential(1.0, 6000), [1e4, -1e4]])
    mean, variance, count = intervals._strata(values)
    assert count.sum() == len(values)
    assert len(count) <= intervals.STRATA + 2 * intervals.OUTERMOST
    assert np.average(mean, weights=count) == pytest.approx(values.mean())
    assert np.average(variance + mean**2, weights=count) - values.mean() ** 2 == pytest.approx(values.var())
    assert (mean[0], mean[-1], variance[0], variance[-1]) == (-1e4, 1e4, 0, 0), "the outermost are strata of their own"


def test_strata_of_values_that_differ_at_the_ends_alone():
    mean, variance, count = intervals._strata(np.concatenate([np.full(5000, 0.25), np.arange(32)]))
    assert np.average(mean, weights=count) == pytest.approx((1250 + 496) / 5032)
    assert not variance[count > 1].any()


def test_strata_keep_the_skewness_of_the_bootstrap():
    values = RNG.exponential(1.0, 4200) ** 3
    ours = intervals.bootstrap_means(values, 0, 40_000)
    expected = stats.skew(values) / math.sqrt(len(values))
    assert stats.skew(ours) == pytest.approx(expected, abs=5 * math.sqrt(6 / 40_000))


def test_interval_does_not_depend_on_the_chunks_of_strata(monkeypatch):
    values = RNG.random(5000)
    whole = interval(values, 0)
    monkeypatch.setattr(intervals, "CHUNK", 10_000)
    assert interval(values, 0) == whole


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
    low, high = quantile_interval(values)
    expected = np.quantile(medians, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected, rel=0.05)
    assert quantile_interval([3.0]) == (3.0, 3.0)
    assert quantile_interval(np.arange(1, 11)) == (2.0, 9.0)  # the textbook's ranks of the sign test's interval


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
    assert (result.higher, result.equal, result.lower) == (12, 33, 5)
    assert mcnemar([1, 0], [1, 0]) == 1.0


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (4, 9), (0, 60), (2600, 2411)])
def test_mcnemars_test_is_the_exact_binomial_test(gained, lost):
    a, b = [0] * gained + [1] * lost + [1, 0], [1] * gained + [0] * lost + [1, 0]
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


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
