"""The same two batches through an objective on one process and on several: values, averaged gradients and state must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import whole_models
from torch import Tensor, nn
from worlds import WIDTH, WORDS, Vectors

from diptych.core import catalogue
from diptych.core.points import Encoded, TrainContext
from diptych.models.tokenizer import Tokenizer
from diptych.objectives.teacher import Teacher

NAMES = {0: "cat", 1: "dog", 2: "owl", 3: "fox"}
ROWS = 8
Settings = Mapping[str, Any]
Case = tuple[Settings, float | None]
"""An objective's parameters, and the logit bias of the model, if it has one."""


class Scaled(Vectors):
    """The encoder of vectors with a logit scale, and a bias if asked for; it takes CLIP's tokens, of which many share a row."""

    def __init__(self, seed: int = 0, scale: float = 4.0, bias: float | None = None) -> None:
        super().__init__(seed)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def encode_text(self, text_NL: Tensor, normalize: bool = True) -> Tensor:
        return super().encode_text(torch.where(text_NL > 0, 1 + text_NL % (WORDS - 1), 0), normalize)


def context(model: nn.Module, rank: int = 0, world: int = 1) -> TrainContext:
    return TrainContext(model, Tokenizer(16), rows=40, class_names=NAMES, total_steps=10, rank=rank, world=world, seed=3)


def batch(rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Pairs whose sides have something in common, with labels and a further caption each."""
    generator = torch.Generator().manual_seed(seed)
    texts = {name: torch.randint(1, WORDS, (rows, 5), generator=generator) for name in ("text_NL", "synthetic_NL", "text1_NL")}
    return {
        "image_NCHW": torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64),
        "label_N": torch.arange(rows) % len(NAMES),
        "row_N": torch.arange(rows),
        **{f"teacher_{name}_NKD": taught(rows, generator) for name in ("image", "text", "synthetic")},
        **texts,
    }


def taught(rows: int, generator: torch.Generator) -> Tensor:
    """Features of two teachers of other widths, as they are stored: `[N, 2, D]`, half precision, the narrower one's padded."""
    feature_NKD = torch.randn(rows, 2, 6, generator=generator, dtype=torch.float64)
    feature_NKD[:, 0, 4:] = 0
    return nn.functional.normalize(feature_NKD, dim=2).half().float()


def encoded(model: Scaled, tensors: Mapping[str, Tensor], step: int = 0) -> Encoded:
    image_ND, text_ND = model.encode_image(tensors["image_NCHW"]), model.encode_text(tensors["text_NL"])
    return Encoded(image_ND, text_ND, model.logit_scale.exp(), tensors, model, step)


def built(settings: Settings) -> nn.Module:
    """The objective of some parameters, by way of the catalogue."""
    config: Any = catalogue.config_class(catalogue.find(str(settings["method"]), "objective")).parse(dict(settings))
    made: nn.Module = config.build()
    return made


def started(settings: Settings, rank: int = 0, world: int = 1, bias: float | None = None) -> tuple[Any, Scaled]:
    """An objective after its `start`, and its model, both in double precision. A teacher's name is overridden by a small world's."""
    torch.manual_seed(0)
    model = Scaled(bias=bias).double()
    objective: Any = built(settings)
    if hasattr(objective, "start"):
        with mock.patch.object(Teacher, "named", lambda name, *_, **__: Teacher(Scaled(seed=9, scale=6.0).double(), name)):
            objective.start(context(model, rank, world))
    return objective.double(), model


def on_a_rank(rank: int, world: int, cases: Sequence[Case], rows: int = ROWS) -> list[dict[str, Any]]:
    """Of each case two updates' losses, the second's gradients and the state after it."""
    results = []
    for settings, bias in cases:
        if settings["method"] in whole_models.METHODS:
            results.append(whole_models.on_a_rank(rank, world, settings))
            continue
        objective, model = started(settings, rank, world, bias)
        losses = []
        for step in range(2):
            model.zero_grad()
            objective.zero_grad()
            own = {name: value.chunk(world)[rank] for name, value in batch(rows, seed=step).items()}
            parts = objective(encoded(model, own, step))
            parts["loss"].backward()
            losses.append(parts["loss"].detach())
        results.append({"losses": torch.stack(losses), "grads": whole_models.gradients(model, objective), "state": objective.state_dict()})
    return results
