"""Distillation beside open_clip's loss, towards a teacher of another width, and what it leaves in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharded import Scaled, batch, context, encoded, started
from torch.nn.functional import mse_loss

from diptych.core.errors import ConfigError
from diptych.objectives.distillation import Config, divergence
from diptych.objectives.teacher import Teacher


def test_it_is_open_clips_loss_less_the_teachers_entropy() -> None:
    from open_clip.loss import DistillClipLoss

    objective, model = started({"method": "distillation", "teacher": "."})
    given = encoded(model, batch())
    parts, taught = objective(given), objective.teacher(given)
    scale = objective.teacher.logit_scale
    contrastive, theirs = DistillClipLoss()(given.image_ND, given.text_ND, given.logit_scale, *taught, scale)
    entropy = sum(
        torch.distributions.Categorical(logits=scale * a @ b.T).entropy().mean() / 2 for a, b in (taught, (taught.text_ND, taught.image_ND))
    )
    assert float(parts["contrastive"]) == pytest.approx(float(contrastive.detach()))
    assert float(parts["relational"]) == pytest.approx(float(theirs.detach() - entropy))
    assert float(parts["loss"].detach()) == pytest.approx(float(contrastive.detach() + theirs.detach() - entropy))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    objective, model = started({"method": "distillation", "teacher": ".", "features": 1.0, "contrastive": 0.0})
    objective.teacher = Teacher(Scaled().double(), "itself")
    parts = objective(encoded(model, batch()))
    parts["loss"].backward()
    assert float(parts["loss"].detach()) == pytest.approx(0, abs=1e-12)
    assert model.image.grad.abs().max() < 1e-12


def test_a_softer_teacher_keeps_the_size_of_the_gradient() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = []
    for temperature in (20.0, 40.0):
        student = torch.zeros(6, 9, dtype=torch.float64, requires_grad=True)
        (temperature**2 * divergence(logits / temperature, student / temperature)).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_features_of_equal_width_are_compared_as_they_are() -> None:
    objective, model = started({"method": "distillation", "teacher": ".", "features": 2.0})
    given = encoded(model, batch())
    parts, taught = objective(given), objective.teacher(given)
    expected = mse_loss(given.image_ND, taught.image_ND) + mse_loss(given.text_ND, taught.text_ND)
    assert float(parts["features"]) == pytest.approx(float(expected.detach()))
    assert float(parts["loss"].detach()) == pytest.approx(float(parts["contrastive"] + parts["relational"] + 2 * parts["features"]))
    assert objective.state_dict() == {}


def test_a_wider_teacher_gets_maps_that_are_trained_and_kept() -> None:
    objective, model = started({"method": "distillation", "teacher": ".", "features": 1.0})
    wide = Scaled(seed=4)
    wide.image, wide.words = (torch.nn.Parameter(torch.cat([w, w.flip(1)], dim=1).detach()) for w in (wide.image, wide.words))
    objective.teacher = Teacher(wide.double(), "wide")
    objective._make_maps(context(model))
    assert {name: tuple(value.shape) for name, value in objective.state_dict().items()} == {
        "maps.image.weight": (16, 8),
        "maps.text.weight": (16, 8),
    }
    objective.double()(encoded(model, batch()))["loss"].backward()
    assert all(parameter.grad.any() for parameter in objective.parameters())


def test_the_teacher_is_told_by_its_weights_and_is_no_part_of_the_state() -> None:
    objective, _ = started({"method": "distillation", "teacher": "."})
    assert objective.teacher.digest.removeprefix("sha256:")[:10] in repr(objective)
    assert list(objective.parameters()) == []
    assert Config.directories == ("teacher",)


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    for wrong, hint in (
        ({}, "teacher"),
        ({"teacher": "vit-nano-64"}, "weights are random"),
        ({"teacher": ".", "relational": 0.0}, "nothing is distilled"),
    ):
        with pytest.raises(ConfigError, match=hint):
            Config.parse({"method": "distillation", **wrong})
