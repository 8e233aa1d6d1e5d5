from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from sklearn.linear_model import LogisticRegression

from diptych.adapt.linear_probe import Config, probe, search, strength, sweep_c
from diptych.adapt.logistic import Path, Problem
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Examples, Support


def blobs(n, seed, classes=3, width=6, noise=1.5):
    centre = np.random.default_rng(0).standard_normal((classes, width)) * 2
    rng = np.random.default_rng(seed)
    label = np.arange(n) % classes
    return centre[label] + noise * rng.standard_normal((n, width)), label


def rows(n, seed, **shape):
    x, label = blobs(n, seed, **shape)
    return Examples((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), label)


def test_probe_is_at_the_minimum_of_the_papers_loss():
    (x, y), C = blobs(60, 1), 0.316
    fit = probe(x, y, *blobs(30, 2), C=C)

    def loss(flat):
        coef, intercept = flat[:18].reshape(3, 6), flat[18:]
        logits = x @ coef.T + intercept
        own = logits[np.arange(60), y]
        return (np.log(np.exp(logits).sum(1)) - own).sum() + (coef**2).sum() / (2 * C)

    at = np.concatenate([fit.coef.ravel(), fit.intercept])
    assert np.abs(approx_fprime(at, loss, 1e-6)).max() < 1e-3
    assert np.abs(approx_fprime(at + 0.01, loss, 1e-6)).max() > 1e-2
    assert fit.accuracy == pytest.approx(np.mean(fit.predicted == blobs(30, 2)[1]))
    assert fit.accuracy > 0.7


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("C", [1e-3, 1.0, 1e3])
def test_probe_agrees_with_scikit_learn(classes, C):
    x, y = blobs(80, 1, classes, 7, noise=3.0)
    x = x * np.logspace(0, -2, 7) + 5  # features of different spread, far from 0
    ours = probe(x, 3 * y, x, 3 * y, C=C)  # class numbers need not be dense
    peer = LogisticRegression(C=C, tol=1e-10, max_iter=20_000, solver="newton-cg").fit(x, y)
    np.testing.assert_allclose(ours.coef, peer.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.intercept - ours.intercept.mean(), peer.intercept_ - peer.intercept_.mean(), rtol=1e-3, atol=1e-3)
    assert set(ours.predicted) <= set(3 * y)
    assert ours.accuracy == peer.score(x, y)


def test_float32_and_warm_starts_find_the_same_minimum():
    train = rows(200, 1, width=20, noise=2.0)
    path, cold = Path(Problem(train.feature_ND, train.label_N)), Problem(train.feature_ND.astype(np.float64), train.label_N)
    for C in (1e-2, 1.0, 1e2):
        np.testing.assert_allclose(path.at(C).coef_CD, cold.fit(C, tolerance=1e-10).coef_CD, rtol=1e-2, atol=1e-2)
    assert path.at(1.0) is path.at(1.0)
    assert path.problem.fit(1.0, path.at(1.0)).iterations == 0


def test_fewer_rows_than_features_leave_what_never_varied_at_zero():
    train = rows(12, 1, width=40)
    basis = np.linalg.svd(train.feature_ND - train.feature_ND.mean(0))[2][11:]
    weights = Problem(train.feature_ND, train.label_N).fit(1e6)
    assert np.abs(weights.coef_CD @ basis.T).max() < 1e-4 * np.abs(weights.coef_CD).max()
    assert (weights.logits(train.feature_ND).argmax(1) == train.label_N).all()


def test_grid_has_eight_steps_a_decade():
    assert (strength(0), strength(48), strength(96)) == pytest.approx((1e-6, 1.0, 1e6))
    assert strength(56) / strength(48) == pytest.approx(10)


def test_search_closes_in_on_the_best():
    tried = []

    def accuracy(C):
        tried.append(C)
        return -abs(np.log10(C) - 1.7)

    chosen = search(accuracy)
    assert tried[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert pytest.approx(10**1.75) == chosen.C  # 1.75 is the step of 1/8 next to 1.7
    assert len(tried) == len(set(tried)) == 15
    assert dict(chosen.tried)[chosen.C] == chosen.accuracy == max(value for _, value in chosen.tried)


def test_search_prefers_the_stronger_penalty_and_stays_on_the_grid():
    chosen = search(lambda _: 0.5)
    assert pytest.approx(1e-6) == chosen.C
    assert min(C for C, _ in chosen.tried) >= 0.99e-6


def test_sweep_reports_what_probes_would_get():
    train, held = blobs(60, 1, noise=4.0), blobs(60, 2, noise=4.0)
    chosen = sweep_c(*train, *held)
    for C, accuracy in chosen.tried[:7]:
        assert probe(*train, *held, C=C).accuracy == pytest.approx(accuracy, abs=1 / 60 + 1e-9)
    assert len({accuracy for _, accuracy in chosen.tried}) > 1


def test_adapter_sweeps_on_validation_and_fits_to_the_labelled_rows_alone():
    train, held, test = rows(60, 1, noise=3.0), rows(90, 2, noise=3.0), rows(90, 3, noise=3.0)
    support = Support(np.eye(3, 6, dtype=np.float32), 100.0, train, held)
    fitted = Config().build().fit(support)
    assert fitted.C == sweep_c(train.feature_ND, train.label_N, held.feature_ND, held.label_N).C
    alone = Config(C=fitted.C).build().fit(Support(support.text_CD, 100.0, train))
    agreed = fitted.predict(test).argmax(1) == alone.predict(test).argmax(1)
    assert agreed.mean() > 0.97
    assert fitted.predict(test).dtype == np.float32
    assert (fitted.predict(test).argmax(1) == test.label_N).mean() > 0.5


def test_adapter_without_validation_takes_the_documented_strength():
    few = rows(6, 1)
    fitted = Config().build().fit(Support(np.eye(3, 6, dtype=np.float32), 100.0, few))
    assert fitted.C == 1.0
    assert (fitted.predict(few).argmax(1) == few.label_N).all()


def test_senseless_probes_are_refused():
    (x, y), test = blobs(9, 0), blobs(9, 1)
    with pytest.raises(ConfigError):
        probe(x, y, *test, C=0.0)
    with pytest.raises(DataError):
        probe(x[:5], y, *test, C=1.0)
    with pytest.raises(DataError, match="two classes"):
        probe(x, np.zeros(9, int), *test, C=1.0)
    with pytest.raises(DataError, match="row 4 and 0 more"):
        probe(np.where(np.arange(9)[:, None] == 4, np.nan, x), y, *test, C=1.0)
    with pytest.raises(DataError, match="no row of class 3"):
        Config().build().fit(Support(np.eye(4, 6, dtype=np.float32), 100.0, rows(9, 0)))
