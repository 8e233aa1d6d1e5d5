"""Rate-distortion pruning: allocations, masks, curves of a small network, and the rules it is compared with.

The published dynamic program's own results (`amounts`, `achieved_sparsity`, `total_distortion` beside `exhaustive_*`) are not outputs here: it
overshoots its budget and skips states, so that what it finds depends on its index arithmetic. The true optimum is replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, relu

from diptych.compress import lamp
from diptych.compress.rd_prune import allocate, curve, share_out, smallest_gone

OFFICIAL = ("*/amounts", "*/achieved_sparsity", "*/total_distortion")
INPUTS = ("*/num_weights", "*/rd_dist", "*/rd_amount", "*/target_sparsity", "*/prev_amount", "*/piece_length", "mask/weight",
          "curves/params/*", "curves/x", "curves/amount", *OFFICIAL)  # fmt: skip
TOLERANCE = {
    "curves/dist_*": (1e-4, 1e-6),
    "*_distortion": (1e-5, 0.0),
    "*amounts": (0.0, 1e-6),
    "baseline/lamp_scores/*": (1e-4, 1e-6),
    "mask/*": (0.0, 0.0),
}
STRIDES = {"f.0": 4, "f.2": 2}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for case in sorted({key.split("/")[0] for key in vectors if key.endswith("/target_sparsity")}):
        outputs |= {f"{case}/{name}": value for name, value in allocated(vectors, case).items()}
    outputs |= replay_masks(vectors)
    parameters = {key.removeprefix("curves/params/"): torch.from_numpy(vectors[key]) for key in vectors if key.startswith("curves/params/")}
    outputs |= replay_curves(vectors, parameters)
    outputs |= replay_baselines(vectors, parameters)
    return outputs


def allocated(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    curves, sizes = vectors[f"{case}/rd_dist"].astype(np.float64), vectors[f"{case}/num_weights"]
    levels = curves.shape[1] - 1
    gone = np.asarray([int(size * Fraction(round(float(amount) * levels), levels))
                       for size, amount in zip(sizes.tolist(), vectors[f"{case}/prev_amount"], strict=True)])  # fmt: skip
    found = allocate(curves, sizes, float(vectors[f"{case}/target_sparsity"]), gone)
    amounts = [round(int(removed) * levels / int(size)) / levels for removed, size in zip(found.removed, sizes, strict=True)]
    return {"exhaustive_amounts": np.asarray(amounts, np.float32), "exhaustive_distortion": np.asarray(found.distortion)}


def replay_masks(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    weight = torch.from_numpy(vectors["mask/weight"])
    names = ["0.0", "0.01", "0.3", "0.5", "0.97", "1.0"]
    return {f"mask/amount_{name}": (weight * smallest_gone(weight, int(Fraction(name) * weight.numel()))).numpy() for name in names}


def forward(parameters: Mapping[str, Tensor], x_NCHW: Tensor) -> Tensor:
    for layer, stride in STRIDES.items():
        x_NCHW = relu(conv2d(x_NCHW, parameters[f"{layer}.weight"], parameters[f"{layer}.bias"], stride=stride))
    return x_NCHW.flatten(1) @ parameters["h.weight"].T + parameters["h.bias"]


def replay_curves(vectors: Mapping[str, np.ndarray], parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    x_NCHW = torch.from_numpy(vectors["curves/x"]).float()
    before = forward(parameters, x_NCHW)
    weights = [parameters[f"{layer}.weight"] for layer in (*STRIDES, "h")]
    # The published curves truncate a product of floats, so that 0.35 of 180 weights are 62.
    levels = vectors["curves/amount"].shape[1] - 1
    counts = [[int(level / levels * weight.numel()) for level in range(levels + 1)] for weight in weights]
    return {
        f"curves/dist_{name}": np.stack(
            [
                curve(lambda: forward(parameters, x_NCHW), weight, before, removed, worst=worst)
                for weight, removed in zip(weights, counts, strict=True)
            ]
        )
        for name, worst in (("mean", False), ("worst", True))
    }


def replay_baselines(vectors: Mapping[str, np.ndarray], parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    weights = [parameters[f"{layer}.weight"] for layer in (*STRIDES, "h")]
    sparsity = float(vectors["net/target_sparsity"])
    sizes = np.asarray([weight.numel() for weight in weights])
    outputs = {
        f"baseline/{key}_amounts": share_out(weights, sparsity, rule).removed / sizes
        for key, rule in (("lamp", "lamp"), ("erk", "erk"), ("unifplus", "uniform-plus"))
    }
    return outputs | {f"baseline/lamp_scores/{place}": lamp.scores(weight).float().numpy() for place, weight in enumerate(weights)}
