"""DC-CLIP, first stage: each tower of a small student learns a large teacher's feature maps, by itself, without pairs being compared.

Zhang et al., "DC-CLIP: Multilingual CLIP Compression via Vision-language Distillation and Vision-language Alignment" (Pattern Recognition 2025,
arXiv 2404.11249), section 3. The second stage is the objective `clip` on pairs in both languages, started from what this one left
(`train.init`), with a fresh optimizer and a lower rate. Captions in two languages are captions of one pair, drawn anew each visit.

No official code exists. Where the source is silent: class tokens are left out and a student's map is resized to the teacher's; maps and
features are compared as they are, not normalised; the projected features are matched too, so that both students share the teacher's space when
the second stage begins; padded tokens do not count. The adapters widen the student, never the teacher, and are no part of the saved model.

Shape legend: N pairs on this rank, C h w a feature map, L tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate, smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, Tower, TrainContext
from diptych.models.maps import image_map, text_tokens
from diptych.objectives.gather import gather, world_size
from diptych.objectives.teacher import Teacher, TeacherName

TOWERS: dict[str, tuple[Tower, ...]] = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}


class Seen(NamedTuple):
    """A tower's view of a batch: what its last block gave, and its features `[N, D]`; which tokens count, bool `[N, L]`, of text."""

    inner: Tensor
    feature_ND: Tensor
    real_NL: Tensor | None = None


def map_loss(student_NChw: Tensor, teacher_NChw: Tensor, adapter: nn.Module, beta: float) -> Tensor:
    """Smooth L1 of the adapted student's map to the teacher's, the mean over all elements; the student's map is resized to the teacher's grid.

    Args:
        student_NChw, teacher_NChw: maps; the teacher's without gradient.
        adapter: a 1 x 1 convolution from the student's channels to the teacher's.
        beta: where the square ends and the line begins, > 0.
    """
    if student_NChw.shape[-2:] != teacher_NChw.shape[-2:]:
        student_NChw = interpolate(student_NChw, teacher_NChw.shape[-2:], mode="bilinear", align_corners=False)
    return smooth_l1_loss(adapter(student_NChw), teacher_NChw, beta=beta)


def token_loss(student_NLC: Tensor, teacher_NLC: Tensor, adapter: nn.Module, beta: float, real_NL: Tensor | None = None) -> Tensor:
    """Smooth L1 of the adapted student's tokens to the teacher's, the mean over all elements of real tokens.

    Summed over this rank and divided by the mean count of the ranks, so that the average over ranks is the mean over the global batch.

    Args:
        student_NLC, teacher_NLC: tokens of the same ids; the teacher's without gradient.
        adapter: a linear layer from the student's width to the teacher's.
        beta: where the square ends and the line begins, > 0.
        real_NL: bool, which tokens count; None: all of them.
    """
    loss_NLC = smooth_l1_loss(adapter(student_NLC), teacher_NLC, beta=beta, reduction="none")
    if real_NL is None:
        return loss_NLC.mean()
    count = gather(real_NL.sum().reshape(1, 1).float(), with_grad=False).sum().to(loss_NLC) / world_size()
    return loss_NLC[real_NL].sum() / (count * loss_NLC.shape[-1]).clamp(min=1)


