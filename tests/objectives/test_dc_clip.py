"""DC-CLIP's distillation: grids and padding, ranks, what it refuses, and that a student comes nearer to its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _ranks import run_ranks
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models import clip
from diptych.objectives.dc_clip import Config, map_loss, token_loss

SMALL = {"vision_cfg": {"layers": 2}, "text_cfg": {"layers": 1}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    clip.save(clip.create("vit-nano-64", 1), folder, {})
    return folder


def started(teacher: Path, overrides: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, clip.DualEncoder]:
    model = clip.create("vit-nano-64", 0, overrides or SMALL)
    torch.manual_seed(0)
    objective = Config.parse({"method": "dc-clip", "teacher": str(teacher), **settings}).build()
    objective.start(TrainContext(model, model.tokenizer, 4, {}, 10))
    return objective, model


def batch_of(model: clip.DualEncoder) -> dict[str, Tensor]:
    image_NCHW = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    texts = ["a cat", "eine Katze auf einem Dach", "a dog", "ein Hund"]
    return {"image_NCHW": image_NCHW, "text_NL": torch.from_numpy(model.tokenizer.encode_cut(texts))}


def encoded(model: clip.DualEncoder, batch: dict[str, Tensor], accumulate: int = 1) -> Encoded:
    encoder = type("Loop", (), {"accumulate": accumulate, "precision": "fp32"})()
    return Encoded(torch.empty(0, 0), torch.empty(0, 0), model.logit_scale.exp(), batch, model, encoder=encoder)


def test_a_coarser_grid_is_resized_to_the_teachers() -> None:
    student, teacher = torch.ones(1, 2, 2, 2, requires_grad=True), torch.full((1, 3, 4, 4), 2.0)
    adapter = nn.Conv2d(2, 3, 1)
    nn.init.ones_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    assert map_loss(student, teacher, adapter, 1.0).item() == 0.0


def test_beta_is_where_the_line_begins() -> None:
    adapter = nn.Identity()
    student, teacher = torch.tensor([[[3.0]]]), torch.zeros(1, 1, 1)
    assert token_loss(student, teacher, adapter, 1.0).item() == 2.5
    assert token_loss(student, teacher, adapter, 6.0).item() == 0.75


def test_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    real_NL = torch.tensor([[True, True, False], [True, False, False]])
    loss = token_loss(student, teacher, nn.Identity(), 1.0, real_NL)
    student[0, 2], student[1, 1:] = 1e6, -1e6
    assert token_loss(student, teacher, nn.Identity(), 1.0, real_NL) == loss


def on_a_rank(rank: int, world: int, student: Tensor, teacher: Tensor, real_NL: Tensor) -> float:
    part = slice(2 * rank, 2 * rank + 2)
    return token_loss(student[part], teacher[part], nn.Identity(), 1.0, real_NL[part]).item()


def test_ranks_with_captions_of_different_lengths_average_to_one_process() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, 4, generator=generator) for _ in range(2))
    real_NL = torch.tensor([[True, True, True], [True, True, True], [True, False, False], [True, False, False]])
    whole = token_loss(student, teacher, nn.Identity(), 1.0, real_NL).item()
    ranks = run_ranks(2, on_a_rank, student, teacher, real_NL)
    assert ranks[0] != pytest.approx(ranks[1])
    assert sum(ranks) / 2 == pytest.approx(whole, rel=1e-6)


def test_both_towers_learn_and_micro_batches_change_nothing(teacher: Path) -> None:
    objective, model = started(teacher)
    batch = batch_of(model)
    losses = objective(encoded(model, batch))
    assert set(losses) == {"loss", "image_map", "image_pooled", "text_map", "text_pooled"}
    losses["loss"].backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    assert any(".visual." in f".{name}" for name in grads)
    assert any("token_embedding" in name for name in grads)
    assert all(value.grad is not None for value in objective.parameters())
    model.zero_grad()
    objective(encoded(model, batch, accumulate=2))["loss"].backward()
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-4, atol=1e-6)


def test_a_student_comes_nearer_and_the_teacher_stays(teacher: Path) -> None:
    objective, model = started(teacher, towers="text")
    before = objective.teacher.digest
    batch = batch_of(model)
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = objective(encoded(model, batch))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(parameter.requires_grad for parameter in objective.teacher.model.parameters())
    assert set(objective.state_dict()) == {"adapters.text.weight", "adapters.text.bias"}
    assert objective.teacher.digest == before


def test_another_feature_width_is_refused_unless_maps_alone_are_matched(teacher: Path) -> None:
    with pytest.raises(ConfigError, match="not as wide as the teacher's"):
        started(teacher, {**SMALL, "embed_dim": 32})
    objective, _ = started(teacher, {**SMALL, "embed_dim": 32}, pooled=0.0)
    assert set(objective.adapters) == {"image", "text"}
