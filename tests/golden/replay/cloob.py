"""CLOOB: what is retrieved, its loss on one process and on several, InfoLOOB alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import Tensor

from diptych.objectives.cloob import Config, retrieve

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*",)

TOLERANCE: dict[str, tuple[float, float]] = {"*": (1e-9, 1e-12)}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    outputs: dict[str, Array] = {}
    for name in {key.split("/")[0] for key in vectors}:
        found = distributed(name, vectors) if f"{name}/in/world_size" in vectors else case(name, vectors)
        outputs |= {f"{name}/out/{key}": np.asarray(value) for key, value in found.items()}
    return outputs


def features(name: str, vectors: Mapping[str, Array]) -> tuple[Tensor, Tensor, Tensor, float]:
    image, text = (torch.tensor(np.asarray(vectors[f"{name}/in/{side}"])).double() for side in ("image", "text"))
    return image, text, torch.tensor(float(vectors[f"{name}/in/log_inv_tau"]), dtype=torch.float64), float(vectors[f"{name}/in/beta"])


def measured(image: Tensor, text: Tensor, log_inv_tau: Tensor, **settings: object) -> dict[str, Array]:
    """Loss and raw gradients of this process."""
    inputs = [tensor.clone().requires_grad_() for tensor in (image, text, log_inv_tau)]
    terms = Config(**settings).build().terms(inputs[0], inputs[1], inputs[2].exp())  # type: ignore[arg-type]
    loss = terms[0] + terms[1]
    grads = torch.autograd.grad(loss, inputs)
    names = ("grad_image", "grad_text", "grad_log_inv_tau")
    values = {"loss": loss, "loss_image": terms[0], "loss_text": terms[1], **dict(zip(names, grads, strict=True))}
    return {key: value.detach().numpy() for key, value in values.items()}


def case(name: str, vectors: Mapping[str, Array]) -> dict[str, Array]:
    image, text, log_inv_tau, beta = features(name, vectors)
    alone = measured(image, text, log_inv_tau, retrieval=False)
    return {
        **measured(image, text, log_inv_tau, beta=beta),
        **{key: value.numpy() for key, value in retrieve(image, text, image, text, beta)._asdict().items()},
        **{f"loob_only_{key}": value for key, value in alone.items() if key not in ("loss_image", "loss_text")},
    }


def on_a_rank(rank: int, world: int, image: Tensor, text: Tensor, log_inv_tau: Tensor, beta: float) -> dict[str, Array]:
    own = [tensor.chunk(world)[rank] for tensor in (image, text)]
    return measured(*own, log_inv_tau, beta=beta, gather_with_grad=False)


def distributed(name: str, vectors: Mapping[str, Array]) -> dict[str, Array]:
    inputs = features(name, vectors)
    single = measured(*inputs[:3], beta=inputs[3])
    ranks = run_ranks(int(vectors[f"{name}/in/world_size"]), on_a_rank, *inputs)
    joined = {key: np.concatenate([result[key] for result in ranks]) for key in ("grad_image", "grad_text")}
    scalars = {key: np.stack([result[key] for result in ranks]) for key in ("loss", "grad_log_inv_tau")}
    return {
        **{f"single_{key}": value for key, value in single.items() if key not in ("loss_image", "loss_text")},
        **{f"rank_{key}": value for key, value in {**joined, **scalars}.items()},
    }
