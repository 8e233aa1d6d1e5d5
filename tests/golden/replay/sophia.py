"""SophiaG's and SophiaH's trajectories, curvatures and win rates; the curvature of a linear softmax model from sampled labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diptych.optimizers.sophia import SophiaG, SophiaH

INPUTS = (
    "sophia?_*/hyper/*", "*/init", "*/grads", "*/sampled_label_grads", "sophiah_*/probe", "*/loss_?",
    "gnb/x", "gnb/w", "gnb/sampled_labels", "gnb/bs",
)  # fmt: skip
TOLERANCE = {"*": (1e-9, 1e-10)}

Vectors = Mapping[str, np.ndarray]
Parameters = dict[str, torch.nn.Parameter]


def replay(vectors: Vectors) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for case in sorted({key.split("/")[0] for key in vectors if key.endswith("/init")}):
        outputs |= (replay_g if case.startswith("sophiag") else replay_h)(vectors, case)
    return outputs | (replay_gnb(vectors) if "gnb/x" in vectors else {})


def start(vectors: Vectors, case: str) -> tuple[dict[str, object], Parameters]:
    hyper = {key.split("/")[2]: vectors[key].tolist() for key in vectors if key.startswith(f"{case}/hyper/")}
    names = [key.split("/")[1] for key in vectors if key.startswith(f"{case}/") and key.endswith("/init")]
    return hyper, {name: torch.nn.Parameter(double(vectors[f"{case}/{name}/init"])) for name in names}


def double(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def curvature(optimizer: torch.optim.Optimizer, parameter: Tensor) -> np.ndarray:
    return optimizer.state[parameter]["hessian"].numpy().copy()


def replay_g(vectors: Vectors, case: str) -> dict[str, np.ndarray]:
    """The authors' order: a step, an estimate after every k-th. Their curvature lacks the factor `bs`."""
    hyper, parameters = start(vectors, case)
    bs, every = float(hyper.pop("bs")), int(hyper.pop("k"))
    optimizer = SophiaG(parameters.values(), every=every, **hyper)
    rows: dict[str, list[np.ndarray]] = {f"{name}/{kind}": [] for name in parameters for kind in ("traj", "hessian_ema")}
    win_rate = []
    for step in range(max(len(vectors[f"{case}/{name}/grads"]) for name in parameters)):
        for name, parameter in parameters.items():
            parameter.grad = double(vectors[f"{case}/{name}/grads"][step])
        optimizer.step()
        if step % every == every - 1:
            sampled = {p: double(vectors[f"{case}/{name}/sampled_label_grads"][step // every]) for name, p in parameters.items()}
            optimizer.update_curvature({p: bs * g * g for p, g in sampled.items()})
            for name, p in parameters.items():
                rows[f"{name}/hessian_ema"].append(curvature(optimizer, p) / bs)
        win_rate.append(optimizer.win_rate())
        for name, p in parameters.items():
            rows[f"{name}/traj"].append(p.detach().numpy().copy())
    return {f"{case}/{key}": np.stack(values) for key, values in rows.items()} | {f"{case}/win_rate": np.asarray(win_rate)}


def replay_h(vectors: Vectors, case: str) -> dict[str, np.ndarray]:
    """Products from the loss, by the stored probes. The vectors' bound is on the ratio m / h: it is our `rho`, and divides the rate."""
    hyper, parameters = start(vectors, case)
    bound, every = float(hyper.pop("p")), int(hyper.pop("update_period"))
    lr, eps, decay = (float(hyper.pop(name)) for name in ("lr", "eps", "weight_decay"))
    optimizer = SophiaH(
        parameters.values(), lr * bound, rho=bound, eps=eps * bound, weight_decay=decay / bound, every=every, betas=hyper["betas"]
    )
    coefficients = [[double(vectors[f"{case}/{name}/loss_{which}"]) for name in parameters] for which in "abc"]
    weights = list(parameters.values())
    rows: dict[str, list[np.ndarray]] = {f"{name}/{kind}": [] for name in parameters for kind in ("hvp", "traj")}
    for step in range(max(len(vectors[f"{case}/{name}/grads"]) for name in parameters)):
        if optimizer.curvature_due(step):
            probe = [double(vectors[f"{case}/{name}/probe"][step // every]) for name in parameters]
            products = torch.autograd.grad(torch.autograd.grad(loss(weights, *coefficients), weights, create_graph=True), weights, probe)
            optimizer.update_curvature({p: u * product for p, u, product in zip(weights, probe, products, strict=True)})
            for name, product in zip(parameters, products, strict=True):
                rows[f"{name}/hvp"].append(product.numpy().copy())
        for name, p in parameters.items():
            p.grad = double(vectors[f"{case}/{name}/grads"][step])
        optimizer.step()
        for name, p in parameters.items():
            rows[f"{name}/traj"].append(p.detach().numpy().copy())
    last = {f"{case}/{name}/hessian_ema_last": curvature(optimizer, p) for name, p in parameters.items()}
    return {f"{case}/{key}": np.stack(values) for key, values in rows.items()} | last


def loss(weights: list[Tensor], a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> Tensor:
    """A quartic in every coordinate, and a term that couples all of them."""
    alone = sum((a_ * p**2 / 2 + b_ * p**4 / 4).sum() for p, a_, b_ in zip(weights, a, b, strict=True))
    return alone + sum((c_ * p).sum() for p, c_ in zip(weights, c, strict=True)) ** 2 / 2  # type: ignore[return-value]


def replay_gnb(vectors: Vectors) -> dict[str, np.ndarray]:
    """The sampled gradient of a linear softmax model, and one estimate's entry into a curvature that was zero."""
    softmaxes = int(vectors["gnb/bs"])
    weight = torch.nn.Parameter(double(vectors["gnb/w"]))
    logits = double(vectors["gnb/x"]).flatten(0, -2) @ weight.T
    labels = torch.from_numpy(vectors["gnb/sampled_labels"].astype(np.int64)).flatten()
    (ghat,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), weight)
    estimate = softmaxes * ghat * ghat
    optimizer = SophiaG([weight], betas=(0.9, 0.9))
    optimizer.update_curvature({weight: estimate})
    ema = curvature(optimizer, weight) / softmaxes
    return {"gnb/ghat": ghat.numpy(), "gnb/hhat_paper": estimate.numpy(), "gnb/hessian_ema_beta2_0.9": ema}
