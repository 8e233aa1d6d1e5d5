"""Replays the Gaussian discriminant fits: few-shot, base-to-new, and rounds of EM."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diptych.adapt import gda

Array = NDArray[np.generic]
Floats = NDArray[np.float64]

LOGIT_SCALE = 100.0
EM_ROUNDS = 2

INPUTS = (
    "few_*_x", "few_*_y", "few_*_text_w",
    "b2n_x", "b2n_y", "b2n_*_x", "b2n_*_y", "b2n_text_*", "b2n_k",
    "em_x", "em_text", "em_gamma0", "em_alpha",
)  # fmt: skip

TOLERANCE = {"*best_alpha": (0, 0), "b2n_alpha": (0, 0), "*acc": (1e-12, 0), "*": (1e-7, 1e-9)}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    cases = sorted({found[1] for key in vectors if (found := re.match(r"(few_.+)_text_w$", key))})
    outputs: dict[str, Array] = {}
    for case in cases:
        outputs |= {f"{case}_{key}": value for key, value in few_shot(under(vectors, f"{case}_")).items()}
    for prefix, part in (("b2n_", base_to_new), ("em_", em)):
        if given := under(vectors, prefix):
            outputs |= {f"{prefix}{key}": value for key, value in part(given).items()}
    return {key: np.asarray(value) for key, value in outputs.items()}


def under(vectors: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {key.removeprefix(prefix): np.asarray(vectors[key]) for key in vectors if key.startswith(prefix)}


def unit(x_ND: Array) -> Floats:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def percent(logit_NC: Floats, label_N: Array) -> float:
    return 100 * int((logit_NC.argmax(axis=1) == label_N).sum()) / len(label_N)


def chosen(given: dict[str, Array], gaussian: gda.Linear, text_CD: Floats) -> tuple[float, float]:
    """Alpha, and the percentage it gets right on validation."""
    x_ND = given["val_x"]
    zero_shot_NC = LOGIT_SCALE * x_ND @ text_CD.T
    alpha = gda.choose_alpha(zero_shot_NC, gaussian.logits(x_ND), given["val_y"]).alpha
    return alpha, percent(gaussian.beside(text_CD, LOGIT_SCALE, alpha).logits(x_ND), given["val_y"])


def few_shot(given: dict[str, Array]) -> dict[str, Array]:
    x_ND, text_CD = unit(given["x"]), np.ascontiguousarray(given["text_w"].T)
    gaussians = gda.fit_few_shot(x_ND, given["y"], len(text_CD))
    gaussian = gaussians.classifier()
    alpha, accuracy = chosen(given, gaussian, text_CD)
    logit_NC = gaussian.beside(text_CD, LOGIT_SCALE, alpha).logits(given["test_x"])
    return {
        "vecs": x_ND,
        "mus": gaussians.mean_CD,
        "cov_inv": gaussians.precision_DD,
        "W": gaussian.weight_DC,
        "b": gaussian.bias_C,
        "best_alpha": alpha,
        "best_val_acc": accuracy,
        "test_logits": logit_NC,
        "test_acc": percent(logit_NC, given["test_y"]),
    }


def base_to_new(given: dict[str, Array]) -> dict[str, Array]:
    x_ND, base_CD, new_CD = unit(given["x"]), given["text_base_w"].T, given["text_new_w"].T
    base = gda.fit_base(x_ND, given["y"], len(base_CD)).classifier()
    gaussians = gda.fit_new(x_ND, new_CD, int(given["k"]), int(given["text_copies"]))
    new = gaussians.classifier()
    alpha, _ = chosen(given, base, base_CD)
    new_logit_NC = new.beside(new_CD, LOGIT_SCALE, alpha).logits(given["test_new_x"])
    return {
        "W_base": base.weight_DC,
        "b_base": base.bias_C,
        "mu_new": gaussians.mean_CD,
        "cov_inv_new": gaussians.precision_DD,
        "W_new": new.weight_DC,
        "b_new": new.bias_C,
        "alpha": alpha,
        "new_logits": new_logit_NC,
        "base_acc": percent(base.beside(base_CD, LOGIT_SCALE, alpha).logits(given["test_base_x"]), given["test_base_y"]),
        "new_acc": percent(new_logit_NC, given["test_new_y"]),
    }


def em(given: dict[str, Array]) -> dict[str, Array]:
    x_ND, text_CD, gamma_NC = given["x"], given["text"], given["gamma0"]
    outputs: dict[str, Array] = {}
    for index in range(EM_ROUNDS):
        mixture = gda.m_step(x_ND, gamma_NC)
        ensemble = gda.mixture_classifier(mixture, len(x_ND)).beside(text_CD, LOGIT_SCALE, float(given["alpha"]))
        gamma_NC = gda.softmax(ensemble.logits(x_ND))
        step = {"mu": mixture.mean_CD, "sigma": mixture.covariance_DD, "logits": ensemble.logits(x_ND), "gamma": gamma_NC}
        outputs |= {f"{key}_it{index}": value for key, value in step.items()}
    return outputs
