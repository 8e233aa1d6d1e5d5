"""TinyCLIP: a student reproduces a frozen teacher's affinities between pictures and captions, and may begin with a slice of its weights.

Wu et al., "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance" (ICCV 2023), sections 3.1 and 3.2. Each direction has its
own softmax. There is one temperature a model, its logit scale; as released, both are 50 throughout.

Inheritance by hand is `inherit` here (`models/inherit.py`): the student's first weights are slices of the teacher's. A shrinking in several stages is
as many trainings: each names the original as its `teacher` and the student before it as its `ancestor`; in a claim, arms that name each other
(`"@model:…"`). Inheritance by learnt masks is the compressor `tinyclip-masks`.

Shape legend: n pairs on this rank, N pairs in the global batch, D feature width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models.clip import DualEncoder
from diptych.models.contrastive import affinity_cross_entropy
from diptych.models.inherit import inherit
from diptych.objectives.clip import clip_logits, symmetric_loss
from diptych.objectives.teacher import Taught, Teacher, TeacherName
from diptych.objectives.temperature import fix_logit_scale

MAX_SCALE = 100.0


class Terms(NamedTuple):
    """Scalars of this rank, in nats: both directions of the affinity term, the teacher's entropy included, and CLIP's own loss."""

    by_image: Tensor
    by_text: Tensor
    hard: Tensor

    def weighed(self, alpha: float) -> Tensor:
        """The loss."""
        affinity = (self.by_image + self.by_text) / 2
        return affinity if alpha == 1 else alpha * affinity + (1 - alpha) * self.hard


def terms(image_nD: Tensor, text_nD: Tensor, scale: Tensor, taught: Taught, teacher_scale: Tensor, with_grad: bool = True) -> Terms:
    """The terms of this rank's queries against the candidates of all ranks; the mean over ranks is that of one process.

    Args:
        image_nD, text_nD: the student's features of this rank, of unit norm; `taught` are the teacher's, of any width.
        scale, teacher_scale: of the logits, already exponentiated.
        with_grad: gradients flow between ranks. Without, they are not those of one process.
    """
    student = clip_logits(image_nD, text_nD, scale, local_loss=True, gather_with_grad=with_grad)
    teacher = clip_logits(taught.image_ND, taught.text_ND, teacher_scale, local_loss=True, gather_with_grad=False)
    by_image, by_text = (affinity_cross_entropy(ours_nN, theirs_nN) for ours_nN, theirs_nN in zip(student[:2], teacher[:2], strict=True))
    return Terms(by_image, by_text, symmetric_loss(student))


class TinyClip(nn.Module):
    """The objective. The teacher is no part of its state, which is empty."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.teacher: Teacher | None = None
        self.ancestor = ""

    def start(self, context: TrainContext) -> None:
        """Reads the teacher, gives the student what it inherits, and fixes its scale. A checkpoint that is resumed overwrites the weights.

        Raises ConfigError for a teacher of other token ids, or an ancestor that is not larger in every respect.
        """
        config, student = self.config, context.model
        self.teacher = Teacher.named(config.teacher, context)
        if config.inherit:
            same = config.ancestor is None
            ancestor = self.teacher if same else Teacher.named(str(config.ancestor), context, where="train.objective.ancestor")
            if not (isinstance(student, DualEncoder) and isinstance(ancestor.model, DualEncoder)):
                kinds = f"{type(ancestor.model).__name__} to {type(student).__name__}"
                raise ConfigError.at("These models cannot inherit", "train.objective.inherit", kinds, "two models of open_clip")
            inherit(ancestor.model, student)
            self.ancestor = "" if same else f", {ancestor!r}"
        if config.scale is not None:
            fix_logit_scale(student, config.scale)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`, and its terms `by_image`, `by_text` and `hard` before they are weighed."""
        assert self.teacher is not None, "start() comes first"
        config, taught = self.config, self.teacher(encoded)
        fixed = config.teacher_scale
        teacher_scale = (self.teacher.logit_scale if fixed is None else torch.tensor(fixed)).to(taught.image_ND)
        found = terms(encoded.image_ND, encoded.text_ND, encoded.logit_scale, taught, teacher_scale)
        return {"loss": found.weighed(config.alpha), **{name: part.detach() for name, part in found._asdict().items()}}

    def extra_repr(self) -> str:
        """The settings, and which teacher it is: they name a run's checkpoints."""
        return f"{self.config!r}, {self.teacher!r}{self.ancestor}"


class Config(BaseConfig):
    """TinyCLIP's affinity mimicking, with inheritance by hand; the defaults are the released ones, less the inheritance."""

    directories: ClassVar[tuple[str, ...]] = ("teacher", "ancestor")

    method: Literal["tinyclip"] = "tinyclip"
    teacher: TeacherName
    alpha: float = Field(1.0, ge=0, le=1, description="share of the affinity term; the rest is CLIP's own loss")
    scale: float | None = Field(50.0, ge=1, le=MAX_SCALE, description="the student's logit scale, for good; null: learnt, as CLIP's is")
    teacher_scale: float | None = Field(50.0, ge=1, le=MAX_SCALE, description="the teacher's logit scale; null: its own")
    inherit: bool = Field(
        False, description="the student begins with slices of the teacher's weights, whatever it was to begin with; a resumed run goes on"
    )
    ancestor: TeacherName | None = Field(None, description="what is inherited from; null: the teacher")

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.ancestor is not None and not self.inherit:
            raise ValueError("ancestor says what is inherited from; set inherit=true")
        return self

    def build(self) -> TinyClip:
        """The objective."""
        return TinyClip(self)
