from __future__ import annotations

import numpy as np
import pytest

from diptych.core.errors import ConfigError
from diptych.evaluate.ensembles import combine, shares_of


def test_logits_and_probabilities_may_answer_differently() -> None:
    logit_KNC = np.array([[[9.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]])
    assert combine(logit_KNC)[0].argmax() == 0, "one sure model outvotes two unsure ones"
    assert combine(logit_KNC, of="probabilities")[0].argmax() == 1


def test_a_models_own_scale_counts() -> None:
    cosine_NC = np.array([[0.3, 0.1]])
    other_NC = np.array([[0.1, 0.25]])
    assert combine([10 * cosine_NC, 10 * other_NC])[0].argmax() == 0
    assert combine([10 * cosine_NC, 100 * other_NC])[0].argmax() == 1


def test_weights_are_shares() -> None:
    logit_KNC = np.random.default_rng(0).normal(size=(2, 5, 3))
    np.testing.assert_allclose(combine(logit_KNC, [3, 1]), 0.75 * logit_KNC[0] + 0.25 * logit_KNC[1])
    np.testing.assert_allclose(combine(logit_KNC, [0, 2], "probabilities").sum(axis=1), 1)
    assert shares_of(None, 4).tolist() == [0.25] * 4


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0]])
def test_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="2 numbers"):
        combine(np.zeros((2, 1, 2)), weights)
