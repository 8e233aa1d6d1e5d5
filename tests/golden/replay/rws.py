"""Robust weight signatures: projection, quantisers, and patched state dicts of a plain convolutional and of a residual network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.adapt import codes, rws

INPUTS = (
    "proj_dir",
    "proj_in",
    "quant_in",
    *(f"{net}_{role}/*" for net in ("vgg", "res") for role in ("pre", "base", "rob[0-9]*", "later")),
)
TOLERANCE = {"proj_out": (1e-6, 1e-9), "quant_*": (1e-6, 1e-9), "*/num_batches_tracked": (0.0, 0.0), "*": (1e-6, 1e-6)}

State = dict[str, Tensor]
CLAMPED = (-0.5, 0.75)
LEVELS = (3, 8, 16, 256)
CASES: dict[str, dict[str, Any]] = {
    "vgg_out_one_k2": {"keep": 2, "strengths": [1.0]},
    "vgg_out_one_k2_alpha0.6": {"keep": 2, "strengths": [0.6], "official_square": True},
    "vgg_out_two_k3": {"keep": 3, "strengths": [0.5, 0.5], "official_square": True},
    "vgg_out_two_k3_unit": {"keep": 3, "strengths": [1.0, 1.0]},
    "vgg_out_one_k2_on_later": {"keep": 2, "strengths": [1.0], "destination": "later"},
    "vgg_out_two_k2_q16_linear": {"keep": 2, "strengths": [1.0, 1.0], "quantiser": (16, "linear")},
    "vgg_out_two_k2_q16_tanh": {"keep": 2, "strengths": [1.0, 1.0], "quantiser": (16, "tanh")},
    "vgg_out_two_k2_q16_log": {"keep": 2, "strengths": [1.0, 1.0], "quantiser": (16, "log")},
    "res_out_two_k2": {"keep": 2, "strengths": [0.5, 0.5], "official_square": True},
}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    direction = torch.from_numpy(vectors["proj_dir"])
    outputs = {"proj_out": np.stack([rws.project(torch.from_numpy(row), direction).numpy() for row in vectors["proj_in"]])}
    values = torch.from_numpy(vectors["quant_in"])
    for levels in LEVELS:
        outputs[f"quant_{levels}"] = quantised(values, levels)
    # The grid's ends are the data's own, so the ends of the clamp are put among them.
    outputs["quant_8_clamped"] = quantised(torch.cat([values.clamp(*CLAMPED), torch.tensor(CLAMPED, dtype=values.dtype)]), 8)[:-2]
    for name, case in CASES.items():
        net = name.partition("_")[0]
        outputs |= {f"{name}/{key}": tensor.numpy() for key, tensor in patched(net, states(vectors, net), **case).items()}
    for net in ("vgg", "res"):
        outputs[f"{net}_keys_k2"] = np.asarray(rws.select(states(vectors, net)["base"], 2))
    return outputs


def quantised(values: Tensor, levels: int) -> np.ndarray:
    return codes.quantise([{"": values}], levels)[0].decode()[""].numpy()


def states(vectors: Mapping[str, np.ndarray], net: str) -> dict[str, State]:
    found: dict[str, State] = {}
    for key in vectors:
        if match := re.fullmatch(rf"{net}_(\w+?)/(.+)", key):
            found.setdefault(match[1], {})[match[2]] = torch.from_numpy(np.asarray(vectors[key]))
    return found


def patched(
    net: str,
    models: Mapping[str, State],
    keep: int,
    strengths: list[float],
    official_square: bool = False,
    destination: str = "base",
    quantiser: tuple[int, codes.Kind] | None = None,
) -> State:
    robust = [models[f"rob{number}"] for number in range(len(strengths))]
    names = rws.select(models["base"], keep)
    signatures = [rws.extract(models["pre"], models["base"], state, names) for state in robust]
    if quantiser:
        signatures = [coded.decode() for coded in codes.quantise(signatures, *quantiser)]
    found = rws.apply(models[destination], signatures, strengths, official_square)
    return rws.average_norms(found, robust) if net == "res" else found
