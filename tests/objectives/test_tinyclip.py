"""TinyCLIP's loss against the relational term of distillation, its fixed scales, and what its student begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharded import Scaled, batch, context, encoded, started

from diptych.core.errors import ConfigError
from diptych.models import clip, store
from diptych.objectives.clip import clip_logits, clip_loss
from diptych.objectives.distillation import relational_loss
from diptych.objectives.teacher import Teacher
from diptych.objectives.tinyclip import Config, terms


def test_it_is_the_divergence_from_the_teacher_and_its_entropy() -> None:
    objective, model = started({"method": "tinyclip", "teacher": ".", "alpha": 0.25, "scale": None, "teacher_scale": None})
    given = encoded(model, batch())
    parts, taught = objective(given), objective.teacher(given)
    student = clip_logits(given.image_ND, given.text_ND, given.logit_scale, local_loss=True, gather_with_grad=True)
    teacher = clip_logits(*taught, objective.teacher.logit_scale, local_loss=True, gather_with_grad=False)
    entropy = sum(torch.distributions.Categorical(logits=side).entropy().mean() / 2 for side in teacher[:2])
    affinity = float((relational_loss(student, teacher, 1.0) + entropy).detach())
    hard = float(clip_loss(given.image_ND, given.text_ND, given.logit_scale).detach())
    assert float((parts["by_image"] + parts["by_text"]) / 2) == pytest.approx(affinity)
    assert float(parts["loss"].detach()) == pytest.approx(0.25 * affinity + 0.75 * hard)


def test_each_direction_has_its_own_softmax() -> None:
    objective, model = started({"method": "tinyclip", "teacher": "."})
    parts = objective(encoded(model, batch()))
    assert float(parts["by_image"]) != pytest.approx(float(parts["by_text"]))


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    objective, model = started({"method": "tinyclip", "teacher": "."})
    objective.teacher = Teacher(Scaled().double(), "itself")
    objective(encoded(model, batch()))["loss"].backward()
    assert model.image.grad.abs().max() < 1e-12


def test_scales_are_fixed_at_fifty_or_learnt() -> None:
    objective, model = started({"method": "tinyclip", "teacher": "."})
    assert float(model.logit_scale.exp().detach()) == pytest.approx(50)
    objective(encoded(model, batch()))["loss"].backward()
    assert model.logit_scale.grad is None
    objective, model = started({"method": "tinyclip", "teacher": ".", "scale": None})
    assert float(model.logit_scale.exp().detach()) == pytest.approx(4)
    objective(encoded(model, batch()))["loss"].backward()
    assert float(model.logit_scale.grad)


def test_the_teacher_gets_no_gradient_and_is_no_state() -> None:
    model, teacher = Scaled().double(), Scaled(seed=3).double()
    given = encoded(model, batch())
    with torch.no_grad():
        plain = encoded(teacher, batch())
    side = plain.image_ND.clone().requires_grad_()
    scale = torch.tensor(50.0, dtype=torch.float64)
    terms(given.image_ND, given.text_ND, scale, type("T", (), {"image_ND": side, "text_ND": plain.text_ND})(), scale).weighed(
        1.0
    ).backward()
    assert side.grad is None
    objective, _ = started({"method": "tinyclip", "teacher": "."})
    assert objective.state_dict() == {}
    assert objective.teacher.digest.removeprefix("sha256:")[:10] in repr(objective)


def test_the_student_begins_with_slices_of_the_teacher_or_of_an_ancestor(tmp_path: Path) -> None:
    for seed, name in enumerate(("teacher", "ancestor")):
        store.save(clip.create("shapes-16", seed), tmp_path / name, {})
    overrides = {"vision_cfg": {"layers": 1, "width": 32}}
    for settings, name in (({}, "teacher"), ({"ancestor": str(tmp_path / "ancestor")}, "ancestor")):
        student = clip.create("shapes-16", 7, overrides)
        parsed = Config.parse({"method": "tinyclip", "teacher": str(tmp_path / "teacher"), "inherit": True, **settings})
        objective = parsed.build()
        objective.start(context(student))
        theirs = store.load(tmp_path / name).clip.visual.proj
        assert torch.equal(student.clip.visual.proj, theirs[:32])
        assert ("ancestor" in repr(objective).split("Teacher(", 1)[1]) == (name == "ancestor")


def test_impossible_settings_are_refused() -> None:
    for wrong, hint in (
        ({}, "teacher"),
        ({"teacher": "vit-nano-64"}, "weights are random"),
        ({"teacher": ".", "ancestor": "."}, "inherit=true"),
        ({"teacher": ".", "scale": 200.0}, "scale"),
    ):
        with pytest.raises(ConfigError, match=hint):
            Config.parse({"method": "tinyclip", **wrong})
    with pytest.raises(ConfigError, match="cannot inherit"):
        started({"method": "tinyclip", "teacher": ".", "inherit": True})
