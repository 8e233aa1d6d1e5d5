from __future__ import annotations

import numpy as np
import pytest

from diptych.core.errors import ConfigError
from diptych.evaluate import ranks, zero_shot
from diptych.evaluate.classified import Classified, cosines

NAMES = ["cat", "dog"]


def test_the_classifier_is_that_of_zero_shot(table_encoder):
    encoder = table_encoder({}, lambda text: np.random.default_rng(len(text)).standard_normal(4))
    templates = ("a {}", "one more {}")
    own = Classified(templates=templates)
    other = zero_shot.Config(templates=templates).build()
    assert (own.classifier(encoder, NAMES) == other.weights(encoder, NAMES)[0]).all()
    assert own.settings(encoder, NAMES) == other.settings(encoder, NAMES)


def test_cosines_do_not_depend_on_chunks(monkeypatch):
    image, weight = np.random.default_rng(0).random((7, 3), np.float32), np.random.default_rng(1).random((3, 2), np.float32)
    whole = cosines(image, weight)
    assert whole == pytest.approx(image @ weight)
    monkeypatch.setattr(ranks, "CHUNK", 4)
    assert cosines(image, weight) == pytest.approx(whole)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{}", "{}"], "plane"])
def test_templates_that_cannot_be_meant(templates):
    with pytest.raises(ConfigError):
        Classified.parse({"templates": templates})
