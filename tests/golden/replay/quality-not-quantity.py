"""Replays the lines of sources, effective robustness from the first source, clipping, and output ensembles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diptych.evaluate import effective_robustness as er
from diptych.evaluate.ensembles import combine
from diptych.evaluate.quality_not_quantity import hits

Array = NDArray[np.generic]

INPUTS = ("acc_id", "acc_ood", "grid_acc", "clip_correct", "clip_n", "ens_logits", "ens_labels", "ens_weights")

TOLERANCE = {"ens_mean_pred": (0, 0), "*": (1e-9, 1e-12)}

SPACES: tuple[er.Space, ...] = ("probit", "logit")


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    for space in SPACES:
        outputs |= {f"{space}_{key}": value for key, value in of_lines(vectors["acc_id"], vectors["acc_ood"], space).items()}
    lines = [er.fit_line(*pair, "probit") for pair in zip(vectors["acc_id"], vectors["acc_ood"], strict=True)]
    grid = np.asarray(vectors["grid_acc"])
    outputs["probit_line_at_grid"] = np.stack([er.expected(line, grid, "probit") for line in lines])
    n = int(vectors["clip_n"])
    outputs["clip_probit"] = er.transformed(np.asarray(vectors["clip_correct"], np.float64) / n, "probit", n)
    return outputs | ensembles(np.asarray(vectors["ens_logits"]), np.asarray(vectors["ens_labels"]), np.asarray(vectors["ens_weights"]))


def of_lines(acc_id: Array, acc_ood: Array, space: er.Space) -> dict[str, Array]:
    lines = [er.fit_line(*pair, space) for pair in zip(acc_id, acc_ood, strict=True)]
    beyond = [er.effective_robustness(lines[0], *pair, space) for pair in zip(acc_id, acc_ood, strict=True)]
    return {
        "slope": np.array([line.slope for line in lines]),
        "intercept": np.array([line.intercept for line in lines]),
        "r2": np.array([line.r**2 for line in lines]),
        "eff_rob_vs_source0": np.stack(beyond),
    }


def ensembles(logit_KNC: NDArray[np.float64], label_N: NDArray[np.int64], weight_K: NDArray[np.float64]) -> dict[str, Array]:
    mean_NC = combine(logit_KNC)
    return {
        "ens_mean_logits": mean_NC,
        "ens_mean_pred": mean_NC.argmax(axis=1),
        "ens_mean_acc": np.array(hits(mean_NC, label_N).mean()),
        "ens_weighted_logits": combine(logit_KNC, weight_K),
        "ens_mean_prob": combine(logit_KNC, of="probabilities"),
        "ens_single_acc": np.array([hits(logit_NC, label_N).mean() for logit_NC in logit_KNC]),
    }
