from __future__ import annotations

import numpy as np
import pytest

from diptych.adapt.knn import K_UNTRIED, Config
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def scene(rows, seed, noise=0.8):
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % 3
    return Examples(unit(np.eye(3, 8)[label] + noise * rng.standard_normal((rows, 8))), label)


def support(validation=None, labelled=None):
    return Support(unit(np.eye(3, 8)), 100.0, labelled or scene(60, 0), validation)


def test_scores_are_shares_of_the_weighted_vote():
    rows, test = scene(60, 0), scene(9, 1)
    scores = Config(k=5, tau=0.2).build().fit(support()).predict(test)
    similarity = test.feature_ND @ rows.feature_ND.T
    for row in range(9):
        near = np.argsort(-similarity[row])[:5]
        weight = np.exp(similarity[row, near] / 0.2)
        expected = np.bincount(rows.label_N[near], weight, minlength=3) / weight.sum()
        np.testing.assert_allclose(scores[row], expected, atol=1e-5)


def test_k_is_the_smallest_of_the_best_on_validation():
    held = scene(90, 2)
    hits = {}
    for k in (1, 3, 10, 30, 60):
        scores = Config(k=k).build().fit(support()).predict(held)
        hits[k] = int((scores.argmax(1) == held.label_N).sum())
    fitted = Config(candidates=(60, 30, 10, 3, 1)).build().fit(support(held))
    assert fitted.k == max(hits, key=lambda k: (hits[k], -k))
    assert len(set(hits.values())) > 1


def test_blocks_change_nothing(monkeypatch):
    test, held = scene(30, 1), scene(90, 2)
    whole = Config().build().fit(support(held))
    monkeypatch.setattr("diptych.adapt.knn.BLOCK_CELLS", 200)
    pieces = Config().build().fit(support(held))
    assert pieces.k == whole.k
    np.testing.assert_allclose(pieces.predict(test), whole.predict(test), atol=1e-6)


def test_without_validation_k_is_the_documented_one_and_may_exceed_the_memory():
    few = scene(6, 0)
    fitted = Config().build().fit(support(labelled=few))
    assert fitted.k == K_UNTRIED
    np.testing.assert_array_equal(fitted.predict(scene(9, 1)), Config(k=6).build().fit(support(labelled=few)).predict(scene(9, 1)))


def test_a_class_without_rows_scores_nothing():
    rows = scene(60, 0)
    some = rows.label_N != 1
    scores = Config(k=7).build().fit(support(labelled=Examples(rows.feature_ND[some], rows.label_N[some]))).predict(scene(9, 1))
    assert not scores[:, 1].any()
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


def test_nothing_labelled_is_refused():
    with pytest.raises(DataError, match="labelled"):
        Config().build().fit(Support(unit(np.eye(3, 8)), 100.0))
