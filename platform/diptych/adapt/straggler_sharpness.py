"""Sharpness along the way from a zero-shot to a fine-tuned model, layer by layer, to find the layers that interpolate badly.

Source: Abdollahpoorrostam, In Search of the Successful Interpolation: On the Role of Sharpness in CLIP Generalization (AdvML-Frontiers
workshop at NeurIPS 2024); sharpness in `sharpness.py`, interpolation as in WiSE-FT (Wortsman et al., CVPR 2022).

Where the paper is silent: a layer is one transformer or residual block, the stem, the projection, or the head (`layers.py`). Layer j's own
path takes the fine-tuned weights everywhere but in j. Stragglers are the layers whose instability lies above mean + 1 standard deviation.
The repair is in `sparsify.py`; `wise-ft` applies it to the layers that this benchmark names.

Shape legend: A points of the path, N pictures, C classes, D feature width, K figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from diptych.adapt.interpolation import interpolate
from diptych.adapt.sharpness import Attack, Batch, Loss, Predict, Sharpness, cross_entropy, worst_case_sharpness
from diptych.adapt.states import State
from diptych.core.config import Config as BaseConfig

if TYPE_CHECKING:
    from diptych.adapt.path_benchmark import PathBenchmark

Floats = NDArray[np.float64]
Layers = Mapping[str, Sequence[str]]
Refresh = Callable[[State], State]

TASK = "straggler-sharpness"
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
WHOLE = "whole"
LEAST_POINTS = 4
"""Points that a rank correlation with an interval needs."""


class Config(BaseConfig):
    """Accuracy, sharpness and instability on the path from a zero-shot model to the measured one."""

    directories: ClassVar[tuple[str, ...]] = ("origin",)

    method: Literal["straggler-sharpness"] = "straggler-sharpness"
    origin: str = Field(min_length=1, description="directory of the zero-shot model, the path's start; the measured model is its end")
    split: str = Field("test", min_length=1, description="the split whose accuracy and loss are followed along the path")
    sharpness_split: str = Field("train", min_length=1, description="the split whose batches are attacked; it needs labels too")
    templates: tuple[str, ...] = Field(("a photo of a {}.",), min_length=1, description="prompts, each with {} for the class name")
    classnames: str = Field("label_name", description="the column of class names; `label` numbers them")
    alphas: tuple[float, ...] = Field(ALPHAS, description="points of the path, increasing from 0 to 1")
    rho: float = Field(1e-3, gt=0, le=1, description="radius of the ball; relative to each weight if adaptive")
    norm: Literal["linf", "l2"] = Field("linf", description="the ball's norm")
    adaptive: bool = Field(True, description="measure changes in units of each weight's magnitude")
    steps: int = Field(20, ge=1, le=1000, description="steps of Auto-PGD a batch, each a forward and a backward pass")
    batches: int = Field(8, ge=1, description="batches that are attacked, each on its own")
    batch_size: int = Field(128, ge=1, description="pictures a batch")
    pictures: int = Field(2048, ge=1, description="pictures of the split at most, the first by key hash; they are held in memory")
    layers: Literal["none", "instability", "sharpness"] = Field(
        "instability", description="what is measured layer by layer; `sharpness` also attacks every layer at every point"
    )
    task: str = Field(
        TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric, where one set is measured twice"
    )

    @field_validator("alphas")
    @classmethod
    def _from_end_to_end(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if len(alphas) < 3 or (alphas[0], alphas[-1]) != (0, 1) or any(left >= right for left, right in pairwise(alphas)):
            raise ValueError("at least three increasing numbers, the first 0 and the last 1")
        return alphas

    @field_validator("templates")
    @classmethod
    def _renders(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(templates)) < len(templates) or any("{}" not in template for template in templates):
            raise ValueError("each template once and each with {} for the class name")
        return templates

    @property
    def attack(self) -> Attack:
        """The ball and the ascent, on normalised logits."""
        return Attack(self.rho, self.norm, self.adaptive, self.steps)

    def build(self) -> PathBenchmark:
        """The benchmark."""
        from diptych.adapt.path_benchmark import PathBenchmark

        return PathBenchmark(self)


# ---------------------------------------------------------------- along the path


@dataclass(frozen=True)
class PathReport:
    """What was measured at the points of a path.

    Attributes:
        alphas: the points, from 0 to 1.
        loss_AN, hit_AN: loss and 1/0 for right/wrong of every picture at every point, float64.
        layer_loss_AN: of the paths on which one layer alone moves.
        sharpness: `whole`, and, where asked for, every layer, at every point.
    """

    alphas: Sequence[float]
    loss_AN: Floats
    hit_AN: Floats
    layer_loss_AN: Mapping[str, Floats] = field(default_factory=dict)
    sharpness: Mapping[str, Sequence[Sharpness]] = field(default_factory=dict)

    @property
    def loss_A(self) -> Floats:
        """Mean loss at every point."""
        return np.asarray(self.loss_AN.mean(axis=1))

    @property
    def accuracy_A(self) -> Floats:
        """Accuracy at every point."""
        return np.asarray(self.hit_AN.mean(axis=1))

    @property
    def layer_loss(self) -> dict[str, Floats]:
        """Mean loss `[A]` on every layer's own path."""
        return {layer: np.asarray(loss_AN.mean(axis=1)) for layer, loss_AN in self.layer_loss_AN.items()}

    @property
    def instability(self) -> float:
        """The barrier of the whole path."""
        return float(instability(self.loss_A))

    @property
    def layer_instability(self) -> dict[str, float]:
        """The barrier of every layer's own path."""
        return {layer: float(instability(loss_A)) for layer, loss_A in self.layer_loss.items()}

    @property
    def inner_gain(self) -> float:
        """Accuracy of the best point between the ends less that of the better end; not above 0 is the failure of the interpolation."""
        return float(inner_gain(self.accuracy_A))

    def correlations(self) -> dict[str, Correlation]:
        """Rank correlation of sharpness with accuracy over the points, for the whole model and each layer; where neither is constant."""
        found = {name: rank_correlation([point.loss for point in row], self.accuracy_A) for name, row in self.sharpness.items()}
        return {name: correlation for name, correlation in found.items() if correlation}


