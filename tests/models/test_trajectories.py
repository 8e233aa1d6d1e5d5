from __future__ import annotations

import pytest
import torch

from diptych.core.errors import ConfigError
from diptych.models import convnet
from diptych.models.trajectories import ExpertConfig, clipping_factor, gradient_penalty, movement, record

SHAPE = convnet.NetShape(channels=1, classes=2, width=3, depth=1, size=8)


def trained(**fields: object) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    image, label = torch.randn(12, 1, 8, 8, generator=draw), torch.arange(12) % 2
    config = ExpertConfig(**{"epochs": 6, "lr": 0.05, "gradient_penalty": 0.0, "clipping": False, **fields})  # type: ignore[arg-type]
    return record(convnet.create(SHAPE, 0), image, label, lambda _: torch.arange(12).split(5), config).flat_EP


def test_snapshots_are_copies_that_begin_with_the_initial_weights() -> None:
    flat = trained()
    assert flat.shape[0] == 7
    assert torch.equal(flat[0], convnet.flatten(convnet.create(SHAPE, 0)))
    assert (flat[1:] - flat[:-1]).norm(dim=1).min() > 0


def test_the_loss_is_clipped_in_the_first_ten_epochs_only() -> None:
    assert [round(clipping_factor(epoch), 2) for epoch in (0, 1, 9, 10, 40)] == [0.5, 0.55, 0.95, 1.0, 1.0]
    assert movement(trained(clipping=True)) < movement(trained())


def test_the_learning_rate_falls_behind_the_middle_and_not_before() -> None:
    whole, decayed = trained(decay=1.0), trained(decay=0.5)
    assert torch.equal(whole[:6], decayed[:6]), "the epoch 6 // 2 + 1 = 4, counted from 0, is the last at the full rate"
    assert not torch.equal(whole[6], decayed[6])


def test_the_penalty_looks_at_each_pixel_over_its_channels() -> None:
    class Sum(torch.nn.Module):
        def forward(self, image_NCHW: torch.Tensor) -> torch.Tensor:
            return 2.0 * image_NCHW[:, 0].flatten(1) + 0.0 * image_NCHW[:, 1].flatten(1)

    assert gradient_penalty(Sum(), torch.zeros(3, 2, 4, 4)).item() == pytest.approx(1.0)


def test_the_penalty_changes_the_training() -> None:
    assert not torch.equal(trained()[1], trained(gradient_penalty=2.0)[1])


def test_too_few_epochs_are_refused() -> None:
    with pytest.raises(ConfigError, match="epochs"):
        ExpertConfig.parse({"epochs": 1})
