"""AdaWAC: losses, weights and gradients of every mode over successive batches, the terms of a batch, and learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from diptych.objectives.adawac import ONE_VIEW, AdaWac, Config, Mode, Terms, segmentation_terms
from diptych.train.schedule import constant_with_cooldown, cosine

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = (
    "logits[12]", "latent[12]", "y[12]", "idx", "num_samples", "lr_w", "dac_encoder", "dice_ratio", "trim_ratio", "entropy_max", "lr_base",
)  # fmt: skip

TOLERANCE: dict[str, tuple[float, float]] = {"*_batch_num_step1": (0, 0), "lr_*": (1e-12, 0), "*": (1e-7, 1e-12)}

EPOCHS, BATCHES, MAX_ITERATIONS, BATCH_SIZE, POWER = 20, 10, 200, 10, 0.9
SEEN_BATCHES = (0, 7)
WATCHED_STEP = 1


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    outputs = learning_rates(float(vectors["lr_base"]))
    for mode in get_args(Mode):
        outputs |= run(mode, vectors)
    terms, _ = terms_of("adawac", vectors, WATCHED_STEP)
    outputs |= {"ce_step1": terms.supervised_N, "dac_step1": terms.consistency_N}
    outputs["dice_step1"] = ((terms.dice_1 + terms.dice_2) / 2).expand(len(terms.first_N))
    return {name: value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value) for name, value in outputs.items()}


def terms_of(mode: Mode, vectors: Mapping[str, Array], step: int) -> tuple[Terms, dict[str, torch.Tensor]]:
    """The terms of a step and the leaves that they were made of."""
    names = ("logits1", "logits2", "latent1", "latent2")
    leaves = {name: torch.tensor(np.asarray(vectors[name][step]), dtype=torch.float64, requires_grad=True) for name in names}
    labels = tuple(torch.tensor(np.asarray(vectors[name][step])).long() for name in ("y1", "y2"))
    lambda_ac = 0.0 if mode in ONE_VIEW else float(vectors["dac_encoder"])
    terms = segmentation_terms((leaves["logits1"], leaves["logits2"]), labels, (leaves["latent1"], leaves["latent2"]), lambda_ac)
    return terms, leaves


def run(mode: Mode, vectors: Mapping[str, Array]) -> dict[str, object]:
    settings = {"eta_w": "lr_w", "dice_ratio": "dice_ratio", "trim_ratio": "trim_ratio", "entropy": "entropy_max"}
    config = Config(mode=mode, clip=None, density="label", **{field: float(vectors[key]) for field, key in settings.items()})
    objective = AdaWac(config)
    objective.allocate(int(vectors["num_samples"]))
    objective.log_weight_R2 = torch.full_like(objective.log_weight_R2, 0.5, dtype=torch.float64).log()
    outputs: dict[str, object] = {}
    losses, tables = [], []
    for step, row_N in enumerate(torch.tensor(np.asarray(vectors["idx"])).long()):
        terms, leaves = terms_of(mode, vectors, step)
        loss = objective.step(row_N, terms)
        losses.append(loss.detach())
        tables.append(objective.weight_R2)
        if step == WATCHED_STEP:
            loss.backward()
            for name, leaf in leaves.items():
                outputs[f"{mode}_grad_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            outputs[f"{mode}_batch_num_step1"] = float(objective.kept(terms, objective.gathered(row_N, terms))[1])
    return {**outputs, f"{mode}_losses": torch.stack(losses), f"{mode}_weights": torch.stack(tables)}


def learning_rates(base: float) -> dict[str, object]:
    """By epoch, or by iteration for the polynomial ones; `magic` starts at 0.2 a batch of 256."""
    visits = [(epoch, epoch * BATCHES + batch) for epoch in range(EPOCHS) for batch in SEEN_BATCHES]
    magic = 0.2 * BATCH_SIZE / 256

    def polynomial(start: float) -> list[float]:
        return [constant_with_cooldown(iteration, start, 0, MAX_ITERATIONS, MAX_ITERATIONS, POWER) for _, iteration in visits]

    return {
        "lr_no_decay": [constant_with_cooldown(iteration, base, 0, MAX_ITERATIONS, 0) for _, iteration in visits],
        "lr_cos": [cosine(epoch, base, 0, EPOCHS) for epoch, _ in visits],
        "lr_poly": polynomial(base),
        "lr_magic": polynomial(magic),
    }
