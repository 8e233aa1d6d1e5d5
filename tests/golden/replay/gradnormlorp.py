"""GradNormLoRP: trajectories of full weights, of GaLore, and of DoRA adapters, with the bases of the file injected, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.optimizers.gradnormlorp import DoraAdamW, WeightNormAdamW
from diptych.optimizers.low_rank import Basis, LowRankAdamW, ProjectingOptimizer, Projection, sides

INPUTS = (
    "*/hyper/*",
    "*/init",
    "*/grads",
    "*/proj*",
    "dora_*/W0",
    "dora_*/b0",
    "dora_*/X",
    "dora_*/Y",
    "dora_*/A0",
    "dora_*/B0",
    "dora_*/losses",
)
TOLERANCE = {"dora_*": (1e-6, 1e-6), "*/traj": (1e-9, 1e-10)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for case in sorted({key.split("/")[0] for key in vectors}):
        outputs |= replay_dora(vectors, case) if case.startswith("dora") else replay_weights(vectors, case)
    return outputs


def float64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def hyper_of(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, Any]:
    return {key.split("/")[-1]: vectors[key].tolist() for key in vectors if key.startswith(f"{case}/hyper/")}


def inject(optimizer: ProjectingOptimizer, bases: dict[tuple[Tensor, str], tuple[list[Tensor], list[Tensor]]]) -> None:
    """Makes an optimizer take stored bases, in order, in place of those that it would find."""
    used: dict[tuple[Tensor, str], int] = {}

    def find_basis(parameter: Tensor, role: str, grad: Tensor, group: dict[str, Any]) -> Basis:
        at = used[parameter, role] = used.get((parameter, role), -1) + 1
        left, right = bases[parameter, role]
        return Basis(left[at] if left else None, right[at] if right else None)

    optimizer.find_basis = find_basis  # type: ignore[method-assign]


def stored(vectors: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...], kind: Projection) -> tuple[list[Tensor], list[Tensor]]:
    """Left and right bases of a matrix: under two keys, or under one, and then the projection says of which side they are."""
    if f"{key}_left" in vectors:
        return list(float64(vectors[f"{key}_left"])), list(float64(vectors[f"{key}_right"]))
    bases = list(float64(vectors[key]))
    left, _ = sides(shape[0], shape[1], kind)
    return (bases, []) if left else ([], bases)


def replay_weights(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    hyper = hyper_of(vectors, case)
    names = [key.removesuffix("/init") for key in vectors if key.startswith(f"{case}/") and key.endswith("/init")]
    weights = {name: torch.nn.Parameter(float64(vectors[f"{name}/init"])) for name in names}
    ranked = [name for name in names if any(key.startswith(f"{name}/proj") for key in vectors)]
    groups = [{"params": [weights[n] for n in ranked]}, {"params": [weights[n] for n in names if n not in ranked], "rank": None}]
    optimizer = (WeightNormAdamW if case.startswith("weightnorm") else LowRankAdamW)(groups, **hyper)
    kind = hyper["proj_type"]
    inject(optimizer, {(weights[n], "weight"): stored(vectors, f"{n}/proj", tuple(weights[n].shape), kind) for n in ranked})
    trajectories: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for step in range(max(len(vectors[f"{name}/grads"]) for name in names)):
        for name, weight in weights.items():
            weight.grad = float64(vectors[f"{name}/grads"][step])
        optimizer.step()
        for name, weight in weights.items():
            trajectories[name].append(weight.detach().numpy().copy())
    return {f"{name}/traj": np.stack(steps) for name, steps in trajectories.items()}


def replay_dora(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    hyper = hyper_of(vectors, case)
    W0, b0, X, Y, A0, B0 = (float64(vectors[f"{case}/{name}"]) for name in ("W0", "b0", "X", "Y", "A0", "B0"))
    weight = torch.nn.Parameter(W0.clone())
    optimizer = DoraAdamW([weight], rank=hyper.pop("galore_rank"), lora_rank=hyper.pop("lora_r"), **hyper)
    [(A, B, m)] = optimizer.adapter(weight)
    outputs: dict[str, Any] = {"m0": m.numpy().copy()}
    optimizer.load_adapter(weight, [(A0, B0, m)])
    inject(
        optimizer, {(weight, f"{name}0"): stored(vectors, f"{case}/proj_{name}", each.shape, "std") for name, each in (("A", A), ("B", B))}
    )
    expected = vectors[f"{case}/losses"]  # an input for its length only: nothing else says how many steps were made
    trajectory: dict[str, list[np.ndarray]] = {"traj_A": [], "traj_B": [], "traj_m": []}
    for step, expected_loss in enumerate(expected):
        y = torch.nn.functional.linear(X, weight, b0)
        loss = torch.nn.functional.mse_loss(y, Y)
        optimizer.zero_grad()
        loss.backward()
        np.testing.assert_allclose(loss.item(), expected_loss, rtol=1e-6, err_msg=f"{case}/losses, step {step}")
        if step == 0:
            outputs["y_step0"] = y.detach().numpy()
            outputs |= {f"grad{name}_step0": grad.numpy() for name, grad in optimizer.gradients(weight)[0].items()}
        optimizer.step()
        for name, value in zip(trajectory, (A, B, m), strict=True):
            trajectory[name].append(value.numpy().copy())
    outputs |= {name: np.stack(values) for name, values in trajectory.items()}
    outputs["merged_weight"] = weight.detach().numpy()
    return {f"{case}/{name}": value for name, value in outputs.items()}
