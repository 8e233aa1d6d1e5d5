"""A frozen teacher: a dual encoder that an objective listens to and never trains.

It is no `nn.Module`, on purpose: an objective that keeps one as an attribute does not own its weights, so they are neither trained, nor
broadcast, nor saved in checkpoints, nor put into training mode. They follow from the teacher's name, which is in the objective's settings;
the digest tells whether what lies under that name is still the same.

Shape legend: N pairs on this rank, C H W a picture, L tokens, D feature width of the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diptych.core import digest
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, Tower, TrainContext
from diptych.models import architectures
from diptych.models.tokenizer import Tokenizer

HUB, LOCAL_DIR = "open_clip:", "local-dir:"
BOTH: tuple[Tower, ...] = ("image", "text")
WHERE = "train.objective.teacher"
TOKENIZER_KEYS = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "context_length")
"""What decides, in an open_clip text configuration, which ids a caption gets."""


def _trained(name: str) -> str:
    if name in architectures.files() and not Path(name).is_dir():
        raise ValueError(f"{name} is an architecture, whose weights are random; name a model directory or open_clip:ARCHITECTURE/TAG")
    return name


TeacherName = Annotated[
    str, AfterValidator(_trained), Field(min_length=1, description="the teacher: a model directory, or `open_clip:ARCHITECTURE/TAG`")
]
"""The type of a parameter that names a teacher; list the parameter in its `Config.directories`."""


class Taught(NamedTuple):
    """A teacher's view of a batch: features `[N, D]` of unit norm, detached, float32 at least; `[0, 0]` of a tower it does not use."""

    image_ND: Tensor
    text_ND: Tensor


class Teacher:
    """A dual encoder in evaluation mode whose weights require no gradients.

    Args:
        model: as `models.clip.DualEncoder`; it is frozen in place.
        name: how errors and figures call it.
        towers: what will be asked of it.

    Attributes:
        logit_scale: scalar, exponentiated.
        digest: of its configuration and its weights; put it into the objective's `extra_repr`, which names a run's checkpoints.
    """

    def __init__(self, model: nn.Module, name: str, towers: Sequence[Tower] = BOTH) -> None:
        self.model = cast(Any, model.eval().requires_grad_(False))
        self.name, self.towers = name, tuple(towers)
        self.logit_scale: Tensor = self.model.logit_scale.detach().exp()
        self.digest = _digest(model)

    @classmethod
    def named(cls, name: str, context: TrainContext, towers: Sequence[Tower] = BOTH, where: str = WHERE) -> Teacher:
        """The teacher of a name (see `TeacherName`) for a student.

        Args:
            name: a model directory, with or without `local-dir:` before it, or `open_clip:ARCHITECTURE/TAG`.
            context: tells the student's tokenizer and the device.
            towers: what will be asked of it; without `"text"` tokenizers may differ.
            where: the parameter's key, for errors.

        Raises ConfigError for a name that is neither, and if the student's token ids mean something else to the teacher's text tower;
        DataError if its weights cannot be had.
        """
        from diptych.models import clip

        if not name.startswith(HUB) and not Path(name.removeprefix(LOCAL_DIR)).is_dir():
            raise ConfigError.at("There is no such teacher", where, name, "a model directory, or open_clip:ARCHITECTURE/TAG")
        model = clip.create(name, context.seed)
        if "text" in towers:
            _require_same_ids(context, model, name, where)
        return cls(model.to(context.device), name, towers)

    @classmethod
    def of_start(cls, context: TrainContext, towers: Sequence[Tower] = BOTH) -> Teacher:
        """A frozen copy of the model as training starts: after a resume still that one, since a run starts from what it started from."""
        return cls(copy.deepcopy(context.model), "init", towers)

    def __call__(self, encoded: Encoded) -> Taught:
        """What the teacher makes of the batch's own pictures and captions."""
        batch, empty = encoded.batch, torch.empty(0, 0)
        image_ND = self.encode_image(batch["image_NCHW"], encoded) if "image" in self.towers else empty
        text_ND = self.encode_text(batch["text_NL"], encoded) if "text" in self.towers else empty
        return Taught(image_ND, text_ND)

    def encode_image(self, image_NCHW: Tensor, encoded: Encoded | None = None, normalize: bool = True) -> Tensor:
        """Features of pictures uint8 `[N, 3, H, W]` of any size; another size than the teacher's own is resized to that.

        `encoded` tells the loop's precision and micro-batches; without it: float32, all at once.
        """
        return self._encode(lambda part: self.model.encode_image(self.resized(part), normalize=normalize), image_NCHW, encoded)

    def encode_text(self, text_NL: Tensor, encoded: Encoded | None = None, normalize: bool = True) -> Tensor:
        """Features of captions in the student's token ids, which are the teacher's own."""
        return self._encode(lambda part: self.model.encode_text(part, normalize=normalize), text_NL, encoded)

    @torch.no_grad()
    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor, encoded: Encoded | None) -> Tensor:
        loop = None if encoded is None else encoded.encoder
        bf16, parts = getattr(loop, "precision", "fp32") == "bf16", getattr(loop, "accumulate", 1)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=bf16):
            feature_ND = torch.cat([encode(part) for part in inputs.chunk(parts)])
        return feature_ND.to(torch.promote_types(feature_ND.dtype, torch.float32))

    def resized(self, image_NCHW: Tensor) -> Tensor:
        """The pictures in the teacher's size, antialiased, in whole grey levels as a decoder gives them."""
        size = getattr(self.model, "image_size", None)
        if size is None or image_NCHW.shape[-1] == size:
            return image_NCHW
        assert image_NCHW.dtype == torch.uint8, "pictures are normalised by the teacher, with its own mean"
        mode = self.model.preprocess_cfg["interpolation"]
        resized_NCHW = interpolate(image_NCHW.float(), (size, size), mode=mode, antialias=True, align_corners=False)
        return resized_NCHW.round_().clamp_(0, 255).to(torch.uint8)

    def __repr__(self) -> str:
        return f"Teacher({self.name!r}, {digest.short(self.digest)})"


def _require_same_ids(context: TrainContext, teacher: Any, name: str, where: str) -> None:
    """Refuses a teacher to whom the student's token ids mean something else, or whose context is too short for them."""
    own, other = context.tokenizer, teacher.tokenizer
    if isinstance(own, Tokenizer) and isinstance(other, Tokenizer):
        if other.context_length < own.context_length:
            got, expected = f"{name}: {other.context_length} tokens", f"at least the student's {own.context_length}"
            raise ConfigError.at("The teacher's context is shorter than the student's", where, got, expected, "choose another teacher")
        return
    student: Any = context.model
    configs = [model.config.get("text_cfg", {}) if hasattr(model, "config") else None for model in (student, teacher)]
    settings = [None if config is None else {key: config.get(key) for key in TOKENIZER_KEYS} for config in configs]
    if type(own) is not type(other) or settings[0] != settings[1]:
        got, expected = f"{name}: {type(other).__name__} {settings[1]}", f"the student's {type(own).__name__} {settings[0]}"
        fix = "choose a teacher of the student's tokenizer, or an objective that asks for the image tower alone"
        raise ConfigError.at("The teacher reads other token ids than the student", where, got, expected, fix)


def _digest(model: nn.Module) -> str:
    """The digest of a model: its configuration and every tensor of its state."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(model.state_dict().items())}
    raw = {name: digest.of_bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, tensor in state.items()}
    tensors = [[name, str(tensor.dtype), list(tensor.shape), raw[name]] for name, tensor in state.items()]
    return digest.of_plain([dict(getattr(model, "config", {})), tensors])
