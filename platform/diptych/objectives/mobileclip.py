"""MobileCLIP's loss: a student learns the similarities that several teachers, asked once before training, see in a batch.

Vasu et al., "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training" (CVPR 2024), section 4.1. What the teachers said of the
stored augmentations and of the captions lies in the pair table (`caption/reinforce.py`) and comes with the batch; no teacher runs here.

Each teacher's similarities go through a softmax of their own, and the distributions are averaged: one softmax over joined features is another
loss (`[N, 1, sum of D]`). The released code, with the logits of all ranks on each rank, takes the transposed image target for the text target,
whose rows then do not add up to 1; here each side has its own softmax. `transposed` gives theirs, for comparison.

Shape legend: n pairs on this rank, N pairs in the global batch, K teachers, D feature width, zero-padded where teachers differ.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded
from diptych.objectives.clip import Logits, clip_logits, symmetric_loss
from diptych.objectives.gather import gather

SYNTHETIC = "synthetic"


class Targets(NamedTuple):
    """What the teachers hold likely, `[n, N]`: the text of each picture, and the picture of each text. Rows add up to 1."""

    image: Tensor
    text: Tensor


class Terms(NamedTuple):
    """The losses of one kind of caption, scalars of this rank, in nats."""

    contrastive: Tensor
    distillation: Tensor


def targets(image_nKD: Tensor, text_nKD: Tensor, all_image_NKD: Tensor, all_text_NKD: Tensor, scale_K: Tensor) -> Targets:
    """The mean over teachers of the softmaxes of their scaled similarities, without gradient.

    Args:
        image_nKD, text_nKD: the teachers' features of this rank's queries, each teacher's of unit norm.
        all_image_NKD, all_text_NKD: those of all candidates.
        scale_K: a teacher's factor of its cosines.
    """
    with torch.no_grad():
        sides = ((image_nKD, all_text_NKD), (text_nKD, all_image_NKD))
        logits = [torch.einsum("nkd,mkd->knm", query, key) * scale_K[:, None, None] for query, key in sides]
        return Targets(*(each.softmax(dim=2).mean(dim=0) for each in logits))


def transposed(found: Targets) -> Targets:
    """The targets of the released code where every rank holds all logits: the picture's, transposed, for the text's. For comparison only."""
    return Targets(found.image, found.image.T)


def distillation(student: Logits, found: Targets) -> Tensor:
    """Cross-entropy of the student's softmaxes to the targets, the mean over both directions and this rank's queries, in nats.

    The targets' entropy is not subtracted, so the least value is not 0.
    """
    sides = ((found.image, student.image), (found.text, student.text))
    by_image, by_text = (-(target_nN * log_softmax(logit_nN, dim=1)).sum(dim=1).mean() for target_nN, logit_nN in sides)
    return (by_image + by_text) / 2


def terms(image_nD: Tensor, text_nD: Tensor, logit_scale: Tensor, image_nKD: Tensor, text_nKD: Tensor, scale_K: Tensor) -> Terms:
    """Both losses of this rank's pictures and one kind of their captions, against the candidates of all ranks.

    The mean over ranks is the loss of one process on the global batch, and so is its gradient after it was averaged over ranks.

    Args:
        image_nD, text_nD: the student's features, of unit norm.
        logit_scale: scalar, already exponentiated.
        image_nKD, text_nKD: the teachers' features of the same pictures and captions.
        scale_K: a teacher's factor of its cosines.
    """
    student = clip_logits(image_nD, text_nD, logit_scale, local_loss=True, gather_with_grad=True)
    all_image_NKD, all_text_NKD = gather(torch.cat([image_nKD, text_nKD], dim=2), with_grad=False).chunk(2, dim=2)
    found = targets(image_nKD, text_nKD, all_image_NKD, all_text_NKD, scale_K)
    return Terms(symmetric_loss(student), distillation(student, found))


class MobileClip(nn.Module):
    """The objective. The teachers' features come with the batch (`Wants.reinforced`)."""

    sources: ClassVar[tuple[str, ...]] = (SYNTHETIC,)
    reinforced: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`, and `contrastive` and `distillation`, each the sum over raw and synthetic captions, before they are weighed.

        Raises ConfigError if there are other numbers of teachers and of scales.
        """
        batch, config = encoded.batch, self.config
        dtype = torch.promote_types(encoded.image_ND.dtype, torch.float32)
        image_nKD, *texts = (batch[f"teacher_{name}_NKD"].to(dtype) for name in ("image", "text", SYNTHETIC))
        scale_K = self._scales(image_nKD)
        students = (encoded.text_ND, encoded.encode_text(batch[f"{SYNTHETIC}_NL"]))
        found = [
            terms(encoded.image_ND, text_nD, encoded.logit_scale, image_nKD, text_nKD, scale_K)
            for text_nD, text_nKD in zip(students, texts, strict=True)
        ]
        contrastive, distilled = (torch.stack(parts).sum() for parts in zip(*found, strict=True))
        loss = config.contrastive * contrastive + config.distillation * distilled
        return {"loss": loss, "contrastive": contrastive.detach(), "distillation": distilled.detach()}

    def _scales(self, image_nKD: Tensor) -> Tensor:
        """A factor a teacher."""
        scales, teachers = self.config.teacher_scale, image_nKD.shape[1]
        if len(scales) not in (1, teachers):
            where, expected = "train.objective.teacher_scale", f"one for all teachers, or {teachers}, one each"
            raise ConfigError.at("There are other numbers of scales and of teachers", where, list(scales), expected)
        return image_nKD.new_tensor(scales).expand(teachers)

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


class Config(BaseConfig):
    """MobileCLIP's loss, on pairs that `caption: [{method: reinforce}]` has prepared. Weights of the small models and of the 12M set."""

    method: Literal["mobileclip"] = "mobileclip"
    contrastive: float = Field(0.0, ge=0, description="weight of CLIP's loss, of each kind of caption; 0.25 for ViT-B on a billion pairs")
    distillation: float = Field(1.0, ge=0, description="weight of the cross-entropy to the teachers' similarities; 0.75 there")
    teacher_scale: tuple[float, ...] = Field(
        (100.0,), min_length=1, description="factor of the teachers' cosines: one for all, or one a teacher in their order; (70, 60) in v2"
    )

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.contrastive == self.distillation == 0:
            raise ValueError("without contrastive and distillation nothing is learnt; set a weight")
        if min(self.teacher_scale) <= 0:
            raise ValueError(f"teacher_scale {self.teacher_scale} must be above 0")
        return self

    def build(self) -> MobileClip:
        """The objective."""
        return MobileClip(self)
