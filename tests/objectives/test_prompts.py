from __future__ import annotations

import pytest
import torch
from worlds import Vectors, context, encoded

from diptych.core.errors import ConfigError
from diptych.objectives.prompts import ClassPrompts
from diptych.objectives.shrinkmatch import Config

NAMES = {0: "cat", 3: "dog", 7: "owl"}
TEMPLATES = ("a {}.", "the {} here")


def test_weights_are_the_mean_over_the_templates() -> None:
    model = Vectors()
    prompts = ClassPrompts(context(model, NAMES), TEMPLATES)
    weight_CD = prompts.weights(encoded(model, {"image_NCHW": torch.ones(1, 12)}))
    assert len(prompts) == 3
    assert prompts.width(model) == weight_CD.shape[1]
    tokenizer = context(model, NAMES).tokenizer
    for weight_D, name in zip(weight_CD, NAMES.values(), strict=True):
        each = [model.encode_text(torch.from_numpy(tokenizer.encode_cut([template.format(name)])))[0] for template in TEMPLATES]
        mean = torch.stack(each).mean(dim=0)
        torch.testing.assert_close(weight_D, mean / mean.norm())


def test_labels_become_rows_and_null_stays_null() -> None:
    prompts = ClassPrompts(context(Vectors(), NAMES), TEMPLATES)
    assert prompts.classes(torch.tensor([7, -1, 0, 3])).tolist() == [2, -1, 0, 1]


def test_a_text_tower_that_trains_is_asked_each_time_and_a_frozen_one_once() -> None:
    for frozen, calls in ((False, 3), (True, 1)):
        model = Vectors()
        model.words.requires_grad_(not frozen)
        prompts = ClassPrompts(context(model, NAMES), TEMPLATES)
        weights = [prompts.weights(encoded(model, {"image_NCHW": torch.ones(1, 12)})) for _ in range(3)]
        assert model.texts_encoded == calls
        assert all(torch.equal(weight, weights[0]) for weight in weights)
        assert weights[0].requires_grad is not frozen


def test_names_and_templates_must_be_there() -> None:
    with pytest.raises(ConfigError, match="no classes to name"):
        ClassPrompts(context(Vectors(), {}), TEMPLATES)
    for templates in ([], ["a picture"]):
        with pytest.raises(ConfigError, match="templates"):
            Config.parse({"method": "shrinkmatch", "templates": templates})
