"""Replays AdaNPC: the vote, the ball, the loss and its gradient, the ring buffer, streams, and the batch-norm variant."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.adapt.adanpc import BatchNorm, Config, Memory, RingBuffer, knn_loss, remember, vote

Array = NDArray[np.generic]

TAU = 0.1
VOTE_TAUS = ("0.01", "0.1", "0.5")

INPUTS = (
    "vote_mem_raw", "vote_mem_y", "vote_x", "vote_k", "vote_C", "eps_on", "eps_off", "knn_loss_y", "ring_init", "ring_feats", "ring_labels",
    "stream_leftover_row", "stream_x", "stream_*_beta", "bn_leftover_row", "bn_lr", "bn_steps", "bn_k", "bn_T",
)  # fmt: skip

TOLERANCE = {"*_memory_y": (0, 0), "ring_index": (0, 0), "bn_weight": (1e-7, 1e-10), "bn_bias": (1e-7, 1e-10), "*": (1e-8, 1e-12)}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    given = {key: torch.from_numpy(np.array(vectors[key])) for key in vectors}
    outputs = votes(given) | loss(given) | ring(given) | batch_norm(given)
    betas = {key.removesuffix("_beta"): float(value) for key, value in given.items() if key.endswith("_beta")}
    for tag, beta in betas.items():
        outputs |= {f"{tag}_{name}": value for name, value in stream(given, beta).items()}
    return {key: value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value) for key, value in outputs.items()}


def source(given: Mapping[str, Tensor], leftover: str | None = None) -> Memory:
    return Memory(given["vote_mem_raw"], given["vote_mem_y"], leftover_1D=given[leftover] if leftover else None)


def votes(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    memory, classes, k = source(given), int(given["vote_C"]), int(given["vote_k"])
    rows = (given["vote_x"], memory.feature_MD, memory.label_M, classes)
    outputs = {"vote_mem_norm": memory.feature_MD, "vote_scores_k1": vote(*rows, 1, TAU)}
    outputs |= {f"vote_scores_T{tau}": vote(*rows, k, float(tau)) for tau in VOTE_TAUS}
    return outputs | {f"vote_scores_{name}": vote(*rows, k, TAU, float(given[name])) for name in ("eps_on", "eps_off")}


def loss(given: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    memory, x_BD = source(given), given["vote_x"].clone().requires_grad_()
    score_BC = vote(x_BD, memory.feature_MD, memory.label_M, int(given["vote_C"]), int(given["vote_k"]), TAU)
    value = knn_loss(score_BC, given["knn_loss_y"])
    value.backward()
    return {"knn_loss": value, "knn_loss_grad": x_BD.grad}


def ring(given: Mapping[str, Tensor]) -> dict[str, Tensor | int]:
    buffer = RingBuffer(given["ring_init"])
    for feature_BD, label_B in zip(given["ring_feats"], given["ring_labels"], strict=True):
        buffer.write(feature_BD, label_B)
    return {"ring_memory": buffer.feature_QD, "ring_memory_y": buffer.label_Q, "ring_index": buffer.index}


def stream(given: Mapping[str, Tensor], beta: float) -> dict[str, Tensor]:
    memory, scores = source(given, "stream_leftover_row"), []
    for x_BD in given["stream_x"]:
        scores.append(vote(x_BD, memory.feature_MD, memory.label_M, int(given["vote_C"]), int(given["vote_k"]), TAU))
        remember(memory, x_BD, scores[-1], beta)
    return {"scores": torch.stack(scores), "memory": memory.feature_MD, "memory_y": memory.label_M}


def batch_norm(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    memory = source(given, "bn_leftover_row")
    width, batches = memory.feature_MD.shape[1], 2
    config = Config(beta=0, bn_steps=int(given["bn_steps"]))
    layer = BatchNorm(width, float(given["bn_lr"]), torch.float64)

    def ballot(x_BD: Tensor) -> Tensor:
        return vote(x_BD, memory.feature_MD, memory.label_M, int(given["vote_C"]), int(given["bn_k"]), float(given["bn_T"]))

    scores = [layer.learn(x_BD, memory, ballot, config) for x_BD in given["stream_x"][:batches]]
    return {
        "bn_scores": torch.stack(scores),
        "bn_weight": layer.weight,
        "bn_bias": layer.bias,
        # The layer has no statistics: in evaluation mode they stay what a fresh layer has.
        "bn_running_mean": torch.zeros(width, dtype=torch.float64),
        "bn_running_var": torch.ones(width, dtype=torch.float64),
        "bn_memory": memory.feature_MD,
        "bn_memory_y": memory.label_M,
    }
