"""Sharpness of a tanh network in all four balls, along the straight line between two weights, and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from diptych.adapt import sharpness
from diptych.adapt import straggler_sharpness as stragglers
from diptych.adapt.interpolation import interpolate
from diptych.adapt.sharpness import Attack, Batch, worst_case_sharpness

INPUTS = ("theta0/*", "theta1/*", "x", "y", "rho_*", "n_iters", "path_alpha")
TOLERANCE = {"sharp_l2_adapt_*": (1e-3, 0.0), "apgd_checkpoints": (0.0, 0.0), "*": (1e-6, 1e-9)}
BALLS = {"linf_adapt": ("linf", True), "linf_plain": ("linf", False), "l2_plain": ("l2", False), "l2_adapt": ("l2", True)}


class Net(nn.Module):
    """Linear layers with tanh between them, under the names of the file: w0 b0 w1 b1 …, weights `[out, in]`."""

    def __init__(self, theta: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in theta.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        depth = len(list(self.parameters())) // 2
        for layer in range(depth):
            x = nn.functional.linear(x, getattr(self, f"w{layer}"), getattr(self, f"b{layer}"))
            x = x.tanh() if layer + 1 < depth else x
        return x


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    theta0, theta1 = (
        {k.partition("/")[2]: torch.from_numpy(vectors[k]) for k in vectors if k.startswith(p)} for p in ("theta0/", "theta1/")
    )
    predict = sharpness.predictor(Net(theta1))
    batches: list[Batch] = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(vectors["x"], vectors["y"], strict=True)]
    steps = int(vectors["n_iters"])
    outputs: dict[str, np.ndarray] = {"apgd_checkpoints": np.asarray(sharpness.checkpoints(steps))}
    for key in (key for key in vectors if key.startswith("rho_")):
        ball = key.removeprefix("rho_")
        norm, adaptive = BALLS[ball]
        for normalise in (False, True):
            for count, suffix in ((steps, ""), (1, "_1iter")):
                attack = Attack(float(vectors[key]), norm, adaptive, count, normalise)
                found = worst_case_sharpness(predict, theta1, batches[:2], attack)
                outputs[f"sharp_{ball}_norm{int(normalise)}{suffix}"] = np.asarray([found.loss, found.error])
    attack = Attack(float(vectors["rho_linf_adapt"]), steps=steps)
    return outputs | path(predict, theta0, theta1, batches, [float(alpha) for alpha in vectors["path_alpha"]], attack)


def path(
    predict: sharpness.Predict,
    theta0: Mapping[str, Tensor],
    theta1: Mapping[str, Tensor],
    batches: list[Batch],
    alphas: list[float],
    attack: Attack,
) -> dict[str, np.ndarray]:
    layers = {f"layer{j}": (f"w{j}", f"b{j}") for j in range(len(theta1) // 2)}
    report = stragglers.path_report(predict, theta0, theta1, layers, alphas, batches[2:], batches[:2], attack)
    columns = [report.loss_A, report.accuracy_A, *([found.loss for found in row] for row in report.sharpness.values())]
    outputs = {
        "path_loss_acc_sharp_layers": np.stack([np.asarray(column) for column in columns], axis=1),
        "path_instability": np.asarray(report.instability),
        "layer_path_loss": np.stack([report.layer_loss[layer] for layer in layers]),
        "layer_instability": np.asarray([report.layer_instability[layer] for layer in layers]),
    }
    for layer, names in layers.items():
        found = worst_case_sharpness(predict, interpolate(theta0, theta1, 1.0), batches[:2], attack, names)
        outputs[f"{layer}_sharp"] = np.asarray([[found.loss, found.error]])
    return outputs
