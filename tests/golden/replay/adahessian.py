"""AdaHessian end to end: gradients and Hessian-vector products from the loss by the stored signs, and the trajectories they make."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diptych.optimizers.adahessian import IMAGE, AdaHessian

INPUTS = ("*/hyper/*", "*/init", "*/rademacher", "*/loss_?")
TOLERANCE = {"*": (1e-9, 1e-10)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for case in sorted({key.split("/")[0] for key in vectors if key.endswith("/init")}):
        outputs |= replay_case(vectors, case)
    return outputs


def replay_case(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    hyper = {key.split("/")[2]: vectors[key].tolist() for key in vectors if key.startswith(f"{case}/hyper/")}
    names = [key.split("/")[1] for key in vectors if key.startswith(f"{case}/") and key.endswith("/init")]
    weights = [torch.nn.Parameter(double(vectors[f"{case}/{name}/init"])) for name in names]
    a, b, c = ([double(vectors[f"{case}/{name}/loss_{which}"]) for name in names] for which in "abc")
    optimizer = AdaHessian(weights, block_sizes=hyper.pop("spatial_average_block_size", IMAGE), **hyper)
    rows: dict[str, list[np.ndarray]] = {f"{name}/{kind}": [] for name in names for kind in ("grads", "hvp", "traj")}
    for step in range(max(len(vectors[f"{case}/{name}/rademacher"]) for name in names)):
        signs = [double(vectors[f"{case}/{name}/rademacher"][step]) for name in names]
        grads = torch.autograd.grad(loss(weights, a, b, c), weights, create_graph=True)
        products = torch.autograd.grad(grads, weights, signs)
        for p, grad in zip(weights, grads, strict=True):
            p.grad = grad.detach()
        optimizer.update_curvature({p: z * product for p, z, product in zip(weights, signs, products, strict=True)})
        optimizer.step()
        for name, p, grad, product in zip(names, weights, grads, products, strict=True):
            for kind, value in (("grads", grad), ("hvp", product), ("traj", p)):
                rows[f"{name}/{kind}"].append(value.detach().numpy().copy())
    return {f"{case}/{key}": np.stack(values) for key, values in rows.items()}


def double(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def loss(weights: list[Tensor], a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> Tensor:
    """A quartic in every coordinate, and a term that couples all of them."""
    alone = sum((a_ * p**2 / 2 + b_ * p**4 / 4).sum() for p, a_, b_ in zip(weights, a, b, strict=True))
    return alone + sum((c_ * p).sum() for p, c_ in zip(weights, c, strict=True)) ** 2 / 2  # type: ignore[return-value]
