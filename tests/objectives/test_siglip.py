"""SigLIP's loss by its definition and beside open_clip's; the model's bias and the objective's own."""

from __future__ import annotations

import math

import pytest
import torch
from sharded import batch, encoded, started
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.objectives.siglip import Config, sigmoid_loss


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(5, 4, generator=generator, dtype=torch.float64)) for _ in range(2))
    return image, normalize(image + text)


def test_every_combination_is_a_question_of_its_own() -> None:
    image, text = features()
    total = 0.0
    for i, row in enumerate(image):
        for j, column in enumerate(text):
            logit = 7.0 * float(row @ column) - 2.0
            total += math.log1p(math.exp(-logit if i == j else logit))
    loss = sigmoid_loss(image, text, torch.tensor(7.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64))
    assert float(loss) == pytest.approx(total / len(image), rel=1e-12)


def test_it_is_open_clips_loss() -> None:
    from open_clip.loss import SigLipLoss

    image, text = features()
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    theirs = SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(sigmoid_loss(image, text, scale, bias), theirs)


def test_a_model_without_bias_lends_it_from_the_objective() -> None:
    objective, model = started({"method": "siglip", "bias": -3.0})
    assert {name: float(value) for name, value in objective.state_dict().items()} == {"logit_bias": -3.0}
    parts = objective(encoded(model, batch()))
    parts["loss"].backward()
    assert objective.logit_bias.grad.abs() > 0
    assert float(parts["bias"]) == -3.0


def test_a_models_own_bias_is_used_and_trained() -> None:
    objective, model = started({"method": "siglip", "bias": -3.0}, bias=-5.0)
    assert objective.state_dict() == {}
    parts = objective(encoded(model, batch()))
    parts["loss"].backward()
    assert model.logit_bias.grad.abs() > 0
    assert float(parts["bias"]) == -5.0


def test_the_bias_starts_in_balance_with_few_pairs_against_many() -> None:
    image, text = features()
    scale = torch.tensor(1.0, dtype=torch.float64)
    low, none = (float(sigmoid_loss(image, text, scale, torch.tensor(bias, dtype=torch.float64))) for bias in (-2.0, 0.0))
    assert low < none


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="logit_bias"):
        Config.parse({"method": "siglip", "logit_bias": 1.0})
