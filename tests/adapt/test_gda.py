from __future__ import annotations

import numpy as np
import pytest

from diptych.adapt import gda
from diptych.adapt.gda import Config
from diptych.adapt.moments import class_means, pseudo_inverse, scatter
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support

CLASSES, WIDTH = 4, 12


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def scene(shots=16, seed=0, views=1):
    """Classes whose features share noise that text does not know of: the covariance has something to tell."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centre = fixed.standard_normal((CLASSES, WIDTH))
    mixing = fixed.standard_normal((WIDTH, WIDTH)) * (0.3 + 2 * (np.arange(WIDTH) < 3))[:, None]
    text = unit(centre + 0.5 * fixed.standard_normal(centre.shape))

    def draw(n):
        label = np.repeat(np.arange(CLASSES), n)
        return Examples(unit(centre[label] + 0.6 * rng.standard_normal((len(label), WIDTH)) @ mixing), label)

    few = draw(shots)
    if views > 1:
        few = Examples(np.repeat(few.feature_ND, views, axis=0), np.repeat(few.label_N, views))
    return Support(text, 100.0, few, draw(40), Examples(draw(60).feature_ND)), draw(100)


def accuracy(scores, test):
    return float((scores.argmax(1) == test.label_N).mean())


def test_few_shot_beats_zero_shot_where_noise_is_shared():
    support, test = scene()
    fitted = Config().build().fit(support)
    scores = fitted.predict(test)
    assert scores.dtype == np.float32
    assert scores.shape == (len(test.label_N), CLASSES)
    assert accuracy(scores, test) > accuracy(test.feature_ND @ support.text_CD.T, test) + 0.1
    assert fitted.alpha in gda.ALPHAS


def test_precision_is_the_definition():
    support, _ = scene(shots=2)
    x, label = support.labelled.feature_ND.astype(np.float64), support.labelled.label_N
    residual = x - np.stack([x[label == c].mean(0) for c in range(CLASSES)])[label]
    covariance = np.cov(residual.T)
    expected = WIDTH * np.linalg.pinv((len(x) - 1) * covariance + np.trace(covariance) * np.eye(WIDTH))
    np.testing.assert_allclose(gda.fit_few_shot(x, label, CLASSES).precision_DD, expected, rtol=1e-9)


@pytest.mark.parametrize("views", [1, 7])
def test_one_shot_in_equal_views_leaves_zero_shot_alone(views):
    support, test = scene(shots=1, views=views)
    fitted = Config(alpha=100.0).build().fit(support)
    zero_shot = 100 * test.feature_ND @ support.text_CD.T
    np.testing.assert_allclose(fitted.predict(test) - fitted.predict(test).mean(), zero_shot - zero_shot.mean(), atol=1e-3)


def test_alpha_is_the_smallest_of_the_best_and_untouched_without_a_right_answer():
    zero_shot, gaussian = np.array([[1.0, 0.0]] * 2), np.array([[0.0, 0.5]] * 2)
    assert gda.choose_alpha(zero_shot, gaussian, np.array([1, 1])) == (10.0, 1.0)
    assert gda.choose_alpha(zero_shot, gaussian, np.array([0, 0])) == (1e-4, 1.0)
    assert gda.choose_alpha(zero_shot, -gaussian, np.array([1, 1])) == (gda.ALPHA_UNTRIED, 0.0)


def test_without_validation_alpha_is_the_documented_one():
    support, _ = scene()
    bare = Support(support.text_CD, 100.0, support.labelled)
    assert Config().build().fit(bare).alpha == gda.ALPHA_UNTRIED
    assert Config(alpha=3.0).build().fit(support).alpha == 3.0


def test_an_empirical_prior_favours_the_larger_class():
    support, test = scene()
    many = np.flatnonzero((support.labelled.label_N == 0) | (np.arange(64) % 4 == 0))
    skewed = Support(support.text_CD, 100.0, Examples(support.labelled.feature_ND[many], support.labelled.label_N[many]))
    even, own = (Config(alpha=1.0, prior=prior).build().fit(skewed).predict(test) for prior in ("uniform", "empirical"))
    moved = own - even
    np.testing.assert_allclose(moved[:, 0] - moved[:, 1], np.log(16 / 4), atol=1e-3)


def test_missing_parts_and_empty_classes_are_refused():
    support, _ = scene()
    some = support.labelled.label_N != 2
    hole = Support(support.text_CD, 100.0, Examples(support.labelled.feature_ND[some], support.labelled.label_N[some]))
    with pytest.raises(DataError, match="no row of class 2"):
        Config().build().fit(hole)
    with pytest.raises(DataError, match="labelled"):
        Config().build().fit(Support(support.text_CD, 100.0))
    with pytest.raises(DataError, match="unlabelled"):
        Config(fitter="em").build().fit(Support(support.text_CD, 100.0, support.labelled))
    with pytest.raises(DataError, match="no labels"):
        Config().build().fit(Support(support.text_CD, 100.0, Examples(support.labelled.feature_ND)))
    with pytest.raises(DataError, match="no class of the set"):
        Config().build().fit(Support(support.text_CD[:3], 100.0, support.labelled))
    with pytest.raises(DataError, match="not numbers"):
        Config().build().fit(support).predict(Examples(np.full((2, WIDTH), np.nan, np.float32)))
    with pytest.raises(DataError, match="do not match"):
        Config().build().fit(support).predict(Examples(np.zeros((2, WIDTH + 1), np.float32)))


def test_em_needs_no_label_and_follows_the_target():
    support, test = scene()
    bare = Support(support.text_CD, 10.0, unlabelled=support.unlabelled)
    adapter = Config(fitter="em", alpha=20.0).build()  # 240 rows of 12 values: the Gaussians at their own scale
    assert adapter.needs == {"unlabelled"}
    followed, zero_shot = accuracy(adapter.fit(bare).predict(test), test), accuracy(test.feature_ND @ support.text_CD.T, test)
    assert followed > zero_shot + 0.02
    assert Config(fitter="em").build().fit(bare).alpha == 1.0


def test_m_step_is_the_published_sum_even_for_a_class_without_mass():
    x = scene()[0].unlabelled.feature_ND.astype(np.float64)
    gamma = np.random.default_rng(1).dirichlet(np.ones(CLASSES), len(x))
    gamma[:, 3] = 1e-14
    mass = np.maximum(gamma.sum(0), gda.LEAST_MASS)
    mean = gamma.T @ x / mass[:, None]
    expected = sum(((x - mean[k]).T * gamma[:, k]) @ (x - mean[k]) / mass[k] for k in range(CLASSES)) / CLASSES
    mixture = gda.m_step(x, gamma)
    np.testing.assert_allclose(mixture.mean_CD, mean, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(mixture.covariance_DD, expected, rtol=1e-9, atol=1e-14)


def test_new_classes_take_their_neighbours_and_the_text_for_examples():
    support, test = scene()
    base, new = Config(neighbours=10, text_copies=4).build().base_to_new(support, support.text_CD[:2])
    assert base.weight_DC.shape == (WIDTH, CLASSES)
    assert new.weight_DC.shape == (WIDTH, 2)
    x, t = support.labelled.feature_ND.astype(np.float64), support.text_CD[0].astype(np.float64)
    near = x[np.argsort(-(x @ t))[:10]]
    covariance = (near - t).T @ (near - t) / 9
    expected = WIDTH * np.linalg.pinv(9 * covariance + np.trace(covariance) * np.eye(WIDTH))
    gaussians = gda.fit_new(x, t[None], 10, 4)
    np.testing.assert_allclose(gaussians.precision_DD, expected, rtol=1e-8)
    np.testing.assert_allclose(gaussians.mean_CD[0], (near.sum(0) + 4 * t) / 14)
    assert gda.fit_new(x[:3], t[None], 10, 0).mean_CD[0] == pytest.approx(x[:3].mean(0))  # all of fewer rows
    only = test.label_N < 2
    assert accuracy(new.logits(test.feature_ND[only]), Examples(test.feature_ND, test.label_N[only])) > 0.5


def test_a_base_class_of_one_row_has_no_covariance():
    support, _ = scene(shots=1)
    with pytest.raises(DataError, match="covariance"):
        Config().build().base_to_new(support, support.text_CD[:1])


def test_moments_do_not_depend_on_blocks_or_precision(monkeypatch):
    rng = np.random.default_rng(0)
    x, label, weight = rng.standard_normal((50, 5)).astype(np.float32), np.arange(50) % 3, rng.uniform(size=50)
    mean = class_means(x, label, 3)
    whole = scatter(x, mean, label, weight)
    monkeypatch.setattr("diptych.adapt.moments.BLOCK_ROWS", 7)
    np.testing.assert_allclose(class_means(x, label, 3), mean, rtol=1e-13)
    np.testing.assert_allclose(scatter(x, mean, label, weight), whole, rtol=1e-12)
    offset = x.astype(np.float64) - mean[label]
    np.testing.assert_allclose(whole, np.einsum("n,nd,ne->de", weight, offset, offset), rtol=1e-12)


def test_pseudo_inverse_of_a_matrix_short_of_rank():
    a = np.random.default_rng(0).standard_normal((3, 6))
    np.testing.assert_allclose(pseudo_inverse(a.T @ a), np.linalg.pinv(a.T @ a), atol=1e-9)
    assert not pseudo_inverse(np.zeros((4, 4))).any()
