"""Distillation from a frozen teacher: its similarities within the batch, and its features, beside the contrastive loss.

The relational term is that of open_clip's `DistillClipLoss` less the teacher's entropy, so that it is zero where student and teacher agree
(Hinton et al. 2015; "contrastive relational distillation" of CLIP-KD, Yang et al., CVPR 2024, section 3.3); the feature term is CLIP-KD's
feature distillation.

Shape legend: n pairs on this rank, N pairs in the global batch, D feature width, E the teacher's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoded, TrainContext
from diptych.objectives.clip import Logits, clip_logits, symmetric_loss
from diptych.objectives.teacher import Taught, Teacher, TeacherName


def relational_loss(student: Logits, teacher: Logits, temperature: float) -> Tensor:
    """KL divergence of the student's softmaxes from the teacher's, both directions: a scalar in nats, the mean over this rank's queries.

    Args:
        student, teacher: scaled similarities `[n, N]` of the same queries to the same candidates; the teacher's without gradient.
        temperature: softens both; the loss is multiplied by its square, so that gradients keep their size.
    """
    sides = ((teacher.image, student.image), (teacher.text, student.text))
    by_image, by_text = (divergence(theirs_nN / temperature, ours_nN / temperature) for theirs_nN, ours_nN in sides)
    return temperature**2 * (by_image + by_text) / 2


def divergence(teacher_nN: Tensor, student_nN: Tensor) -> Tensor:
    """KL(softmax of the teacher's logits || softmax of the student's), the mean over the rows, in nats."""
    theirs_nN, ours_nN = log_softmax(teacher_nN, dim=1), log_softmax(student_nN, dim=1)
    return (theirs_nN.exp() * (theirs_nN - ours_nN)).sum(dim=1).mean()


class Distillation(nn.Module):
    """The objective. The teacher is no part of its state; linear maps to the teacher's width are, where widths differ."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.teacher: Teacher | None = None
        self.maps = nn.ModuleDict()

    def start(self, context: TrainContext) -> None:
        """Reads the teacher. Raises ConfigError for one whose token ids are not the student's."""
        self.teacher = Teacher.named(self.config.teacher, context)
        if self.config.features > 0:
            self._make_maps(context)

    def _make_maps(self, context: TrainContext) -> None:
        """Linear maps from the student's features to the teacher's width, if it is another."""
        assert self.teacher is not None
        text_NL = torch.from_numpy(context.tokenizer.encode_cut(["a"])).to(context.device)
        student: Any = context.model
        with torch.no_grad():
            width, theirs = student.encode_text(text_NL).shape[1], self.teacher.encode_text(text_NL).shape[1]
        if width != theirs:
            self.maps = nn.ModuleDict({tower: nn.Linear(width, theirs, bias=False) for tower in self.teacher.towers}).to(context.device)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss` and its parts `contrastive`, `relational` and, if asked for, `features`, before they are weighed."""
        assert self.teacher is not None, "start() comes first"
        config, taught = self.config, self.teacher(encoded)
        student = clip_logits(encoded.image_ND, encoded.text_ND, encoded.logit_scale, local_loss=True, gather_with_grad=True)
        scale = self.teacher.logit_scale.to(taught.image_ND)
        teacher = clip_logits(taught.image_ND, taught.text_ND, scale, local_loss=True, gather_with_grad=False)
        parts = {"contrastive": symmetric_loss(student), "relational": relational_loss(student, teacher, config.temperature)}
        loss = config.contrastive * parts["contrastive"] + config.relational * parts["relational"]
        if config.features > 0:
            parts["features"] = self._distance(encoded, taught)
            loss = loss + config.features * parts["features"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _distance(self, encoded: Encoded, taught: Taught) -> Tensor:
        """Mean squared distance of the features of both towers to the teacher's."""
        pairs = {"image": (encoded.image_ND, taught.image_ND), "text": (encoded.text_ND, taught.text_ND)}
        distances = [
            mse_loss(self.maps[tower](ours_ND) if tower in self.maps else ours_ND, theirs_ND)
            for tower, (ours_ND, theirs_ND) in pairs.items()
        ]
        return torch.stack(distances).sum()

    def extra_repr(self) -> str:
        """The settings, and which teacher it is: they name a run's checkpoints."""
        return f"{self.config!r}, {self.teacher!r}"


class Config(BaseConfig):
    """Distillation from a larger, or older, model of the same tokenizer; pictures are resized to the teacher's size."""

    directories: ClassVar[tuple[str, ...]] = ("teacher",)

    method: Literal["distillation"] = "distillation"
    teacher: TeacherName
    contrastive: float = Field(1.0, ge=0, description="weight of CLIP's own loss")
    relational: float = Field(1.0, ge=0, description="weight of the divergence from the teacher's similarities within the batch")
    features: float = Field(0.0, ge=0, description="weight of the squared distance to the teacher's features; CLIP-KD takes 2000")
    temperature: float = Field(1.0, gt=0, description="softens the similarities of both, beyond their own scales")

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.relational == self.features == 0:
            raise ValueError("without relational and features nothing is distilled; set a weight, or choose the objective clip")
        return self

    def build(self) -> Distillation:
        """The objective."""
        return Distillation(self)
