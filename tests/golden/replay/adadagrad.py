"""AdAdaGrad: tests, AdaGrad in three forms, a training with growing batches, the division of batches, the schedule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.optimizers import adadagrad
from diptych.optimizers.adadagrad import AdaGradNorm, Division, RowAdaGrad

INPUTS = (
    *(f"test_*/{name}" for name in ("psg/*", "eta", "theta", "nu", "world", "acc_steps")),
    *(f"loop/{name}" for name in ("init/*", "x", "y", "b0", "eta", "lr", "bmax", "losses")),
    *(f"official_norm_*/{name}" for name in ("order", "*/init", "*/grads", "hyper/*")),
    "controller/in_*",
    "lr/samples",
)
TOLERANCE = {"*/new_batch*": (0.0, 0.0), "loop/batch_sizes": (0.0, 0.0), "controller/*": (0.0, 0.0), "*": (1e-9, 1e-12)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, Any] = {}
    for case in sorted({key.split("/")[0] for key in vectors}):
        kind = re.sub(r"_\d+$", "", case)
        replays = {
            "test": replay_tests,
            "loop": replay_loop,
            "official_norm": replay_adagrad,
            "controller": replay_division,
            "lr": replay_lr,
        }
        outputs |= {f"{case}/{key}": np.asarray(value) for key, value in replays[kind](vectors, case).items()}
    return outputs


def float64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


# ---------------------------------------------------------------- tests


def replay_tests(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, Any]:
    grads = [float64(vectors[key]) for key in vectors if key.startswith(f"{case}/psg/")]
    eta, theta, nu = (float(vectors[f"{case}/{name}"]) for name in ("eta", "theta", "nu"))
    b = len(grads[0])
    parts = {
        name: list(zip(*(grad.chunk(int(vectors[f"{case}/{name}"])) for grad in grads), strict=True)) for name in ("world", "acc_steps")
    }
    noises = {
        "norm": adadagrad.norm_noise(grads),
        "ddp_norm": adadagrad.pooled_noise(parts["world"], official=True),
        "acc_norm": adadagrad.pooled_noise(parts["acc_steps"], official=True),
    }
    outputs: dict[str, Any] = {}
    for name, noise in noises.items():
        outputs |= {f"{name}/variance_l1": noise.variance, f"{name}/new_batch": adadagrad.grown(b, adadagrad.norm_test(noise, eta))}
        if name != "acc_norm":
            outputs[f"{name}/grad_norm_sq"] = noise.square_norm
    inner = {
        "": adadagrad.inner_product_noise(grads, by_tensor=True),
        "_whole_vector": adadagrad.inner_product_noise(grads),
        "ddp": adadagrad.pooled_noise(parts["world"], along=True, official=True),
    }
    requests = {name: adadagrad.inner_product_test(noise, theta) for name, noise in inner.items()}
    for name, noise in inner.items():
        keys = ("ddp_ip/variance", "ddp_ip/new_batch") if name == "ddp" else (f"ip/variance{name}", f"ip/new_batch{name}")
        outputs |= {keys[0]: noise.variance, keys[1]: adadagrad.grown(b, requests[name])}
    across = adadagrad.orthogonality_noise(grads, by_tensor=True)
    outputs["orth/variance"] = across.variance
    outputs["orth/variance_whole_vector"] = adadagrad.orthogonality_noise(grads).variance
    outputs["orth/new_batch"] = adadagrad.grown(b, adadagrad.norm_test(across, nu))
    outputs["iporth/new_batch"] = adadagrad.grown(b, max(requests[""], adadagrad.norm_test(across, nu)))
    return outputs


# ---------------------------------------------------------------- a training with growing batches


def replay_loop(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, Any]:
    weights = {
        key.removeprefix(f"{case}/init/"): float64(vectors[key]).requires_grad_()
        for key in vectors
        if "/init/" in key and key.startswith(case)
    }
    x, y = float64(vectors[f"{case}/x"]), torch.from_numpy(vectors[f"{case}/y"])
    batch_size, largest = int(vectors[f"{case}/b0"]), int(vectors[f"{case}/bmax"])
    eta, lr = float(vectors[f"{case}/eta"]), float(vectors[f"{case}/lr"])
    optimizer = torch.optim.Adagrad(weights.values(), lr=lr)
    controller = adadagrad.AdaptiveBatchSize(eta, largest)
    records: dict[str, list[float]] = {"batch_sizes": [], "variance_l1": [], "grad_norm_sq": []}
    at = 0
    for expected in vectors[f"{case}/losses"]:  # an input for its length only: nothing else says how many steps were made
        index = torch.arange(at, at + batch_size) % len(x)
        at += batch_size
        losses = nn.functional.cross_entropy(network(x[index], weights), y[index], reduction="none")
        np.testing.assert_allclose(losses.mean().item(), expected, rtol=1e-9)
        grads = per_sample(losses, list(weights.values()))
        noise = adadagrad.norm_noise(grads)
        for weight, grad in zip(weights.values(), grads, strict=True):
            weight.grad = grad.mean(dim=0)
        optimizer.step()
        for name, value in zip(records, (batch_size, *noise), strict=True):
            records[name].append(value)
        batch_size = controller.next({"batch_size": batch_size, "variance": noise.variance, "square_norm": noise.square_norm})
    return {**records, **{f"final/{name}": weight.detach().numpy() for name, weight in weights.items()}}


def network(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    hidden = torch.tanh(nn.functional.linear(x, weights["0.weight"], weights["0.bias"]))
    return nn.functional.linear(hidden, weights["2.weight"], weights["2.bias"])


def per_sample(losses: Tensor, weights: list[Tensor]) -> list[Tensor]:
    rows = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


# ---------------------------------------------------------------- AdaGrad


def replay_adagrad(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, Any]:
    names = vectors[f"{case}/order"].tolist()
    hyper = {key.split("/")[-1]: vectors[key].item() for key in vectors if key.startswith(f"{case}/hyper/")}
    start, lr = hyper.pop("initial_accumulator_value"), hyper["lr"]
    makers = {
        "traj": lambda weights: RowAdaGrad(weights, **hyper, start=start, leaks=True),
        "traj_torch_adagrad": lambda weights: torch.optim.Adagrad(weights, lr=lr, initial_accumulator_value=start),
        "traj_paper_scalar": lambda weights: AdaGradNorm(weights, lr=lr, start=start),
    }
    outputs = {}
    for key, make in makers.items():
        weights = {name: float64(vectors[f"{case}/{name}/init"]).requires_grad_() for name in names}
        optimizer = make(list(weights.values()))
        trajectory: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for step in range(len(vectors[f"{case}/{names[0]}/grads"])):
            for name, weight in weights.items():
                weight.grad = float64(vectors[f"{case}/{name}/grads"][step])
            optimizer.step()
            for name, weight in weights.items():
                trajectory[name].append(weight.detach().numpy().copy())
        outputs |= {f"{name}/{key}": np.stack(steps) for name, steps in trajectory.items()}
    return outputs


# ---------------------------------------------------------------- batches and rates


def replay_division(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, Any]:
    [key] = [key for key in vectors if key.startswith(f"{case}/in_")]
    rows = vectors[key].tolist()
    divided = [
        adadagrad.divide(request, Division(last, micro, accumulation), world, max_global, max_micro)
        for request, last, micro, accumulation, world, max_global, max_micro in rows
    ]
    return {"out_global_micro_acc": np.asarray(divided)}


def replay_lr(vectors: Mapping[str, np.ndarray], case: str) -> dict[str, Any]:
    samples = vectors[f"{case}/samples"].tolist()
    return {"cosine_w100_d1000_min0.005_max0.05": [adadagrad.cosine_by_samples(each, 100, 1000, 0.005, 0.05) for each in samples]}
