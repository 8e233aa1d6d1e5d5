from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.special import softmax as scipy_softmax

from diptych.core.errors import DataError
from diptych.evaluate.calibration import (
    brier,
    equal_mass,
    equal_width,
    expected_error,
    fit_temperature,
    gap_intervals,
    maximum_error,
    softmax,
    temperature_interval,
)


def judged(n, temperature=1.0, seed=0, classes=5):
    """Logits of a judge who is right as often as he says at temperature 1, multiplied by `temperature`."""
    rng = np.random.default_rng(seed)
    logit = 2 * rng.standard_normal((n, classes))
    label = np.array([rng.choice(classes, p=p) for p in scipy_softmax(logit, axis=1)])
    return logit * temperature, label


def test_edges_belong_to_the_bin_below():
    assert equal_width(np.arange(16) / 15).tolist() == [0, *range(15)]
    assert equal_width(np.array([0.2, 0.4, 0.6, 0.8, 1.0]), 5).tolist() == [0, 1, 2, 3, 4]
    assert equal_width(np.nextafter([0.2, 0.4, 0.6], 1), 5).tolist() == [1, 2, 3]
    assert equal_width(np.array([0.4], np.float32), 5).tolist() == [2]  # 0.4 in float32 lies above 0.4


def test_the_error_by_hand():
    confidence, correct = np.array([0.9, 0.8, 0.3, 0.25]), np.array([1, 0, 0, 1])
    bins = equal_width(confidence, 2)
    assert bins.tolist() == [1, 1, 0, 0]
    assert expected_error(confidence, correct, bins) == pytest.approx((abs(0.5 - 0.85) + abs(0.5 - 0.275)) / 2)
    assert maximum_error(confidence, correct, bins) == pytest.approx(0.35)


def test_empty_bins_count_nowhere():
    confidence, correct = np.array([0.99, 0.98]), np.array([0.0, 0.0])
    assert maximum_error(confidence, correct, equal_width(confidence, 100)) == pytest.approx(0.99)
    assert expected_error(confidence, correct, equal_width(confidence, 100)) == pytest.approx(0.985)


def test_bins_of_equal_mass_hold_equally_many_and_ties_stay_together():
    confidence = np.random.default_rng(0).beta(9, 1, 100)
    assert np.bincount(equal_mass(confidence, 10)).tolist() == [10] * 10
    rising = equal_mass(np.sort(confidence), 7)
    assert (np.diff(rising) >= 0).all()
    assert set(np.bincount(rising)) <= {14, 15}
    tied = np.repeat([0.2, 0.9], [60, 40])
    order = np.random.default_rng(1).permutation(100)
    assert len(set(equal_mass(tied, 10)[:60])) == 1
    assert (equal_mass(tied, 10)[order] == equal_mass(tied[order], 10)).all()
    assert equal_mass(np.full(5, 0.5), 15).max() < 15


@pytest.mark.parametrize("wrong", [[1.2], [-0.1], [np.nan]])
def test_what_is_no_probability_is_refused(wrong):
    for bins in (equal_width, equal_mass):
        with pytest.raises(DataError, match="no probability"):
            bins(np.array(wrong))


def test_brier_is_the_squared_distance_from_the_truth():
    logit, label = judged(50)
    prob = softmax(logit, 2.0)
    assert prob == pytest.approx(scipy_softmax(logit / 2, axis=1))
    assert brier(prob, label) == pytest.approx(((prob - np.eye(5)[label]) ** 2).sum(axis=1))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 6.0])
def test_the_temperature_is_found_back_and_is_a_minimiser(temperature):
    logit, label = judged(4000, temperature)
    found = fit_temperature(logit, label)
    assert found == pytest.approx(temperature, rel=0.1)

    def loss(inverse):
        return -log_softmax(logit * inverse, axis=1)[np.arange(len(label)), label].mean()

    exact = minimize(lambda b: loss(b[0]), [1 / temperature], tol=1e-12).x[0]
    assert found == pytest.approx(1 / exact, rel=1e-4)
    assert loss(1 / found) <= min(loss(1 / found * 1.001), loss(1 / found / 1.001), loss(1.0))


def test_a_temperature_beyond_the_bounds_stops_there():
    logit = 0.2 * np.eye(3)[np.arange(30) % 3]
    assert fit_temperature(logit, np.arange(30) % 3) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(logit, (np.arange(30) + 1) % 3) == pytest.approx(20, rel=1e-3)
    for bad in (logit[:0], np.full((30, 3), np.inf)):
        with pytest.raises(DataError, match="No temperature"):
            fit_temperature(bad, np.arange(len(bad)))


def test_the_temperature_interval_is_that_of_refitting():
    logit, label = judged(300, 2.0)
    found = fit_temperature(logit, label)
    low, high = temperature_interval(logit, label, found, seed=0)
    rng = np.random.default_rng(5)
    refits = [fit_temperature(logit[rows], label[rows]) for rows in rng.integers(0, 300, (200, 300))]
    assert low < found < high
    assert (low, high) == pytest.approx(tuple(np.quantile(refits, [0.025, 0.975])), rel=0.08)


def test_scaling_calibrates_shifted_examples_too():
    logit, label = judged(2000, 4.0)
    other, truth = judged(2000, 4.0, seed=1)
    divisor = fit_temperature(logit, label)

    def ece(scaled):
        prob = softmax(scaled)
        return expected_error(prob.max(1), prob.argmax(1) == truth, equal_width(prob.max(1)))

    assert ece(other / divisor) < 0.3 * ece(other)


def test_intervals_of_gaps_hold_the_value_and_shrink_with_examples():
    widths = []
    for n in (200, 3200):
        logit, label = judged(n, 3.0)
        prob = softmax(logit)
        confidence, correct = prob.max(1), (prob.argmax(1) == label).astype(float)
        bins = equal_width(confidence)
        found = gap_intervals(confidence, correct, bins, seed=0)
        assert found == gap_intervals(confidence, correct, bins, seed=0)
        assert found.expected[0] <= expected_error(confidence, correct, bins) <= found.expected[1]
        assert found.maximum[0] <= maximum_error(confidence, correct, bins) <= found.maximum[1]
        widths.append(found.expected[1] - found.expected[0])
    assert widths[1] < widths[0] / 2
