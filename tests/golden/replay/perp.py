"""PERP: training of selected parameters with three low-rank forms and their merge, in float64; pruning masks of a residual block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.compress import masks
from diptych.compress.adapters import Selection
from diptych.compress.blocks import Inputs, matrices
from diptych.compress.calibration import input_norms
from diptych.compress.perp import Config, select
from diptych.compress.retrain import rate, train

INPUTS = ("retrain/params/*", "retrain/x", "retrain/y", "retrain/lora_A0/*", "retrain/hyper/*", "prune/params/*", "prune/calib", "*/ratio")
TOLERANCE = {
    "retrain/*/y0": (1e-9, 1e-12),
    "retrain/*/grad*": (1e-9, 1e-12),
    "retrain/lrs": (1e-12, 0.0),
    "*": (0.0, 1e-7),
}

FORMS = ("lora_prune", "mask_lora", "scale_lora")
HEAD = "lm_head"
PATTERNS = ("2of4", "4of8")


class Model(nn.Module):
    """LayerNorm, two linear layers with a ReLU between them, and a head."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(len(weights["ln.weight"]))
        for name in ("fc1", "fc2", HEAD):
            outputs, inputs = weights[f"{name}.weight"].shape
            setattr(self, name, nn.Linear(inputs, outputs, bias=f"{name}.bias" in weights))
        self.double().load_state_dict(dict(weights))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.fc2(torch.relu(self.fc1(self.ln(x)))))
        return y


class Block(nn.Module):
    """Two linear layers with a ReLU between them, beside the identity."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("fc1", "fc2"):
            outputs, inputs = weights[f"{name}.weight"].shape
            setattr(self, name, nn.Linear(inputs, outputs))
        self.load_state_dict(dict(weights))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(torch.relu(self.fc1(x)))
        return y


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, Any] = {}
    for form in FORMS:
        outputs |= {f"retrain/{form}/{name}": value for name, value in retrained(vectors, form).items()}
    steps, lr = vectors["retrain/hyper/steps"].item(), vectors["retrain/hyper/lr"].item()
    outputs["retrain/lrs"] = np.asarray([rate(step, steps, lr) for step in range(steps)])
    outputs["retrain/trainable_names"] = np.asarray(sorted(map(theirs, selection(vectors, "mask_lora")[1].parameters())))
    cases = [key.split("/")[1:3] for key in vectors if key.startswith("prune/") and key.endswith("/ratio")]
    cases += [[method, pattern] for method in ("magnitude", "wanda") for pattern in PATTERNS]
    for method, case in cases:
        outputs |= {f"prune/{method}/{case}/pruned/{name}": value for name, value in pruned(vectors, method, case).items()}
    return outputs


def theirs(name: str) -> str:
    """peft's name of a parameter: masked layers are wrapped once more."""
    layer, _, leaf = name.rpartition(".")
    if leaf in ("A", "B"):
        layer = layer.removesuffix(".weight")
        return f"{layer}{'' if layer == HEAD else '.lora_layer'}.lora_{leaf}.default.weight"
    return f"{layer}.lora_layer.base_layer.{leaf}" if layer.startswith("fc") else name


def selection(vectors: Mapping[str, np.ndarray], form: Any) -> tuple[Model, Selection]:
    weights = {key.removeprefix("retrain/params/"): torch.from_numpy(vectors[key]) for key in vectors if key.startswith("retrain/params/")}
    model = Model(weights)
    zeros = {f"{name}.weight": getattr(model, name).weight.detach() != 0 for name in ("fc1", "fc2")}
    rank, alpha = vectors["retrain/hyper/lora_r"].item(), float(vectors["retrain/hyper/lora_alpha"].item())
    return model, select(model, zeros, [f"{HEAD}.weight"], Config(form=form, rank=rank, alpha=alpha))


def retrained(vectors: Mapping[str, np.ndarray], form: str) -> dict[str, np.ndarray]:
    model, chosen = selection(vectors, form)
    x, y = (torch.from_numpy(vectors[f"retrain/{name}"]).double() for name in "xy")
    for name, adapter in chosen.adapters.items():
        if form != "scale_lora" or name.startswith(HEAD):
            adapter.A.data.copy_(torch.from_numpy(vectors[f"retrain/lora_A0/{name.removesuffix('.weight')}"]))
    y0 = model(x)
    (y0 - y).square().mean().backward()
    outputs = {"y0": y0.detach()}
    for name, adapter in chosen.adapters.items():
        if not name.startswith(HEAD):
            outputs |= {f"grad{which}0/{name.removesuffix('.weight')}": getattr(adapter, which).grad.clone() for which in "AB"}
    losses = train(
        list(chosen.parameters().values()),
        lambda _: (model(x) - y).square().mean(),
        vectors["retrain/hyper/steps"].item(),
        vectors["retrain/hyper/lr"].item(),
    )
    for name, adapter in chosen.adapters.items():
        outputs |= {f"{which}/{name.removesuffix('.weight')}": getattr(adapter, which).detach().clone() for which in "AB"}
    outputs["y_before_merge"] = model(x).detach()
    chosen.merge()
    outputs["y_after_merge"] = model(x).detach()
    outputs |= {f"merged/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return {name: value.numpy() for name, value in outputs.items()} | {"losses": np.asarray(losses)}


def pruned(vectors: Mapping[str, np.ndarray], method: str, case: str) -> dict[str, np.ndarray]:
    block = Block({key.removeprefix("prune/params/"): torch.from_numpy(vectors[key]) for key in vectors if key.startswith("prune/params/")})
    norms = input_norms(block, "", [Inputs(sample[None]) for sample in torch.from_numpy(vectors["prune/calib"])])
    removed, _, group = case.partition("of")
    found = {}
    for matrix in matrices(block, ""):
        score = matrix.weight.detach().abs() * (norms[matrix.name] if method == "wanda" else 1)
        if group:
            keep = masks.n_of_m_by_topk(score, int(group) - int(removed), int(group))
        else:
            keep = masks.above_threshold(score, vectors[f"prune/{method}/{case}/ratio"].item())
        found[matrix.name.removeprefix(".")] = ~keep.numpy()
    return found
