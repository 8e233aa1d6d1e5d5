"""VR-LwF: new classes are learnt while the similarity of their pictures to random token sequences is kept as the model had it before.

Ding et al., "Don't Stop Learning: Towards Continual Learning for the CLIP Model" (2022), sections 3.2 and 3.3. The "replayed vocabulary"
needs no old data. One training is one session; of several in a row each starts from the model of the one before, which is its teacher, and
names the classes that came earlier. The variant `zscl` is the baseline of that name in Zheng et al., "Preventing Zero-Shot Transfer
Degradation in Continual Learning of Vision-Language Models" (ICCV 2023), which differs in almost every detail.

Shape legend: N pictures on this rank, C classes, P sentences, L tokens, D feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models.tokenizer import EOT, SOT, Tokenizer
from diptych.objectives.distillation import divergence
from diptych.objectives.gather import gather, world_size
from diptych.objectives.prompts import ClassPrompts, Templates
from diptych.objectives.teacher import Teacher, TeacherName

FIRST_EXCLUDED = SOT - 1
"""Ids of random words lie below it; the released code leaves out the last word of the vocabulary with the two special ids."""
ZSCL_TEMPERATURE, ZSCL_SMOOTHING = 2.0, 0.2

Replayed = Literal["vocabulary", "classes"]


class Features(NamedTuple):
    """What one model makes of a batch, of unit norm: its pictures `[N, D]`, the class prompts `[C, D]`, the random sentences `[P, D]`."""

    image_ND: Tensor
    class_CD: Tensor
    pseudo_PD: Tensor


def pseudo_sentences(draw_PL: NDArray[np.int64], sot: int = SOT, eot: int = EOT) -> NDArray[np.int64]:
    """Sentences of random ids: the first becomes the start token, the last the end token, int64 `[P, L]`."""
    text_PL = draw_PL.copy()
    text_PL[:, 0], text_PL[:, -1] = sot, eot
    return text_PL


def soft_cross_entropy(teacher_NP: Tensor, student_NP: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the student's softmaxes against the teacher's, both softened, times the temperature's square (zscl)."""
    return cross_entropy(student_NP / temperature, (teacher_NP / temperature).softmax(dim=1)) * temperature**2


def losses(
    student: Features, teacher: Features, scales: tuple[Tensor, Tensor], label_N: Tensor, replay: Collection[Replayed], earlier: int = 0
) -> dict[str, Tensor]:
    """The parts of VR-LwF's loss (equations 2 to 5), scalars of this rank: `supervised`, and a divergence for all that is replayed.

    Args:
        student, teacher: of the same batch; the teacher's carry no gradient.
        scales: the student's and the teacher's logit scale, exponentiated.
        label_N: classes of the pictures, rows of `class_CD` from `earlier` on; below 0 for none, which supervision leaves out.
        replay: what is kept as the teacher has it: similarities to the random sentences, to the class prompts.
        earlier: that many first rows of `class_CD` are of earlier sessions: they are kept, and are no answer to the labels.
    """
    logits_NC = scales[0] * student.image_ND @ student.class_CD.T
    parts = {"supervised": supervised_loss(logits_NC[:, earlier:], label_N - earlier)}
    if "vocabulary" in replay:
        was_NP = scales[1] * teacher.image_ND @ teacher.pseudo_PD.T
        parts["vocabulary"] = divergence(was_NP, scales[0] * student.image_ND @ student.pseudo_PD.T)
    if "classes" in replay:
        parts["classes"] = divergence(scales[1] * teacher.image_ND @ teacher.class_CD.T, logits_NC)
    return parts


def zscl_losses(
    student: Features,
    teacher: Features,
    scale: Tensor,
    label_N: Tensor,
    temperature: float = ZSCL_TEMPERATURE,
    smoothing: float = ZSCL_SMOOTHING,
) -> dict[str, Tensor]:
    """The parts of the variant `zscl`: smoothed `supervised`, and what keeps similarities to the teacher's sentences, by picture (`image`)
    and by sentence, among the pictures of all ranks (`text`). One scale, the teacher's, serves all.
    """
    all_was_ND, all_now_ND = gather(teacher.image_ND, with_grad=False), gather(student.image_ND, with_grad=True)
    was_PN, now_PN = (scale * teacher.pseudo_PD @ all_ND.T for all_ND in (all_was_ND, all_now_ND))
    was_NP, now_NP = (scale * image_ND @ teacher.pseudo_PD.T for image_ND in (teacher.image_ND, student.image_ND))
    return {
        "supervised": supervised_loss(scale * student.image_ND @ student.class_CD.T, label_N, smoothing),
        "image": soft_cross_entropy(was_NP, now_NP, temperature),
        "text": soft_cross_entropy(was_PN, now_PN, temperature),
    }


