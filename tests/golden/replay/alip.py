"""ALIP: several steps in a row of its weights and loss, on one process and on several."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import Tensor

from diptych.objectives.alip import Config

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*",)

TOLERANCE: dict[str, tuple[float, float]] = {"*": (1e-9, 1e-12)}

SIDES = ("image", "raw", "caption")


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    outputs: dict[str, Array] = {}
    for name in {key.split("/")[0] for key in vectors}:
        given = {key: np.asarray(vectors[f"{name}/in/{key}"]) for key in (*SIDES, "log_scale", "momentum0")}
        names = {"momentum_rate": "decay", "gamma_sample": "gamma_sample", "gamma_pair": "gamma_pair"}
        settings = {ours: float(vectors[f"{name}/in/{theirs}"]) for theirs, ours in names.items()}
        single = steps(given, settings)
        ranks = run_ranks(int(vectors[f"{name}/in/world_size"]), on_a_rank, given, settings)
        single |= {f"rank_{key}": np.stack([rank[key] for rank in ranks], axis=1) for key in ("loss", "momentum")}
        single |= {f"rank_grad_{side}": np.concatenate([rank[f"grad_{side}"] for rank in ranks], axis=1) for side in ("image", "raw")}
        outputs |= {f"{name}/out/{key}": value for key, value in single.items()}
    return outputs


def on_a_rank(rank: int, world: int, given: Mapping[str, Array], settings: Mapping[str, float]) -> dict[str, Array]:
    own = {side: np.split(given[side], world, axis=1)[rank] for side in SIDES}
    return steps({**given, **own}, {**settings, "gather_with_grad": False})


def steps(given: Mapping[str, Array], settings: Mapping[str, float]) -> dict[str, Array]:
    """Losses, weights, histories and raw gradients of this process, a row a step."""
    objective = Config(**settings).build().double()  # type: ignore[arg-type]
    objective.history_3 = torch.tensor(given["momentum0"])
    rows: list[dict[str, Tensor]] = []
    for features in zip(*(torch.tensor(given[side]).double() for side in SIDES), strict=True):
        inputs = [tensor.requires_grad_() for tensor in (*features, torch.tensor(given["log_scale"]))]
        terms = objective.terms(inputs[0], inputs[1], inputs[2], inputs[3].exp())
        loss = terms.raw + terms.caption
        grads = torch.autograd.grad(loss, inputs)
        row = {"loss": loss, "loss_raw": terms.raw, "loss_caption": terms.caption, "momentum": objective.history_3}
        row |= {f"w_{kind}": getattr(terms.gates, f"{kind}_N") for kind in ("sample", "raw", "caption")}
        rows.append(row | {f"grad_{side}": grad for side, grad in zip((*SIDES, "log_scale"), grads, strict=True)})
    return {key: torch.stack([row[key] for row in rows]).detach().numpy() for key in rows[0]}
