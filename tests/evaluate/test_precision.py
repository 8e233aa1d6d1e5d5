from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from diptych.evaluate.precision import average_precision, average_precision_interval


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn_with_ties_and_weights(seed):
    rng = np.random.default_rng(seed)
    score, positive, weight = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.4, rng.integers(0, 4, (3, 40))
    assert average_precision(score, positive) == pytest.approx(average_precision_score(positive, score))
    expected = [average_precision_score(positive, score, sample_weight=row) for row in weight]
    assert average_precision(score, positive, weight) == pytest.approx(expected)


def test_equal_scores_give_the_share_of_positives():
    assert average_precision(np.zeros(8), [1, 0, 0, 0, 1, 0, 0, 0]) == pytest.approx(0.25)
    assert average_precision([3.0, 2.0, 1.0], [True, True, False]) == 1
    assert np.isnan(average_precision([1.0, 2.0], [False, False]))


def test_the_interval_holds_the_value_and_shrinks():
    rng = np.random.default_rng(0)
    positive = np.repeat([[True], [False]], 400, axis=1)
    score = rng.standard_normal((2, 400)) + positive
    value = average_precision(score.ravel(), positive.ravel())
    low, high = average_precision_interval(score, positive, seed=1)
    few_low, few_high = average_precision_interval(score[:, :50], positive[:, :50], seed=1)
    assert low < value < high
    assert (high - low) < 0.6 * (few_high - few_low)
    assert average_precision_interval(score, positive, seed=1) == (low, high)