def path_report(
    predict: Predict,
    theta0: State,
    theta1: State,
    layers: Layers,
    alphas: Sequence[float],
    held_out: Sequence[Batch],
    attacked: Sequence[Batch],
    attack: Attack,
    *,
    layer_losses: bool = True,
    layer_sharpness: bool = True,
    refresh: Refresh = dict,
    loss: Loss = cross_entropy,
) -> PathReport:
    """Measures the path `(1 - alpha) theta0 + alpha theta1`.

    Args:
        predict: the network as a function of its weights.
        theta0, theta1: zero-shot and fine-tuned weights, with the buffers that `predict` needs.
        layers: layer -> its tensors; all of them together are the whole model.
        alphas: points, from 0 to 1.
        held_out: what loss and accuracy are measured on, without normalising logits.
        attacked: what sharpness is measured on.
        attack: the ball and the ascent.
        layer_losses, layer_sharpness: whether to measure layer by layer.
        refresh: makes interpolated weights fit for use, e.g. recomputes batch-norm statistics.
        loss: of an example.

    Raises DataError for states that differ in kind or sets without batches.
    """
    whole = [name for members in layers.values() for name in members]
    points = [refresh(along(theta0, theta1, alpha)) for alpha in alphas]
    measured = [measure(predict, point, held_out, loss) for point in points]
    losses = {
        layer: np.stack([measure(predict, refresh(along(theta0, theta1, alpha, members)), held_out, loss)[0] for alpha in alphas])
        for layer, members in (layers.items() if layer_losses else ())
    }
    parts = {WHOLE: whole, **(layers if layer_sharpness else {})}
    sharpness = {
        part: [worst_case_sharpness(predict, point, attacked, attack, names, loss) for point in points] for part, names in parts.items()
    }
    loss_AN, hit_AN = (np.stack(rows) for rows in zip(*measured, strict=True))
    return PathReport(tuple(alphas), loss_AN, hit_AN, losses, sharpness)


def along(theta0: State, theta1: State, alpha: float, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The point `alpha` of the path; with `names`, of the path on which these alone move and all others are theta1's."""
    start = theta0 if names is None else {**theta1, **{name: theta0[name] for name in names}}
    return interpolate(start, theta1, alpha)


@torch.no_grad()
def measure(predict: Predict, weights: State, batches: Iterable[Batch], loss: Loss = cross_entropy) -> tuple[Floats, Floats]:
    """Loss and 1/0 for right/wrong of every example, float64 `[N]` each, in order."""
    losses, hits = [np.empty(0)], [np.empty(0)]
    for inputs, label_N in batches:
        logit_NC = predict(weights, inputs)
        losses.append(loss(logit_NC, label_N).double().cpu().numpy())
        hits.append((logit_NC.argmax(dim=-1) == label_N).double().cpu().numpy())
    return np.concatenate(losses), np.concatenate(hits)


def instability(loss_AxK: Floats) -> Floats:
    """The barrier: the largest loss on the path less the mean of its ends, over the first axis. Never below -|difference of the ends| / 2."""
    return np.asarray(loss_AxK.max(axis=0) - (loss_AxK[0] + loss_AxK[-1]) / 2)


def inner_gain(accuracy_AxK: Floats) -> Floats:
    """The best value between the ends less the better end, over the first axis."""
    return np.asarray(accuracy_AxK[1:-1].max(axis=0) - np.maximum(accuracy_AxK[0], accuracy_AxK[-1]))


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation in [-1, 1], its 95 % interval, and the points behind it."""

    value: float
    low: float
    high: float
    n: int


def rank_correlation(x: Sequence[float], y: Sequence[float] | Floats) -> Correlation | None:
    """Spearman's correlation with Bonett and Wright's interval (Psychometrika 2000); None under 4 points or where one side is constant.

    The interval takes points as independent; those of one path are not, so it is the least uncertainty rather than all of it.
    """
    from scipy.stats import spearmanr

    if len(x) < LEAST_POINTS or len(set(x)) == 1 or len(set(map(float, y))) == 1:
        return None
    value = float(np.clip(spearmanr(x, y).statistic, -1, 1))
    if abs(value) == 1:
        return Correlation(value, value, value, len(x))
    reach = 1.959964 * math.sqrt((1 + value**2 / 2) / (len(x) - 3))
    centre = math.atanh(value)
    return Correlation(value, math.tanh(centre - reach), math.tanh(centre + reach), len(x))


# ---------------------------------------------------------------- stragglers


def ranking(instability_by_layer: Mapping[str, float]) -> list[str]:
    """The layers from the least to the most stable; of equal ones in the order given."""
    return sorted(instability_by_layer, key=lambda layer: -instability_by_layer[layer])


def stragglers(instability_by_layer: Mapping[str, float], top: int | None = None) -> list[str]:
    """The layers above mean + 1 standard deviation (of the population), or the `top` least stable, least stable first."""
    order = ranking(instability_by_layer)
    if top is not None:
        return order[:top]
    values = np.array(list(instability_by_layer.values()))
    limit = values.mean() + values.std() if len(values) else 0.0
    return [layer for layer in order if instability_by_layer[layer] > limit]
