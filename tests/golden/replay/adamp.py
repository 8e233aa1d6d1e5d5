"""AdamP and SGDP: trajectories and branch decisions of every tensor of every group, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from diptych.optimizers.adamp import SGDP, AdamP

INPUTS = ("*/hyper/*", "*/init", "*/grads")
TOLERANCE = {"*/branch": (0.0, 0.0), "*/traj": (1e-9, 1e-10)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for group in sorted({key.split("/")[0] for key in vectors if key.endswith("/init")}):
        outputs |= replay_group(vectors, group)
    return outputs


def replay_group(vectors: Mapping[str, np.ndarray], group: str) -> dict[str, np.ndarray]:
    hyper = {key.split("/")[2]: vectors[key].tolist() for key in vectors if key.startswith(f"{group}/hyper/")}
    names = [key.removesuffix("/init") for key in vectors if key.startswith(f"{group}/") and key.endswith("/init")]
    parameters = {name: torch.nn.Parameter(torch.from_numpy(vectors[f"{name}/init"].astype(np.float64))) for name in names}
    optimizer = (SGDP if "momentum" in hyper else AdamP)(parameters.values(), **hyper)
    trajectories: dict[str, list[np.ndarray]] = {name: [] for name in names}
    branches: dict[str, list[int]] = {name: [] for name in names}
    steps = {name: len(vectors[f"{name}/grads"]) for name in names}
    for step in range(max(steps.values())):
        for name, parameter in parameters.items():
            grads = vectors[f"{name}/grads"].astype(np.float64)
            parameter.grad = torch.from_numpy(np.asarray(grads[step])) if step < steps[name] else None
        optimizer.step()
        for name, parameter in parameters.items():
            if step < steps[name]:
                trajectories[name].append(parameter.detach().numpy().copy())
                branches[name].append(int(optimizer.views[parameter]))
    return {
        key: value
        for name in names
        for key, value in {f"{name}/traj": np.stack(trajectories[name]), f"{name}/branch": np.asarray(branches[name], np.int8)}.items()
    }