class DcClip(nn.Module):
    """The objective of the first stage. State: the adapters."""

    encodes: ClassVar[tuple[Tower, ...]] = ()
    whole_weights = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.teacher: Teacher | None = None
        self.adapters = nn.ModuleDict()

    def start(self, context: TrainContext) -> None:
        """Reads the teacher and makes the adapters for both models' widths.

        Raises ConfigError for a teacher of other token ids, or of another feature width while features are matched.
        """
        towers = TOWERS[self.config.towers]
        self.teacher = Teacher.named(self.config.teacher, context, towers)
        for tower in towers:
            student, teacher = (self._probe(model, tower, context) for model in (context.model, self.teacher.model))
            if self.config.pooled > 0 and student.feature_ND.shape[1] != teacher.feature_ND.shape[1]:
                raise ConfigError.at(
                    "The student's features are not as wide as the teacher's", "train.model", student.feature_ND.shape[1],
                    f"embed_dim {teacher.feature_ND.shape[1]}, the teacher's", "or set objective.pooled=0",
                )  # fmt: skip
            widths = student.inner.shape[1 if tower == "image" else -1], teacher.inner.shape[1 if tower == "image" else -1]
            adapter: nn.Module = nn.Conv2d(*widths, kernel_size=1) if tower == "image" else nn.Linear(*widths)
            self.adapters[tower] = adapter.to(context.device)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`, and of each tower `<tower>_map` and `<tower>_pooled`, before they are weighed."""
        assert self.teacher is not None, "start() comes first"
        config, parts, loss = self.config, {}, torch.zeros((), device=encoded.logit_scale.device)
        for tower in TOWERS[config.towers]:
            student, teacher = self._students(tower, encoded), self._teachers(tower, encoded)
            if tower == "image":
                inner = map_loss(student.inner, teacher.inner, self.adapters[tower], config.beta)
            else:
                inner = token_loss(student.inner, teacher.inner, self.adapters[tower], config.beta, student.real_NL)
            loss = loss + inner
            parts[f"{tower}_map"] = inner.detach()
            if config.pooled > 0:
                pooled = smooth_l1_loss(student.feature_ND, teacher.feature_ND, beta=config.beta)
                loss = loss + config.pooled * pooled
                parts[f"{tower}_pooled"] = pooled.detach()
        return {"loss": loss, **parts}

    def _students(self, tower: Tower, encoded: Encoded) -> Seen:
        """The student's view with gradient, in the loop's precision and micro-batches, of which only what is seen is kept."""
        model: Any = encoded.model
        parts = getattr(encoded.encoder, "accumulate", 1)
        see = _of_image if tower == "image" else _of_text
        inputs = encoded.batch["image_NCHW" if tower == "image" else "text_NL"]
        with _precision(encoded, inputs):
            if parts == 1:
                return _floats(see(model, inputs))
            return _joined([_floats(checkpoint(see, model, part, use_reentrant=False)) for part in inputs.chunk(parts)])

    @torch.no_grad()
    def _teachers(self, tower: Tower, encoded: Encoded) -> Seen:
        assert self.teacher is not None
        parts, model = getattr(encoded.encoder, "accumulate", 1), self.teacher.model
        inputs = encoded.batch["image_NCHW" if tower == "image" else "text_NL"]
        see: Callable[[Tensor], Seen] = (
            (lambda part: _of_image(model, self.teacher.resized(part))) if tower == "image" else (lambda part: _of_text(model, part))  # type: ignore[union-attr]
        )
        with _precision(encoded, inputs):
            return _joined([_floats(see(part)) for part in inputs.chunk(parts)])

    def _probe(self, model: Any, tower: Tower, context: TrainContext) -> Seen:
        """What a tower gives for one pair of nothing."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if tower == "image":
                    size = model.image_size
                    return _of_image(model, torch.zeros((1, 3, size, size), dtype=torch.uint8, device=context.device))
                return _of_text(model, torch.from_numpy(context.tokenizer.encode_cut(["a"])).to(context.device))
        finally:
            model.train(training)

    def extra_repr(self) -> str:
        """The settings, and which teacher it is: they name a run's checkpoints."""
        return f"{self.config!r}, {self.teacher!r}"


def _of_image(model: Any, image_NCHW: Tensor) -> Seen:
    return Seen(*image_map(model, image_NCHW))


def _of_text(model: Any, text_NL: Tensor) -> Seen:
    return Seen(*text_tokens(model, text_NL))


def _precision(encoded: Encoded, inputs: Tensor) -> torch.autocast:
    bf16 = getattr(encoded.encoder, "precision", "fp32") == "bf16"
    return torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=bf16)


def _floats(seen: Seen) -> Seen:
    inner, feature_ND = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (seen.inner, seen.feature_ND))
    return Seen(inner, feature_ND, seen.real_NL)


def _joined(seen: list[Seen]) -> Seen:
    masks = [each.real_NL for each in seen if each.real_NL is not None]
    inner, feature_ND = torch.cat([each.inner for each in seen]), torch.cat([each.feature_ND for each in seen])
    return Seen(inner, feature_ND, torch.cat(masks) if masks else None)


class Config(BaseConfig):
    """DC-CLIP's distillation of feature maps."""

    directories: ClassVar[tuple[str, ...]] = ("teacher",)

    method: Literal["dc-clip"] = "dc-clip"
    teacher: TeacherName
    towers: Literal["both", "image", "text"] = Field("both", description="which towers are distilled; each is by itself")
    beta: float = Field(1.0, gt=0, description="smooth L1: differences below it count as squares, in units of the teacher's features")
    pooled: float = Field(1.0, ge=0, description="weight of the same loss on the projected features; 0: maps alone, and widths may differ")

    def build(self) -> DcClip:
        """The objective."""
        return DcClip(self)
