"""FLAP: moments, the choice of heads and neurons in four structures and three metrics, and the biases, on stored inputs of a gated model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.compress.fluctuation import (
    Kept,
    Moments,
    adaptive,
    compensation,
    feature_scores,
    pooled,
    standardised,
    thresholded,
    uniform,
)

INPUTS = (
    "layer*/*/inputs",
    "layer*/*/weight",
    "head_dim",
    "num_heads",
    "pruning_ratio",
    "remove_heads",
    "*/rel_output_mse",  # of the whole model, whose other weights are not here
    "batch2/*",  # what goes wrong with batches, in the published code alone
)
TOLERANCE = {"stats/*": (1e-4, 1e-7), "*_bias": (0.0, 1e-5), "*/kept_param_share": (1e-9, 0.0)}

CASES = ("ALAM_WIFV", "ALAM_IFV", "ALAM_WIFN", "ULUM_WIFV", "ULMM_WIFV", "ALMM_WIFV", "ALAM_WIFV_exact_cost")
GATED = 3
READERS = ("o_proj", "down_proj")
STATS = {"fluc": "fluctuation", "sqnorm": "square", "baseline": "mean"}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    layers = sorted({key.split("/")[0] for key in vectors if key.startswith("layer")}, key=lambda name: int(name.removeprefix("layer")))
    moments = {(layer, reader): moments_of(torch.from_numpy(vectors[f"{layer}/{reader}/inputs"])) for layer in layers for reader in READERS}
    outputs = {
        f"stats/{stat}/{layer}/{reader}": getattr(each, name).numpy()
        for (layer, reader), each in moments.items()
        for stat, name in STATS.items()
    }
    for case in CASES:
        outputs |= {f"{case}/{name}": value for name, value in pruned(vectors, layers, moments, case).items()}
    return outputs


def moments_of(inputs_NLI: Tensor) -> Moments:
    """In batches of odd sizes, which must not matter."""
    moments = Moments(inputs_NLI.shape[-1])
    for part in inputs_NLI.split(3):
        moments.add(part)
    return moments


def pruned(vectors: Mapping[str, np.ndarray], layers: list[str], moments: Mapping[Any, Moments], case: str) -> dict[str, np.ndarray]:
    weights = {(layer, reader): torch.from_numpy(vectors[f"{layer}/{reader}/weight"]) for layer in layers for reader in READERS}
    kept = choose(vectors, layers, weights, moments, case)
    head_width, width = vectors["head_dim"].item(), len(weights[layers[0], "o_proj"])
    heads, neurons = torch.stack([one.heads for one in kept]), torch.stack([one.neurons for one in kept])
    left = 4 * head_width * width * int(heads.sum()) + GATED * width * int(neurons.sum())
    total = 4 * head_width * width * heads.numel() + GATED * width * neurons.numel()
    outputs = {"attn_keep": heads.numpy(), "mlp_keep": neurons.numpy(), "kept_param_share": np.asarray(left / total)}
    for layer, one in zip(layers, kept, strict=True):
        for reader, gone in (("o_proj", ~one.heads.repeat_interleave(head_width)), ("down_proj", ~one.neurons)):
            mean = moments[layer, reader].mean.half().float()  # as the published code stores it
            outputs[f"{layer}/{reader}_bias"] = compensation(weights[layer, reader], mean, gone).numpy()
    return outputs


def choose(vectors: Mapping[str, np.ndarray], layers: list[str], weights: Any, moments: Any, case: str) -> list[Kept]:
    structure, metric = case.split("_")[:2]
    scores = [
        tuple(feature_scores(metric.lower(), weights[layer, reader], moments[layer, reader]) for reader in READERS) for layer in layers
    ]  # type: ignore[arg-type]
    scores = [(attention.square(), mlp) for attention, mlp in scores]
    head_width, ratio, width = vectors["head_dim"].item(), vectors["pruning_ratio"].item(), len(weights[layers[0], "o_proj"])
    widths = [head_width] * len(layers)
    if structure == "ALAM":
        cost = 4 * head_width / GATED if case.endswith("exact_cost") else 4 * head_width // GATED
        heads = [pooled(standardised(attention), head_width, "mean") for attention, _ in scores]
        return adaptive(heads, [standardised(mlp) for _, mlp in scores], [(cost, 1)] * len(layers), ratio)
    if structure == "ALMM":
        return thresholded(scores, widths, vectors["remove_heads"].item(), ratio, GATED, width)
    return uniform(scores, widths, vectors["remove_heads"].item() if structure == "ULMM" else None, ratio, GATED, width)
