"""diffGrad: trajectories of every tensor in float64, and the authors' three one-dimensional examples beside Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from diptych.optimizers.adamw import Config as AdamWConfig
from diptych.optimizers.diffgrad import DiffGrad

INPUTS = ("case_*/hyper/*", "*/init", "*/grads", "synthetic_hyper/*")
TOLERANCE = {"case_*/traj": (1e-9, 1e-10), "synthetic_*": (0.0, 1e-6)}
UPDATES = 299


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for case in sorted({key.split("/")[0] for key in vectors if key.endswith("/init")}):
        outputs |= replay_case(vectors, case)
    if "synthetic_hyper/x0" in vectors:
        outputs |= replay_synthetic({key.split("/")[1]: float(vectors[key]) for key in vectors if key.startswith("synthetic_hyper/")})
    return outputs


def replay_case(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    hyper = {key.split("/")[2]: vectors[key].tolist() for key in vectors if key.startswith(f"{case}/hyper/")}
    names = [key.removesuffix("/init") for key in vectors if key.startswith(f"{case}/") and key.endswith("/init")]
    parameters = {name: torch.nn.Parameter(torch.from_numpy(vectors[f"{name}/init"].astype(np.float64))) for name in names}
    optimizer = DiffGrad(parameters.values(), **hyper)
    grads = {name: vectors[f"{name}/grads"].astype(np.float64) for name in names}
    trajectories: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for step in range(max(map(len, grads.values()))):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(np.array(grads[name][step])) if step < len(grads[name]) else None
        optimizer.step()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                trajectories[name].append(parameter.detach().numpy().copy())
    return {f"{name}/traj": np.stack(trajectory) for name, trajectory in trajectories.items()}


def slope_1(x: float) -> float:
    return 2 * x + 0.6 if x <= 0 else 2 * x - 0.4


def slope_2(x: float) -> float:
    return -40.0 if x <= -0.9 else x * math.cos(8 * x) + math.sin(8 * x) + 3 * x * x


def slope_3(x: float) -> float:
    pieces = ((-0.5, 2 * x), (-0.4, 1.0), (0.0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0))
    return next((slope for end, slope in pieces if x <= end), 2 * x)


def descend(optimizer: torch.optim.Optimizer, x: torch.Tensor, slope: Callable[[float], float]) -> np.ndarray:
    trajectory = [x.item()]
    for _ in range(UPDATES):
        x.grad = torch.tensor(slope(x.item()), dtype=x.dtype)
        optimizer.step()
        trajectory.append(x.item())
    return np.asarray(trajectory)


def replay_synthetic(hyper: Mapping[str, float]) -> dict[str, np.ndarray]:
    lr, betas, eps = hyper["lr"], (hyper["beta1"], hyper["beta2"]), hyper["eps"]
    outputs = {}
    for number, slope in enumerate((slope_1, slope_2, slope_3), start=1):
        x = torch.nn.Parameter(torch.tensor(hyper["x0"], dtype=torch.float64))
        outputs[f"synthetic_{number}/diffgrad"] = descend(DiffGrad([x], lr, betas=betas, eps=eps, corrected_eps=True), x, slope)
        x = torch.nn.Parameter(torch.tensor(hyper["x0"], dtype=torch.float64))
        adam = AdamWConfig(lr=lr, betas=betas, eps=eps, weight_decay=0.0).build([{"params": [x]}])
        outputs[f"synthetic_{number}/adam"] = descend(adam, x, slope)
    return outputs
