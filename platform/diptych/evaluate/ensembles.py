"""Ensembles of classifiers by their outputs: the mean of class logits, or of class probabilities.

Logits must each carry their own model's scale (`exp(logit_scale)` times the cosine): a mean of bare cosines would weigh the models
otherwise than their own softmax does.

Shape legend: K models, N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diptych.core.errors import ConfigError
from diptych.evaluate.calibration import softmax

Floats = NDArray[np.float64]
Of = Literal["logits", "probabilities"]


def shares_of(weights: Sequence[float] | NDArray[np.floating] | None, models: int) -> Floats:
    """The models' shares `[K]`, adding up to 1; equal without weights. Raises ConfigError for weights that give none."""
    share_K = np.ones(models) if weights is None else np.asarray(weights, np.float64)
    if share_K.shape != (models,) or (share_K < 0).any() or not share_K.sum() > 0:
        raise ConfigError.at("These are no weights of an ensemble", "weights", weights, f"{models} numbers >= 0, not all 0")
    return np.asarray(share_K / share_K.sum())


def combine(logit_KNC: ArrayLike, weights: Sequence[float] | NDArray[np.floating] | None = None, of: Of = "logits") -> Floats:
    """The ensemble's scores, float64 `[N, C]`: the weighted mean of the models' logits, or of their softmax.

    The two may predict different classes: a mean of logits lets one sure model outvote several unsure ones. Raises ConfigError for
    weights that do not fit.
    """
    score_KNC = np.asarray(logit_KNC, np.float64)
    share_K = shares_of(weights, len(score_KNC))
    if of == "probabilities":
        score_KNC = np.stack([softmax(logit_NC) for logit_NC in score_KNC])
    return np.asarray(np.tensordot(share_K, score_KNC, axes=1))
