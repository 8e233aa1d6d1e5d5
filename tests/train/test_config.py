from __future__ import annotations

import pytest

from diptych.core.errors import ConfigError
from diptych.train.config import TrainConfig


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({}, "exactly one of epochs and steps"),
        ({"epochs": 1, "steps": 5}, "exactly one of epochs and steps"),
        ({"epochs": 0}, "greater than 0"),
        ({"epochs": 1, "batch_size": 10, "accumulate": 4}, "does not divide"),
        ({"epochs": 1, "precision": "fp16"}, "bf16"),
        ({"epochs": 1, "ema": 1.0}, "less than 1"),
        ({"epochs": 1, "augment": {"flp": True}}, "did you mean 'flip'"),
        ({"epochs": 1, "schedule": {"kind": "cosin"}}, "did you mean 'cosine'"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        TrainConfig.parse(wrong)


def test_the_length_of_a_run() -> None:
    assert TrainConfig.parse({"epochs": 2}).total_steps(7) == 14
    assert TrainConfig.parse({"epochs": 0.5}).total_steps(7) == 4
    assert TrainConfig.parse({"epochs": 0.01}).total_steps(7) == 1
    assert TrainConfig.parse({"steps": 9}).total_steps(7) == 9


def test_plain_data_comes_back() -> None:
    config = TrainConfig.parse({"epochs": 2, "augment": {"crop_scale": [0.5, 1]}, "schedule": {"warmup": 10}})
    assert TrainConfig.parse(config.plain()) == config


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"keep_best": {}}, "needs checkpoint_every_steps"),
        ({"keep_best": {"metric": "val_loss"}, "checkpoint_every_steps": 2}, "needs validate_every_steps"),
        ({"keep_best": {"mode": "lowest"}, "checkpoint_every_steps": 2}, "min"),
        ({"validate_every_steps": 15}, "not a multiple of log_every 10"),
    ],
)
def test_choices_of_a_checkpoint_that_cannot_be_made_are_refused(wrong: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        TrainConfig.parse({"epochs": 1, **wrong})


def test_threads_of_the_loader_take_the_cores_that_are_left() -> None:
    auto = TrainConfig.parse({"epochs": 1})
    assert [auto.loader_threads(cores) for cores in (1, 2, 4, 64)] == [0, 1, 3, 16]
    assert TrainConfig.parse({"epochs": 1, "threads": 3}).loader_threads(4) == 1
    assert TrainConfig.parse({"epochs": 1, "loader_workers": 5}).loader_threads(1) == 5
    for wrong in (-1, 257, "many"):
        with pytest.raises(ConfigError):
            TrainConfig.parse({"epochs": 1, "loader_workers": wrong})
