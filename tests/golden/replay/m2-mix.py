"""m2-Mix: slerp, the mixed losses, soft targets, and the three figures of how features lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.evaluate.alignment import distances, relative_distances, uniformity
from diptych.objectives.m2_mix import Config, mixed_target_loss, slerp

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*",)

TOLERANCE: dict[str, tuple[float, float]] = {
    "metric/out/uniformity": (1e-5, 0),  # computed in float32 there
    "slerp/*": (1e-6, 1e-9),  # one row is nearly parallel
    "*": (1e-8, 1e-12),
}

EVERY = {"multimodal": "mm", "visual": "v", "language": "l", "joint": "vl"}
KINDS = {"plain": "", "m2": "multimodal", "m2_shared_tau": "multimodal", "v": "visual", "l": "language", "vl": "joint"}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    sections = {"mix": mixes, "slerp": slerps, "target": target, "metric": metric}
    outputs: dict[str, Any] = {}
    for name, section in sections.items():
        outputs |= {f"{name}/out/{key}": value for key, value in section(vectors).items()}
    return {key: value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value) for key, value in outputs.items()}


def tensor(vectors: Mapping[str, Array], name: str) -> Tensor:
    return torch.tensor(np.asarray(vectors[name])).double()


def mixes(vectors: Mapping[str, Array]) -> dict[str, Any]:
    given = {key: float(vectors[f"mix/in/{key}"]) for key in ("tau", "tau2", *(f"w_{short}" for short in EVERY.values()))}
    outputs: dict[str, Any] = {}
    for name in (*KINDS, "m3", "m3_original_neg", "m3_late"):
        kinds = [kind for kind in EVERY if kind == KINDS.get(name, kind)]
        config = Config(
            tau=given["tau"],
            tau2=None if name == "m2_shared_tau" else given["tau2"],
            **{kind: given[f"w_{short}"] if kind in kinds else 0.0 for kind, short in EVERY.items()},
            original_negatives=name == "m3_original_neg",
        )
        epoch = int(vectors["mix/in/epoch_late"]) if name == "m3_late" else 0
        image, text = (tensor(vectors, f"mix/in/{side}").requires_grad_() for side in ("image", "text"))
        objective = config.build()
        parts = objective.terms(image, text, torch.tensor(1 / given["tau"], dtype=torch.float64), shares(vectors, kinds))
        loss = objective.total(parts, epoch)
        grad_image, grad_text = torch.autograd.grad(loss, [image, text])
        outputs |= {f"{name}_loss": loss, f"{name}_grad_image": grad_image}
        if name != "m3_late":
            outputs |= {f"{name}_grad_text": grad_text, f"{name}_mix": loss - parts["contrastive"]}
    return outputs


def shares(vectors: Mapping[str, Array], kinds: list[str]) -> Any:
    names = {"multimodal": "lam_mm", "visual": "lam_uni_image", "language": "lam_uni_text", "joint": "lam_vl"}
    return {kind: float(vectors[f"mix/in/{names[kind]}"]) for kind in kinds}


def slerps(vectors: Mapping[str, Array]) -> dict[str, Any]:
    a, b = (tensor(vectors, f"slerp/in/{side}").requires_grad_() for side in ("a", "b"))
    mixed = torch.stack([slerp(a, b, share) for share in np.asarray(vectors["slerp/in/lam"]).tolist()])
    grads = torch.autograd.grad((tensor(vectors, "slerp/in/weight") * mixed).sum(), [a, b])
    return {"mixed": mixed, "grad_a": grads[0], "grad_b": grads[1]}


def target(vectors: Mapping[str, Array]) -> dict[str, Any]:
    logits, share = tensor(vectors, "target/in/logits").requires_grad_(), float(vectors["target/in/lam"])
    own = torch.arange(len(logits))
    sides = [mixed_target_loss(side, own, own.flip(0), share, 1 - share) for side in (logits, logits.T)]
    loss = (sides[0] + sides[1]) / 2
    return {"loss": loss, "grad_logits": torch.autograd.grad(loss, logits)[0]}


def metric(vectors: Mapping[str, Array]) -> dict[str, Any]:
    image, text = (tensor(vectors, f"mix/in/{side}").numpy() for side in ("image", "text"))
    figures = {"align": distances(image, text).mean(), "relative_align": relative_distances(image, text).mean()}
    return {**figures, "uniformity": np.float32(uniformity(image, text))}
