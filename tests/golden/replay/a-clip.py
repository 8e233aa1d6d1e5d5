"""A-CLIP: which tokens are dropped, maps moved between crops, schedules, and the losses on one process and on several."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import Tensor

from diptych.models.image_tokens import class_attention, gather_tokens
from diptych.objectives.a_clip import Config, momentum_at
from diptych.objectives.token_selection import keep, moved, places
from diptych.train.schedule import laclip_schedule

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*",)

TOLERANCE: dict[str, tuple[float, float]] = {"crop/out/cropped": (0, 1e-6), "*": (1e-9, 1e-12)}

SIDES = ("image", "text", "ssl", "byol", "byol_ema")
HALF = 0.5
"""The share that the cases beside `mask` keep."""


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    given = {name: np.asarray(vectors[name]) for name in vectors}
    return {
        **{f"mask/out/{name}": value for name, value in masked(given).items()},
        **{f"crop/out/{name}": value for name, value in cropped(given).items()},
        **{f"gather/out/{name}": value for name, value in kept(given).items()},
        "attn/out/map": class_attention(list(torch.tensor(given["attn/in/attention"]))).numpy(),
        **{f"sched/out/{name}": value for name, value in schedules(given).items()},
        **{f"loss/out/{name}": value for name, value in losses(given).items()},
    }


def masked(given: Mapping[str, Array]) -> dict[str, Array]:
    attention = torch.tensor(given["mask/in/attention"])
    return {f"masked_ratio{100 * ratio:.0f}": (~keep(attention, ratio)).numpy() for ratio in given["mask/in/ratio"].tolist()}


def box(corners_N4: Array) -> Tensor:
    """Top, left, height, width as ours: left, top, width, height, not mirrored."""
    boxes = torch.tensor(corners_N4)[:, [1, 0, 3, 2]]
    return torch.cat([boxes, torch.zeros_like(boxes[:, :1])], dim=1)


def cropped(given: Mapping[str, Array]) -> dict[str, Array]:
    found = moved(torch.tensor(given["crop/in/attention"]), box(given["crop/in/ema_box"]), box(given["crop/in/view_box"]))
    return {"cropped": found.numpy(), "masked": (~keep(found, HALF)).numpy()}


def kept(given: Mapping[str, Array]) -> dict[str, Array]:
    tokens = gather_tokens(torch.tensor(given["gather/in/tokens"]).double(), places(~torch.tensor(given["gather/in/masked"])))
    return {"kept_sorted_sum": tokens.sum(dim=1).numpy(), "kept_count": np.int64(tokens.shape[1])}  # type: ignore[dict-item]


def schedules(given: Mapping[str, Array]) -> dict[str, Array]:
    names = ("base_lr", "final_lr", "warmup_start_lr", "base_momentum", "epochs", "iters_per_epoch", "warmup_epochs")
    base_lr, final_lr, start_lr, base, epochs, iters, warmup = (given[f"sched/in/{name}"].item() for name in names)
    steps = epochs * iters
    return {
        "momentum": np.array([momentum_at(step, steps, base) for step in range(steps)]),
        "lr": laclip_schedule(base_lr, final_lr, epochs, iters, warmup, start_lr),
    }


def losses(given: Mapping[str, Array]) -> dict[str, Array]:
    """Both variants: `code` compares the first view with itself, as was released."""
    inputs = {side: given[f"loss/in/{side}"] for side in (*SIDES, "log_scale")}
    temperature, world = float(given["loss/in/simclr_temperature"]), int(given["loss/in/world_size"])
    found: dict[str, Array] = {}
    for name, twice in (("paper", False), ("code", True)):
        found |= {f"{name}_{key}": value for key, value in measured(inputs, temperature, twice).items()}
        ranks = run_ranks(world, on_a_rank, inputs, temperature, twice)
        found[f"{name}_rank_loss"] = np.stack([each["loss"] for each in ranks])
        for side in ("image", "text", "ssl", "byol"):
            views = 1 if side == "text" else 2
            grads = [np.split(each[f"grad_{side}"], views) for each in ranks]
            found[f"{name}_rank_grad_{side}"] = np.concatenate([each[view] for view in range(views) for each in grads])
    return found


def on_a_rank(rank: int, world: int, inputs: Mapping[str, Array], temperature: float, twice: bool) -> dict[str, Array]:
    """Each rank holds the same part of both views."""
    own = dict(inputs)
    for side in SIDES:
        views = 1 if side in ("text", "byol_ema") else 2
        own[side] = np.concatenate([np.split(view, world)[rank] for view in np.split(inputs[side], views)])
    return measured(own, temperature, twice)


def measured(inputs: Mapping[str, Array], temperature: float, twice: bool) -> dict[str, Array]:
    """Loss, parts and raw gradients of this process."""
    objective = Config(simclr_temperature=temperature).build()
    tensors = {side: torch.tensor(inputs[side]).double().requires_grad_() for side in (*SIDES, "log_scale")}
    first_ssl, second_ssl = tensors["ssl"].chunk(2)
    ssl = torch.cat([first_ssl, first_ssl if twice else second_ssl])
    parts = objective.parts(tensors["image"], tensors["text"], ssl, tensors["byol"], tensors["byol_ema"], tensors["log_scale"].exp())
    loss = objective.total(parts)
    leaves = [tensors[side] for side in (*SIDES[:-1], "log_scale")]
    grads = dict(zip((*SIDES[:-1], "log_scale"), torch.autograd.grad(loss, leaves), strict=True))
    found = {"loss": loss, "contrast_view1": parts.contrast[0], "contrast_view2": parts.contrast[1], "simclr": parts.simclr}
    found |= {"byol": parts.byol, **{f"grad_{side}": grad for side, grad in grads.items()}}
    return {name: value.detach().numpy() for name, value in found.items()}
