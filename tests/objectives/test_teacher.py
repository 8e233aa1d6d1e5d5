"""The frozen teacher: what it gives, what it leaves alone, whom it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models import architectures, clip
from diptych.models.tokenizer import Tokenizer
from diptych.objectives.teacher import Teacher, TeacherName

TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny(seed: int = 0, **overrides: Any) -> clip.DualEncoder:
    torch.manual_seed(seed)
    return clip.build(architectures.merge(TINY, overrides))


def context(student: nn.Module, tokenizer: object = None) -> TrainContext:
    return TrainContext(student, tokenizer or Tokenizer(20), rows=8, class_names={}, total_steps=3)


def pictures(size: int, count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def seen(student: clip.DualEncoder, size: int = 16, encoder: object = None) -> Encoded:
    text_NL = torch.from_numpy(Tokenizer(20).encode_cut(["a red disc", "two", "a small green box", "naïve"]))
    batch = {"image_NCHW": pictures(size), "text_NL": text_NL}
    return Encoded(torch.empty(0, 0), torch.empty(0, 0), student.logit_scale.exp(), batch, student, encoder=encoder)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    clip.save(tiny(7, embed_dim=6), folder, {})
    return folder


class Student(nn.Module):
    """An objective that keeps a teacher."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.own = nn.Parameter(torch.zeros(3))


def test_it_gives_detached_unit_features_of_its_own_weights(directory: Path) -> None:
    student = tiny().train()
    teacher = Teacher.named(str(directory), context(student))
    taught = teacher(seen(student))
    expected = clip.load(directory).eval()
    batch = seen(student).batch
    torch.testing.assert_close(taught.image_ND, expected.encode_image(batch["image_NCHW"]).detach())
    torch.testing.assert_close(taught.text_ND, expected.encode_text(batch["text_NL"]).detach())
    assert taught.image_ND.shape == (4, 6)
    assert not taught.image_ND.requires_grad
    torch.testing.assert_close(teacher.logit_scale, expected.logit_scale.detach().exp())
    long = teacher.encode_image(batch["image_NCHW"], normalize=False)
    torch.testing.assert_close(nn.functional.normalize(long, dim=-1), taught.image_ND)
    assert not torch.allclose(long, taught.image_ND)


def test_an_objective_does_not_own_it(directory: Path) -> None:
    objective = Student(Teacher.named(str(directory), context(tiny()))).train()
    assert set(objective.state_dict()) == {"own"}
    assert [name for name, _ in objective.named_parameters()] == ["own"]
    assert list(objective.modules()) == [objective]
    assert not objective.teacher.model.training
    assert not any(parameter.requires_grad for parameter in objective.teacher.model.parameters())


def test_the_start_is_copied_and_the_student_left_alone() -> None:
    student = tiny().train()
    teacher = Teacher.of_start(context(student))
    before = teacher(seen(student)).image_ND
    with torch.no_grad():
        student.clip.visual.proj.mul_(torch.randn_like(student.clip.visual.proj))
    assert torch.equal(teacher(seen(student)).image_ND, before)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("size", [8, 31])
def test_pictures_of_another_size_are_resized_before_it_normalises_them(directory: Path, size: int) -> None:
    teacher = Teacher.named(str(directory), context(tiny()), ("image",))
    resized = interpolate(pictures(size).float(), (16, 16), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(teacher.encode_image(pictures(size)), teacher.model.encode_image(resized))


def test_it_encodes_in_the_loops_micro_batches_and_precision(directory: Path) -> None:
    class Loop:
        precision, accumulate = "bf16", 2

    student = tiny()
    teacher = Teacher.named(str(directory), context(student))
    sizes: list[int] = []
    teacher.model.clip.visual.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    whole, halves = teacher(seen(student)), teacher(seen(student, encoder=Loop()))
    assert sizes == [4, 2, 2]
    assert halves.image_ND.dtype == torch.float32
    torch.testing.assert_close(halves.image_ND, whole.image_ND, rtol=0, atol=0.03)
    assert not torch.equal(halves.image_ND, whole.image_ND)


def test_its_digest_tells_weights_apart(directory: Path, tmp_path: Path) -> None:
    same, other = (Teacher(tiny(seed), "t") for seed in (7, 8))
    assert Teacher(tiny(7), "another name").digest == same.digest
    assert other.digest != same.digest
    assert Teacher.named(str(directory), context(tiny())).digest == Teacher(tiny(7, embed_dim=6), "t").digest
    assert same.digest.removeprefix("sha256:")[:10] in repr(same)


def test_other_token_ids_are_refused(directory: Path, tmp_path: Path) -> None:
    class Words:
        def encode_cut(self, texts: object) -> object:
            raise AssertionError(texts)

    student = tiny()
    with pytest.raises(ConfigError, match="other token ids") as error:
        Teacher.named(str(directory), context(student, Words()))
    assert "train.objective.teacher" in str(error.value)
    Teacher.named(str(directory), context(student, Words()), ("image",))
    with pytest.raises(ConfigError, match="shorter than the student's"):
        Teacher.named(str(directory), context(student, Tokenizer(21)))
    Teacher.named(str(directory), context(student, Tokenizer(9)))


def test_names_that_are_no_teacher_are_refused(tmp_path: Path) -> None:
    class Config(BaseConfig):
        teacher: TeacherName

    with pytest.raises(ConfigError, match="whose weights are random"):
        Config.parse({"teacher": "vit-nano-64"})
    assert Config.parse({"teacher": "."}).teacher == "."
    with pytest.raises(ConfigError, match="no such teacher"):
        Teacher.named(str(tmp_path / "nothing"), context(tiny()))
