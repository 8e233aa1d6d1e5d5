"""GBLM-Pruner, Wanda, SparseGPT and magnitude: gradients and masks of two residual blocks, blocks in order, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from diptych.compress import gblm, masks, sparsegpt
from diptych.compress.blocks import Inputs, Matrix, matrices, through
from diptych.compress.calibration import OneShot, input_moments
from diptych.compress.magnitude import masks_of

INPUTS = ("weights/*", "calib", "targets", "grad_scale", "*/ratio")
TOLERANCE = {"sample_grads/*": (1e-4, 1e-6), "grad_l?_f16/*": (1e-3, 1e-6), "sparsegpt/*/weights/*": (0.0, 2e-5)}

SCORES = {"gblm_l2": "gblm", "gblm_l1": "gblm", "wanda": "wanda", "wanda_variant": "wanda", "gradient_only": "gradient"}


class Block(nn.Module):
    """Two linear layers around a tanh, beside the identity."""

    def __init__(self, fc1: Tensor, fc2: Tensor) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in (fc1, fc2))
        for layer, weight in ((self.fc1, fc1), (self.fc2, fc2)):
            layer.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


def model_of(vectors: Mapping[str, np.ndarray]) -> dict[str, nn.Module]:
    weights = {key.removeprefix("weights/"): torch.from_numpy(vectors[key]) for key in vectors if key.startswith("weights/")}
    blocks = list(dict.fromkeys(name.removesuffix(".weight").rpartition(".")[0] for name in weights))
    return {name: Block(weights[f"{name}.fc1.weight"], weights[f"{name}.fc2.weight"]) for name in blocks}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    scale = vectors["grad_scale"].item()
    parameters = {matrix.name: matrix.weight for matrix in of(model_of(vectors))}
    gradients = {norm: gradient(vectors, norm, scale) for norm in ("l2", "l1")}
    outputs = {f"grad_{norm}_f16/{name}": gradients[norm][name].numpy() for norm in gradients for name in parameters}
    for name in parameters:
        samples = [gradient(vectors, "l1", 1.0, sample, signed=True)[name] for sample in range(len(vectors["calib"]))]
        outputs[f"sample_grads/{name}"] = torch.stack(samples).numpy()
    for key in vectors:
        if key.endswith("/ratio"):
            method, case, _ = key.split("/")
            outputs |= {f"{method}/{case}/{name}": value for name, value in pruned(vectors, method, case, gradients).items()}
    return outputs


def of(blocks: Mapping[str, nn.Module]) -> list[Matrix]:
    return [matrix for name, block in blocks.items() for matrix in matrices(block, name)]


def gradient(
    vectors: Mapping[str, np.ndarray], norm: str, scale: float, sample: int | None = None, signed: bool = False
) -> dict[str, Tensor]:
    """Gradient norms over all samples, or the plain gradient of one."""
    blocks, calib, targets = model_of(vectors), torch.from_numpy(vectors["calib"]), torch.from_numpy(vectors["targets"])
    parameters = {matrix.name: matrix.weight for matrix in of(blocks)}

    def loss(index: int) -> Tensor:
        x = calib[index : index + 1]
        for block in blocks.values():
            x = block(x)
        return (x - targets[index : index + 1]).square().mean()

    if signed:
        assert sample is not None
        return dict(zip(parameters, torch.autograd.grad(loss(sample), list(parameters.values())), strict=True))
    losses = [lambda index=index: loss(index) for index in range(len(calib))]
    return gblm.gradient_norms(parameters, losses, norm, scale, half=True)  # type: ignore[arg-type]


def pruned(vectors: Mapping[str, np.ndarray], method: str, case: str, gradients: Mapping[str, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    blocks, ratio = model_of(vectors), vectors[f"{method}/{case}/ratio"].item()
    states = [Inputs(sample[None]) for sample in torch.from_numpy(vectors["calib"])]
    removed, _, group = case.partition("of")
    pattern = f"{int(group) - int(removed)}:{group}" if group else "unstructured"
    config = OneShot(sparsity=ratio, pattern=pattern)
    for name, block, inputs in through(blocks, states):
        if method == "sparsegpt":
            moments = input_moments(block, name, inputs)
            for matrix in matrices(block, name):
                keep, weight = sparsegpt.reconstruct(
                    matrix.weight, moments[matrix.name], ratio, pattern, name=matrix.name, official_threshold=True
                )
                matrix.weight.data.copy_(weight)
                masks.put(matrix, keep)
        elif method == "magnitude":
            for matrix in matrices(block, name):
                size = matrix.weight.detach().abs()
                kept = int(group) - int(removed) if group else 0
                masks.put(matrix, masks.n_of_m_by_topk(size, kept, int(group)) if group else masks.above_threshold(size, ratio))
        else:
            chosen = gradients["l1" if method == "gblm_l1" else "l2"] if method.startswith("g") else {}
            gblm.GBLM(config, SCORES[method], variant=method == "wanda_variant").prune(block, name, inputs, chosen)  # type: ignore[arg-type]
    kept = {f"{name}.{mask}": value for name, block in blocks.items() for mask, value in masks_of(block).items()}
    found = {f"pruned/{name}": ~mask.numpy() for name, mask in kept.items()}
    if method == "sparsegpt":
        found |= {f"weights/{matrix.name}": matrix.weight.detach().numpy() for matrix in of(blocks)}
    return found
