"""AdaLoRA: layer, penalty, and the allocators of the authors and of peft, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diptych.optimizers.adalora import RANK_EPS, delta, factor_gradients, orthogonality
from diptych.optimizers.rank_budget import FACTORS, RankAllocator, Schedule, Triplets

INPUTS = ("base/*", "init/*", "grads/*", "hyper/*", "forward/x")
TOLERANCE = {"official/curr_rank": (0.0, 0.0), "peft/budget": (0.0, 0.0), "*": (1e-9, 1e-12)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    hyper = {key.split("/")[1]: vectors[key].item() for key in vectors if key.startswith("hyper/")}
    layers = list(dict.fromkeys(key.split("/")[1].split(".")[0] for key in vectors if key.startswith("init/")))
    official, peft = allocate(vectors, layers, hyper, "scores"), allocate(vectors, layers, hyper, "pattern")
    outputs = forward(vectors, layers, hyper) | {f"official/{key}": value for key, value in official.items()}
    outputs["peft/budget"] = outputs["official/curr_rank"]
    return outputs | {f"peft/{key}": value for key, value in peft.items() if key.startswith("traj/")}


def float64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def factors(vectors: Mapping[str, np.ndarray], layer: str) -> dict[str, Tensor]:
    return {name: float64(vectors[f"init/{layer}.lora_{name}"]).unsqueeze(0) for name in FACTORS}


def forward(vectors: Mapping[str, np.ndarray], layers: list[str], hyper: dict[str, Any]) -> dict[str, Any]:
    first = factors(vectors, layers[0])
    alpha, rank = hyper["lora_alpha"], first["E"].shape[1]
    scale = (alpha if alpha > 0 else rank) / (rank + RANK_EPS)
    x, bias = float64(vectors["forward/x"]), float64(vectors[f"base/{layers[0]}.bias"])
    weight = float64(vectors[f"base/{layers[0]}.weight"]) + delta(*(first[name] for name in FACTORS), scale)[0]
    y = torch.nn.functional.linear(x, weight, bias)
    grads = factor_gradients((2 * y.T @ x).unsqueeze(0), *(first[name] for name in FACTORS), scale)
    penalty, pulls = orthogonality([(each["A"], each["B"]) for each in (factors(vectors, layer) for layer in layers)])
    return {
        "forward/y": y.numpy(),
        "forward/merged_weight": weight.numpy(),
        **{f"forward/grad_of_sum_y2/lora_{name}": grad[0].numpy() for name, grad in grads.items()},
        "orth_regulariser": np.asarray(hyper["reg_weight"] * penalty.item()),
        "orth_regulariser_grad/lora_A": hyper["reg_weight"] * pulls[0]["A"][0].numpy(),
    }


def allocate(
    vectors: Mapping[str, np.ndarray], layers: list[str], hyper: dict[str, Any], final: Literal["scores", "pattern"]
) -> dict[str, Any]:
    """Plain gradient steps on the factors, then the allocator; by key without its first part."""
    triplets = [Triplets(**factors(vectors, layer)) for layer in layers]
    initial, target = sum(each.count for each in triplets), hyper["target_rank"] * len(layers)
    names = ("total_step", "init_warmup", "final_warmup", "mask_interval")
    allocator = RankAllocator(Schedule(initial, target, *(hyper[name] for name in names)), hyper["beta1"], hyper["beta2"], final)
    ranks, thresholds, trajectory = [], [], {layer: [] for layer in layers}  # type: ignore[var-annotated]
    for step in range(hyper["total_step"]):
        grads = [{name: float64(vectors[f"grads/{layer}.lora_{name}"][step]).unsqueeze(0) for name in FACTORS} for layer in layers]
        for each, grad in zip(triplets, grads, strict=True):
            for name in FACTORS:
                getattr(each, name).sub_(grad[name], alpha=hyper["lr"])
        threshold = allocator.after_step(step, triplets, grads)
        ranks.append(allocator.schedule.at(step)[0])
        thresholds.append(-1.0 if threshold is None else threshold)
        for layer, each in zip(layers, triplets, strict=True):
            trajectory[layer].append(each.E[0].numpy().copy())
    outputs: dict[str, Any] = {"curr_rank": np.asarray(ranks), "mask_threshold": np.asarray(thresholds)}
    for layer, each in zip(layers, triplets, strict=True):
        outputs[f"traj/{layer}.lora_E"] = np.stack(trajectory[layer])
        for kind, table in (("exp_avg_ipt", each.importance), ("exp_avg_unc", each.uncertainty)):
            outputs |= {f"{kind}/{layer}.lora_{name}": table[name][0].numpy() for name in FACTORS}
    return outputs
