"""DIMAP: modules by name, LAMP scores, thresholds and masks of a Swin's matrices, beside one group for all and uniform magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diptych.compress import lamp
from diptych.compress.dimap import masks, module_of
from diptych.compress.magnitude import largest

INPUTS = ("weights/*", "param_names", "*/ratio")
TOLERANCE = {"score64/*": (1e-12, 0.0), "score/*": (2e-3, 1.3e-5), "*/threshold/*": (1e-12, 0.0)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    weights = {key.removeprefix("weights/"): torch.from_numpy(vectors[key]) for key in vectors if key.startswith("weights/")}
    scored = {name: lamp.scores(weight) for name, weight in weights.items()}
    outputs: dict[str, np.ndarray] = {"param_module": np.asarray([module_of(str(name)) for name in vectors["param_names"]])}
    outputs |= {f"score64/{name}": score.numpy() for name, score in scored.items()}
    outputs |= {f"score/{name}": score.float().numpy() for name, score in scored.items()}
    for key in vectors:
        if key.endswith("/ratio"):
            outputs |= {f"{key.removesuffix('ratio')}{name}": value for name, value in pruned(weights, scored, float(vectors[key])).items()}
    return outputs


def pruned(weights: Mapping[str, Tensor], scored: Mapping[str, Tensor], ratio: float) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    modules = {module: {name: weight for name, weight in weights.items() if module_of(name) == module} for module in ("qkv", "prj", "mlp")}
    for module, group in {**modules, "all": weights}.items():
        count = round(ratio * sum(weight.numel() for weight in group.values()))
        outputs[f"threshold/{module}"] = np.asarray(lamp.threshold({name: scored[name] for name in group}, count))
        kind = "keep_model" if module == "all" else "keep_module"
        outputs |= {f"{kind}/{name}": mask.numpy() for name, mask in masks(group, ratio).items()}
    outputs |= {f"keep_uniform/{name}": largest(weight.abs(), ratio).numpy() for name, weight in weights.items()}
    return outputs
