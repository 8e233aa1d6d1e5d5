from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.special import softmax as scipy_softmax
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from diptych.core.errors import DataError
from diptych.evaluate import ood
from diptych.evaluate.ood import score, separation, separation_intervals


@pytest.fixture
def cosine():
    return np.random.default_rng(0).uniform(-0.2, 0.4, (40, 6)).astype(np.float32)


def test_scores_are_what_they_are_called(cosine):
    logit = 30 * cosine.astype(np.float64)
    prob = scipy_softmax(logit, axis=1)
    assert score("mcm", cosine, 30) == pytest.approx(scipy_softmax(cosine.astype(float), axis=1).max(1))
    assert score("msp", cosine, 30) == pytest.approx(prob.max(1))
    assert score("max_logit", cosine, 30) == pytest.approx(logit.max(1))
    assert score("energy", cosine, 30) == pytest.approx(logsumexp(logit, axis=1))
    assert score("negative_entropy", cosine, 30) == pytest.approx((prob * np.log(prob)).sum(1))


def test_mcm_does_not_know_the_logit_scale_and_msp_does(cosine):
    assert (score("mcm", cosine, 1) == score("mcm", cosine, 100)).all()
    assert score("msp", cosine, 1) == pytest.approx(score("mcm", cosine, 100))
    assert (np.argsort(score("msp", cosine, 100)) != np.argsort(score("mcm", cosine, 100))).any()


@pytest.mark.parametrize("name", get_args(ood.Score))
def test_large_logits_do_not_overflow(name):
    assert np.isfinite(score(name, np.array([[1.0, -1.0], [0.5, 0.5]], np.float32), 1e5)).all()


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_figures_against_scikit_learn(decimals):
    rng = np.random.default_rng(decimals)
    inside, outside = rng.normal(1, 1, 130).round(decimals), rng.normal(0, 1, 70).round(decimals)
    truth, value = np.repeat([1, 0], [130, 70]), np.concatenate([inside, outside])
    found = separation(inside, outside)
    false_rate, true_rate, _ = roc_curve(truth, value, drop_intermediate=False)
    assert found.auroc == pytest.approx(roc_auc_score(truth, value))
    assert found.fpr95 == pytest.approx(false_rate[true_rate >= 0.95].min())
    assert found.aupr_in == pytest.approx(average_precision_score(truth, value))
    assert found.aupr_out == pytest.approx(average_precision_score(1 - truth, -value))


def test_constant_scores_know_nothing():
    found = separation(np.full(30, 0.5), np.full(10, 0.5))
    assert found == pytest.approx((0.5, 1.0, 0.75, 0.25))
    for (low, high), value in zip(separation_intervals(np.full(30, 0.5), np.full(10, 0.5), 0), found, strict=True):
        assert low == high == value


def test_apart_and_upside_down():
    assert separation([3, 4], [1, 2, 2]) == pytest.approx((1, 0, 1, 1))
    upside_down = separation([1, 2, 2], [3, 4])
    assert (upside_down.auroc, upside_down.fpr95) == (0, 1)


def test_intervals_are_those_of_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 90).round(1), rng.normal(0, 1, 60).round(1)
    found = separation_intervals(inside, outside, 3)
    assert found == separation_intervals(inside, outside, 3)
    replicates = [separation(rng.choice(inside, 90), rng.choice(outside, 60)) for _ in range(1000)]
    for (low, high), value, column in zip(found, separation(inside, outside), np.array(replicates).T, strict=True):
        assert low <= value <= high
        assert (low, high) == pytest.approx(tuple(np.quantile(column, [0.025, 0.975])), abs=0.05)


@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([1.0], [np.nan])])
def test_what_cannot_be_compared_is_refused(inside, outside):
    with pytest.raises(DataError, match="told apart"):
        separation(np.array(inside), np.array(outside))
