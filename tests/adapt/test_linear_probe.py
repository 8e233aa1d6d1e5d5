from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import linear_probe
from diptych.evaluate.linear_probe import Split, probe, strength, sweep_c
from diptych.evaluate.rows import Rows


def blobs(n, seed, classes=3, width=6, noise=1.5):
    centre = np.random.default_rng(0).standard_normal((classes, width)) * 2
    rng = np.random.default_rng(seed)
    label = np.arange(n) % classes
    return Split(centre[label] + noise * rng.standard_normal((n, width)), label)


def test_probe_is_at_the_minimum_of_the_papers_loss():
    train, C = blobs(60, 1), 0.316
    fit = probe(*train, *blobs(30, 2), C=C, tolerance=1e-10)

    def loss(flat):
        coef, intercept = flat[:18].reshape(3, 6), flat[18:]
        logits = train.x @ coef.T + intercept
        own = logits[np.arange(60), train.y]
        return (np.log(np.exp(logits).sum(1)) - own).sum() + (coef**2).sum() / (2 * C)

    at = np.concatenate([fit.coef.ravel(), fit.intercept])
    assert np.abs(approx_fprime(at, loss, 1e-6)).max() < 1e-3
    assert np.abs(approx_fprime(at + 0.01, loss, 1e-6)).max() > 1e-2
    assert fit.accuracy == pytest.approx(np.mean(fit.predicted == blobs(30, 2).y))
    assert fit.accuracy > 0.7


def test_grid_has_eight_steps_a_decade():
    assert (strength(0), strength(48), strength(96)) == pytest.approx((1e-6, 1.0, 1e6))
    assert strength(56) / strength(48) == pytest.approx(10)


def test_sweep_closes_in_on_the_best(monkeypatch):
    tried = []

    def fake(*_, C, tolerance):
        tried.append(C)
        return linear_probe.Probe(-abs(np.log10(C) - 1.7), np.zeros(0), np.zeros(0), np.zeros(0))

    monkeypatch.setattr(linear_probe, "probe", fake)
    chosen = sweep_c(*blobs(9, 0), *blobs(9, 1))
    assert tried[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert pytest.approx(10**1.75) == chosen.C  # 1.75 is the step of 1/8 next to 1.7
    assert len(tried) == len(set(tried)) == 15
    assert dict(chosen.tried)[chosen.C] == chosen.accuracy == max(value for _, value in chosen.tried)


def test_sweep_prefers_the_stronger_penalty_and_stays_on_the_grid(monkeypatch):
    monkeypatch.setattr(linear_probe, "probe", lambda *_, C, tolerance: linear_probe.Probe(0.5, *[np.zeros(0)] * 3))
    chosen = sweep_c(*blobs(9, 0), *blobs(9, 1))
    assert pytest.approx(1e-6) == chosen.C
    assert min(C for C, _ in chosen.tried) >= 0.99e-6


def test_run_refits_on_train_and_validation_and_reports_the_test_split():
    train, validation, test = blobs(30, 1), blobs(30, 2), blobs(60, 3)
    rows = Rows("blobs", linear_probe.TASK, [str(i) for i in range(60)], 0, {"feature": "penultimate"})
    (metric,) = linear_probe.run(train, validation, test, rows)
    chosen = sweep_c(*train, *validation)
    both = probe(np.concatenate([train.x, validation.x]), np.concatenate([train.y, validation.y]), *test, C=chosen.C)
    assert metric.value == both.accuracy
    assert (metric.set, metric.task, metric.metric, metric.n) == ("blobs", "linear-probe", "acc1", 60)
    assert metric.settings == {"feature": "penultimate", "train_rows": 30, "validation_rows": 30}
    assert metric.low <= metric.value <= metric.high


def test_senseless_probes_are_refused():
    train, test = blobs(9, 0), blobs(9, 1)
    with pytest.raises(ConfigError):
        probe(*train, *test, C=0.0)
    with pytest.raises(DataError):
        probe(train.x[:5], train.y, *test, C=1.0)
    with pytest.raises(DataError, match="two classes"):
        probe(train.x, np.zeros(9, int), *test, C=1.0)
