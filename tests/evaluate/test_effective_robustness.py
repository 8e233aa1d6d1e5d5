from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau

from diptych.evaluate.effective_robustness import correlations, effective_robustness, fit_line, transformed


@pytest.fixture
def baselines():
    rng = np.random.default_rng(0)
    inside = rng.uniform(0.3, 0.9, 12)
    return inside, 1 / (1 + np.exp(-(0.8 * np.log(inside / (1 - inside)) - 0.7 + 0.05 * rng.standard_normal(12))))


@pytest.mark.parametrize("space", ["logit", "probit"])
def test_baselines_lie_around_their_own_line(baselines, space):
    line = fit_line(*baselines, space)
    residual = transformed(baselines[1], space) - (line.slope * transformed(baselines[0], space) + line.intercept)
    assert residual.mean() == pytest.approx(0, abs=1e-9)
    assert line.r > 0.98
    assert np.abs(effective_robustness(line, *baselines, space)).max() < 0.05


def test_a_model_above_the_line_is_robust_by_its_height(baselines):
    line = fit_line(*baselines, "logit")
    expected = float(effective_robustness(line, 0.6, 0.0, "logit"))
    assert effective_robustness(line, 0.6, -expected + 0.1, "logit") == pytest.approx(0.1)
    assert line.slope == pytest.approx(0.8, abs=0.1)


def test_accuracies_of_zero_and_one_are_kept_off_the_ends():
    assert np.isinf(transformed([0.0, 1.0], "logit")).all()
    assert transformed([0.0, 1.0], "logit", n=50) == pytest.approx([-np.log(99), np.log(99)])
    assert transformed([0.0, 0.5], "probit", n=50)[1] == 0


def test_correlations_tell_order_from_proportion():
    a = np.arange(1.0, 9)
    assert correlations(a, a**3)[1:] == pytest.approx((1, 1))
    assert correlations(a, a**3).pearson < 0.95
    tied = np.array([1, 1, 2, 3, 3, 2, 5, 8.0])
    assert correlations(a, tied).kendall == pytest.approx(kendalltau(a, tied).statistic)
