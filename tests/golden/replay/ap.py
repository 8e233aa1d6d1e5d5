"""AP: thresholds, counts, masks, rewound values and dead-node rates of three rounds on three small networks, in float64.

Biases make the published count larger, and the masks follow from it: parity by `official_copies`. The running statistics of the case with
BatchNorm are not in the file; its dead-node rates are computed with those of a fresh layer, hence their tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, linear, relu

from diptych.compress.activation import dead_nodes
from diptych.compress.ap import by_magnitude, official_activate, official_copies

INPUTS = ("*/x", "*/y", "*/names", "*/init/*", "*/bench_percent", "*/ap_percent", "*/start/*", "*/trained/*")
TOLERANCE = {"*_threshold": (1e-12, 0.0), "case_1/*_dnr": (0.0, 0.06), "*_dnr": (1e-15, 0.0)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for case in sorted({key.split("/")[0] for key in vectors}):
        names = [str(name) for name in vectors[f"{case}/names"]]
        masks = {name: torch.ones(vectors[f"{case}/init/{name}"].shape, dtype=torch.bool) for name in names if "weight" in name}
        for number in range(len({key.split("/")[1] for key in vectors if key.startswith(f"{case}/round")})):
            found, masks = replay_round(vectors, case, f"{case}/round{number}", masks)
            outputs |= found
    return outputs


def replay_round(
    vectors: Mapping[str, np.ndarray], case: str, place: str, before: dict[str, Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    start, trained = (named(vectors, f"{place}/{kind}/") for kind in ("start", "trained"))
    init = named(vectors, f"{case}/init/")
    names = [str(name) for name in vectors[f"{case}/names"]]
    rates = dead_nodes(outputs_of(trained, torch.from_numpy(vectors[f"{case}/x"]).double()))
    weights = {name: trained[name] for name in before}
    copies = official_copies(names, before)
    bench, limit = by_magnitude(weights, before, float(vectors[f"{case}/bench_percent"]), copies)
    alive = sum(copies[name] * int(mask.sum()) for name, mask in before.items())
    count = int(alive * int(vectors[f"{case}/ap_percent"]) / 100)
    after, ap_limit = official_activate(weights, start, bench, count, copies)
    rewound = {name: init[name] * after[name] if name in after else init[name] for name in names}
    found = {
        "dynamic_dnr": np.asarray(rates.dynamic),
        "static_dnr": np.asarray(rates.static),
        "bench_threshold": np.asarray(limit),
        "num_counted": np.asarray(alive),
        "num_ap": np.asarray(count),
        "ap_threshold": np.asarray(ap_limit),
        **{f"mask_after_bench/{name}": mask.numpy() for name, mask in bench.items()},
        **{f"mask_after_ap/{name}": mask.numpy() for name, mask in after.items()},
        **{f"rewound/{name}": value.numpy() for name, value in rewound.items()},
    }
    return {f"{place}/{name}": value for name, value in found.items()}, after


def named(vectors: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): torch.from_numpy(vectors[key]) for key in vectors if key.startswith(prefix)}


def outputs_of(parameters: Mapping[str, Tensor], x_NCHW: Tensor) -> list[Tensor]:
    """What both activations of the network give, in evaluation mode."""
    hidden = conv2d(x_NCHW, parameters["conv.weight"], parameters.get("conv.bias"))
    if "bn.weight" in parameters:
        zeros, ones = torch.zeros_like(parameters["bn.weight"]), torch.ones_like(parameters["bn.weight"])
        hidden = batch_norm(hidden, zeros, ones, parameters["bn.weight"], parameters["bn.bias"])
    first = relu(hidden)
    return [first, relu(linear(first.flatten(1), parameters["fc1.weight"], parameters.get("fc1.bias")))]
