"""CLIP-rocket: all objectives on one process and on several, the assignments, the momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import Tensor, nn

from diptych.objectives.clip_rocket import Config, Sides, barlow, contrast, siamese, sinkhorn, swapped
from diptych.objectives.projectors import follow

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*",)

TOLERANCE: dict[str, tuple[float, float]] = {"*": (1e-9, 1e-12)}

NAMES = ("image", "text", "image0", "image1", "text0", "text1")
EXTRAS = ("barlip", "siamlip", "byolip", "swalip")
USES = {"barlip": "v", "siamlip": "vp", "byolip": "pw", "swalip": ""}
PREFIX = {"v": "v_", "p": "p_", "w": "vm_"}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    given = {name.removeprefix("all/in/"): np.asarray(vectors[name]) for name in vectors if name.startswith("all/in/")}
    ranks = run_ranks(int(given["world_size"]), on_a_rank, given)
    outputs: dict[str, Any] = {}
    for case in ("clip", "noaug", "cl2l", *EXTRAS):
        single = measured(case, given, gathered=True)
        outputs |= {f"{case}/out/{name}": value for name, value in single.items()}
        outputs[f"{case}/out/rank_loss"] = np.stack([each[case]["loss"] for each in ranks])
        for name in single:
            if name.startswith("grad_") and "scale" not in name:
                outputs[f"{case}/out/rank_{name}"] = np.concatenate([each[case][name] for each in ranks])
    similarity = torch.tensor(np.asarray(vectors["sinkhorn/in/similarity"])).double()
    outputs["sinkhorn/out/assignment"] = sinkhorn(similarity, float(given["sinkhorn_epsilon"]), int(given["sinkhorn_iters"])).numpy()
    outputs["ema/out/trace"] = momentum(*(torch.tensor(np.asarray(vectors[f"ema/in/{name}"])) for name in ("init", "online", "tau")))
    return outputs


def on_a_rank(rank: int, world: int, given: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    own = {name: np.split(value, world)[rank] if value.ndim == 2 else value for name, value in given.items()}
    return {case: measured(case, own, gathered=False) for case in ("clip", "noaug", "cl2l", *EXTRAS)}


def momentum(start: Tensor, online: Tensor, tau: Tensor) -> Array:
    """A module's parameter that follows another's."""
    slow, fast = nn.Linear(len(start), 1, bias=False).double(), nn.Linear(len(start), 1, bias=False).double()
    rows = []
    with torch.no_grad():
        slow.weight[0] = start
        for row in online:
            fast.weight[0] = row
            follow(slow, fast, float(tau))
            rows.append(slow.weight[0].clone())
    return torch.stack(rows).numpy()


def sides(given: Mapping[str, Tensor], prefix: str) -> Sides:
    image, text, *views = (given[prefix + name] for name in NAMES)
    return Sides(image, text, tuple(views[:2]), tuple(views[2:]))


def measured(case: str, inputs: Mapping[str, Array], *, gathered: bool) -> dict[str, Array]:
    """Loss, parts and raw gradients of this process; `gathered`: gradients flow between ranks."""
    config = settings(case, inputs, gathered)
    leaves = {name: torch.tensor(value).double().requires_grad_() for name, value in inputs.items() if value.ndim == 2 or "log_" in name}
    scales = leaves["log_scale"].exp(), leaves["local_log_scale"].exp()
    plain = Sides(leaves["z_image"], leaves["z_text"])
    views = (
        [tuple(leaves[f"h_{side}{view}"] for view in range(2)) for side in ("image", "text")] if case not in ("clip", "noaug") else [(), ()]
    )
    strong = Sides(plain.image, plain.text, *views)
    found = contrast(plain, strong, *scales, config.smoothing, config.gather_with_grad)
    objective = config.build()
    loss = found.loss if case == "clip" else objective.reduced(found)
    parts = {"clip_loss": found.loss}
    if case != "clip":
        parts |= {"clip_loss_image": found.image, "clip_loss_text": found.text}
    if found.images is not None and found.texts is not None:
        parts |= {"clip_loss_image_local": found.images, "clip_loss_text_local": found.texts}
    if case in EXTRAS:
        extra = other(config, leaves, strong, scales[1])
        loss = loss + objective.weight * extra
        parts["siamlip_loss" if case == "byolip" else f"{case}_loss"] = extra
    used = ["z_image", "z_text", *(f"h_{name}" for name in NAMES[2:] if views[0])]
    used += [PREFIX[kind] + name for kind in USES.get(case, "") for name in NAMES]
    names = [*used, "log_scale", "local_log_scale"]
    grads = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True, materialize_grads=True)
    values = {"loss": loss, **{f"part_{name}": part for name, part in parts.items()}}
    values |= {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {name: value.detach().numpy() for name, value in values.items()}


def settings(case: str, inputs: Mapping[str, Array], gathered: bool) -> Config:
    return Config(
        extra=case if case in EXTRAS else "none",  # type: ignore[arg-type]
        smoothing=0.0 if case == "swalip" else float(inputs["label_smoothing"]),
        reduction=str(inputs["reduction"]),  # type: ignore[arg-type]
        barlip_weight=float(inputs["barlip_scale"]),
        barlip_off_diagonal=float(inputs["barlip_lambda"]),
        swalip_weight=float(inputs["swalip_weight"]),
        epsilon=float(inputs["sinkhorn_epsilon"]),
        iterations=int(inputs["sinkhorn_iters"]),
        gather_with_grad=gathered,
    )


def other(config: Config, leaves: Mapping[str, Tensor], strong: Sides, scale: Tensor) -> Tensor:
    """The non-contrastive loss of a case."""
    if config.extra == "swalip":
        return swapped(strong, scale, config.epsilon, config.iterations, config.gather_with_grad)
    if config.extra == "barlip":
        return barlow(sides(leaves, "v_"), config.barlip_weight, config.barlip_off_diagonal, config.gather_with_grad)
    return siamese(sides(leaves, "p_"), sides(leaves, "vm_" if config.extra == "byolip" else "v_"))