def supervised_loss(logits_NC: Tensor, label_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy over the labelled pictures; its mean over the ranks is the mean over those of all ranks. Labels below 0 do not count."""
    known_N = label_N >= 0
    labelled = gather(known_N.sum()[None], with_grad=False).sum().clamp(min=1) / world_size()
    target_N = torch.where(known_N, label_N, -1)
    return cross_entropy(logits_NC, target_N, ignore_index=-1, label_smoothing=smoothing, reduction="sum") / labelled


def total(parts: Mapping[str, Tensor], alpha: float) -> Tensor:
    """Supervision plus alpha times everything else."""
    return parts["supervised"] + sum(alpha * part for name, part in parts.items() if name != "supervised")


class VrLwf(nn.Module):
    """The objective. Its teacher is no part of its state: it follows from what the run starts from, or from a name."""

    columns = ("label",)
    encodes = ("image",)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.seed = 0
        self.prompts: ClassPrompts | None = None
        self.teacher: Teacher | None = None
        self._was_CD: Tensor | None = None

    def start(self, context: TrainContext) -> None:
        """Reads the classes and the teacher.

        Raises ConfigError without class names, for an earlier class that is there again, for a tokenizer that is not CLIP's, and for
        sentences that are longer than the context.
        """
        config = self.config
        self.seed = context.seed
        _require_vocabulary(context, config.words)
        again = sorted(set(config.earlier) & set(context.class_names.values()))
        if again:
            raise ConfigError.at(
                "An earlier class is among the new ones", "train.objective.earlier", again[0], "classes without pairs here"
            )
        before = {number - len(config.earlier): name for number, name in enumerate(config.earlier)}
        if context.class_names:
            context = dataclasses.replace(context, class_names={**before, **context.class_names})
        self.prompts = ClassPrompts(context, config.templates).to(context.device)
        self.teacher = Teacher.of_start(context) if config.teacher is None else Teacher.named(config.teacher, context)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss` and its parts, before they are weighed: `supervised`, and `vocabulary` and `classes` where they are replayed."""
        assert self.prompts is not None, "start() comes first"
        assert self.teacher is not None
        config, label_N = self.config, self.prompts.classes(encoded.batch["label_N"])
        student, teacher = self.features(encoded)
        scale = self.teacher.logit_scale.to(student.image_ND)
        if config.variant == "zscl":
            parts = zscl_losses(student, teacher, scale, label_N)
        else:
            parts = losses(student, teacher, (encoded.logit_scale, scale), label_N, config.replay, len(config.earlier))
        return {"loss": total(parts, config.alpha), **{name: part.detach() for name, part in parts.items()}}

    def features(self, encoded: Encoded) -> tuple[Features, Features]:
        """What the student and the teacher make of the batch. Each has its own features of the sentences: the text tower is held, too.

        Without the vocabulary there are no sentences, `[0, D]`.
        """
        assert self.prompts is not None
        assert self.teacher is not None
        image_NCHW, teacher = encoded.batch["image_NCHW"], self.teacher
        class_CD = self.prompts.weights(encoded)
        if self._was_CD is None:
            self._was_CD = self.prompts.weights_of(teacher.encode_text(self.prompts.token_PL, encoded))
        ours_PD, theirs_PD = class_CD[:0], self._was_CD[:0]
        if "vocabulary" in self.config.replay:
            pseudo_PL = torch.from_numpy(self.sentences(encoded.step)).to(image_NCHW.device)
            theirs_PD = teacher.encode_text(pseudo_PL, encoded)
            ours_PD = theirs_PD if self.config.variant == "zscl" else encoded.encode_text(pseudo_PL)
        taught = Features(teacher.encode_image(image_NCHW, encoded), self._was_CD, theirs_PD)
        return Features(encoded.image_ND, class_CD, ours_PD), taught

    def sentences(self, step: int) -> NDArray[np.int64]:
        """The random sentences of a step, int64 `[P, words + 2]`, the same on every rank; the variant `zscl` draws them once."""
        draw = chance.generator(self.seed, "replayed vocabulary", 0 if self.config.variant == "zscl" else step)
        return pseudo_sentences(draw.integers(0, FIRST_EXCLUDED, (self.config.sentences, self.config.words + 2)))

    def extra_repr(self) -> str:
        """The settings, and which teacher it is: they name a run's checkpoints."""
        return f"{self.config!r}, {self.teacher!r}"


def _require_vocabulary(context: TrainContext, words: int) -> None:
    tokenizer = context.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        fix = "choose an architecture with CLIP's tokenizer"
        raise ConfigError.at("There is no vocabulary to draw from", "train.model", type(tokenizer).__name__, "CLIP's tokenizer", fix)
    if words + 2 > tokenizer.context_length:
        longest = f"at most {tokenizer.context_length - 2} between the special tokens"
        raise ConfigError.at("The sentences are longer than the context", "train.objective.words", words, longest)


class Config(BaseConfig):
    """VR-LwF's objective; the defaults are those of the released one-session run. Train it with `train.init`: a model to keep."""

    directories: ClassVar[tuple[str, ...]] = ("teacher",)

    method: Literal["vr-lwf"] = "vr-lwf"
    variant: Literal["vr-lwf", "zscl"] = Field(
        "vr-lwf", description="zscl: sentences drawn once and encoded by the teacher alone, both directions, the teacher's scale"
    )
    replay: tuple[Replayed, ...] = Field(
        ("vocabulary",), description="what is kept: similarities to random sentences, and to class names (LwF); nothing: fine-tuning"
    )
    alpha: float = Field(1.0, ge=0, description="weight of what is kept")
    teacher: TeacherName | None = Field(None, description="model directory or `open_clip:…`; null: the model that training starts from")
    earlier: tuple[str, ...] = Field((), description="class names of earlier sessions, which `classes` keeps too; they are no answers")
    sentences: int = Field(100, ge=1, description="random sentences a step; zscl has 1000")
    words: int = Field(8, ge=1, description="random tokens of a sentence, between the start and the end token; zscl has 10")
    templates: Templates = ("this is a photo of {} in the scene .",)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.replay)) < len(self.replay) or len(set(self.earlier)) < len(self.earlier):
            raise ValueError("replay, earlier: each at most once")
        if self.variant == "zscl" and (self.replay != ("vocabulary",) or self.earlier):
            raise ValueError("the variant zscl replays the vocabulary, and knows no earlier classes")
        if self.earlier and "classes" not in self.replay:
            raise ValueError("earlier classes have no effect unless replay holds classes")
        return self

    def build(self) -> VrLwf:
        """The objective."""
        return VrLwf(self)
