"""A whole dual encoder, small and in double precision, for objectives that look into its towers or want several views."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diptych.core import catalogue
from diptych.core.points import Encoded, TrainContext, Wants
from diptych.models import clip
from diptych.models.clip import DualEncoder
from diptych.models.tokenizer import Tokenizer

METHODS = ("a-clip", "lightclip", "clip-rocket")
"""Objectives that are tested on it."""

SIDE, ROWS = 16, 8
CAPTIONS = (
    "a red cross",
    "blue disc",
    "a small green square on white",
    "one dot",
    "two grey lines",
    "a red square",
    "the star",
    "a blue cross",
)
CONFIG: dict[str, Any] = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 8, "head_width": 4, "patch_size": 4, "mlp_ratio": 1.0},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2, "mlp_ratio": 1.0},
}


@cache
def _built(seed: int) -> DualEncoder:
    torch.manual_seed(seed)
    return clip.build(CONFIG).double()


def model(seed: int = 0) -> DualEncoder:
    return deepcopy(_built(seed))


def context(model: DualEncoder, rank: int = 0, world: int = 1, total_steps: int = 10) -> TrainContext:
    return TrainContext(
        model, model.tokenizer, rows=40, class_names={}, total_steps=total_steps, rank=rank, world=world, seed=3,
        captions=lambda: [[text] for text in CAPTIONS],
    )  # fmt: skip


def started(settings: Mapping[str, Any], rank: int = 0, world: int = 1, total_steps: int = 10) -> tuple[Any, DualEncoder]:
    """The objective of some parameters after its `start`, and its model."""
    config: Any = catalogue.config_class(catalogue.find(str(settings["method"]), "objective")).parse(dict(settings))
    dual, objective = model(), config.build()
    torch.manual_seed(1)
    objective.start(context(dual, rank, world, total_steps))
    return objective.double(), dual


def batch(rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Pairs with two further views, around which the third lies, and two further captions."""
    generator = torch.Generator().manual_seed(seed)
    names = ("image_NCHW", "view0_NCHW", "view1_NCHW")
    found = {name: torch.randint(0, 256, (rows, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8) for name in names}
    tokenizer = Tokenizer(CONFIG["text_cfg"]["context_length"])
    for shift, name in enumerate(("text_NL", "text1_NL", "text2_NL")):
        found[name] = torch.from_numpy(tokenizer.encode_cut([CAPTIONS[(row + shift) % len(CAPTIONS)] for row in range(rows)]))
    for name in ("image", "view0"):
        place_N2 = torch.randint(4, 8, (rows, 2), generator=generator)
        found[f"{name}_box_N5"] = torch.cat([place_N2, torch.full((rows, 2), 20), torch.arange(rows)[:, None] % 2], dim=1)
    found["view1_box_N5"] = torch.tensor([[3, 2, 28, 30, 0]]).repeat(rows, 1)
    return {**found, "row_N": torch.arange(rows)}


def encoded(dual: DualEncoder, tensors: Mapping[str, Tensor], step: int = 0, wants: Any = None) -> Encoded:
    """What the loop hands over: the features that are asked for."""
    towers = ("image", "text") if wants is None else wants.encodes
    empty = torch.empty(0, 0)
    image_ND = dual.encode_image(tensors["image_NCHW"]) if "image" in towers else empty
    text_ND = dual.encode_text(tensors["text_NL"]) if "text" in towers else empty
    return Encoded(image_ND, text_ND, dual.logit_scale.exp(), tensors, dual, step)


def gradients(dual: nn.Module, objective: nn.Module) -> dict[str, Tensor]:
    """All there are, by name."""
    named = [*dual.named_parameters(), *((f"objective.{name}", value) for name, value in objective.named_parameters())]
    return {name: value.grad for name, value in named if value.grad is not None}


def cut(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """A rank's share; captions are cut to its own longest, as the loader does."""
    own = {name: value.chunk(world)[rank] for name, value in tensors.items()}
    return {name: value[:, : int((value != 0).sum(dim=1).max())] if name.endswith("_NL") else value for name, value in own.items()}


def on_a_rank(rank: int, world: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Two updates' losses, the second's gradients and the state after it; weights move a little in between, the same everywhere."""
    objective, dual = started(settings, rank, world)
    losses = []
    for step in range(2):
        dual.zero_grad()
        objective.zero_grad()
        parts = objective(encoded(dual, cut(batch(seed=step), rank, world), step, Wants.of(objective)))
        parts["loss"].backward()
        losses.append(parts["loss"].detach())
        found = gradients(dual, objective)
        if step == 0:
            with torch.no_grad():
                for parameter in (*dual.parameters(), *objective.parameters()):
                    parameter.mul_(1.01).add_(0.01)
        if hasattr(objective, "after_step"):
            objective.after_step(step + 1, dual)
    return {"losses": torch.stack(losses), "grads": found, "state": objective.state_dict()}
