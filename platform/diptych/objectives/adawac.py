"""AdaWAC: every pair has two weights, of its supervised loss and of the consistency of two views of its picture; they learn as it trains.

Dong, Xie and Ward, "Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization under Concept Shift"
(ICML 2023), section 4 and algorithm 1: online mirror descent on a saddle-point problem, minimal in the model and maximal in the weights. Pairs
with much to learn from their label stay with it, pairs with little turn to consistency. The same losses serve segmentation (`segmentation_terms`)
and dual encoders. `mode` also has the baselines of the released code.

Shape legend: N pairs on this rank, R pairs of the whole set, K classes, H W places, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize, one_hot

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoded, TrainContext
from diptych.objectives.clip import clip_logits
from diptych.objectives.gather import gather, world_size
from diptych.objectives.prompts import ClassPrompts, Templates

Mode = Literal["adawac", "base", "pair", "pseudo", "trim_train", "trim_ratio", "reweight_only", "pm_dro", "dac_only"]

ONE_VIEW: frozenset[Mode] = frozenset({"base", "reweight_only", "pm_dro"})
SMOOTH = 1e-5


class Terms(NamedTuple):
    """What a batch is judged by.

    Attributes:
        first_N, second_N: supervised losses of the first and the second view.
        consistency_N: distance of the two views' features, times lambda.
        dense_N: bool, pairs with a label to learn from.
        dice_1, dice_2: losses of the whole batch, scalars; they are not weighted.
    """

    first_N: Tensor
    second_N: Tensor
    consistency_N: Tensor
    dense_N: Tensor
    dice_1: Tensor
    dice_2: Tensor

    @property
    def supervised_N(self) -> Tensor:
        """The mean over both views."""
        return (self.first_N + self.second_N) / 2


def consistency(latent_1: Tensor, latent_2: Tensor) -> Tensor:
    """Mean squared distance `[N]` of two views' features of any equal shape `[N, …]`. The views are compared as they are, turned or mirrored."""
    return (latent_1 - latent_2).square().flatten(1).mean(dim=1)


def dice_loss(logits_NKHW: Tensor, label_NHW: Tensor) -> Tensor:
    """One minus the soft Dice coefficient of each class over the whole batch, the mean over all classes with the background."""
    prob_NKHW = logits_NKHW.softmax(dim=1)
    target_NKHW = one_hot(label_NHW, logits_NKHW.shape[1]).movedim(-1, 1).to(prob_NKHW.dtype)
    both_K, prob_K, target_K = (x.sum(dim=(0, 2, 3)) for x in (prob_NKHW * target_NKHW, prob_NKHW.square(), target_NKHW))
    return (1 - (2 * both_K + SMOOTH) / (prob_K + target_K + SMOOTH)).mean()


def segmentation_terms(
    logits: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], latents: tuple[Tensor, Tensor], lambda_ac: float
) -> Terms:
    """The terms of pictures labelled place by place; a picture of background alone (class 0, in the first view) is label-sparse.

    Args:
        logits, labels, latents: of both views: `[N, K, H, W]`, int64 `[N, H, W]`, and the encoder's output `[N, …]`.
        lambda_ac: weight of the consistency.
    """
    first_N, second_N = (
        cross_entropy(logits_NKHW, label_NHW, reduction="none").mean(dim=(1, 2))
        for logits_NKHW, label_NHW in zip(logits, labels, strict=True)
    )
    dice_1, dice_2 = (dice_loss(logits_NKHW, label_NHW) for logits_NKHW, label_NHW in zip(logits, labels, strict=True))
    return Terms(first_N, second_N, lambda_ac * consistency(*latents), labels[0].flatten(1).any(dim=1), dice_1, dice_2)


class Seen(NamedTuple):
    """The terms of a batch over all ranks, detached."""

    row_N: Tensor
    first_N: Tensor
    supervised_N: Tensor
    consistency_N: Tensor
    dense_N: Tensor


class AdaWac(nn.Module):
    """The objective. Its state is a table of log-weights `[R, 2]`, the same on every rank."""

    log_weight_R2: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.views = () if config.mode in ONE_VIEW else (config.view,)
        self.encodes = ("text",) if config.supervised == "caption" else ()
        by_label = ("label",) if config.supervised == "label" else ()
        self.columns = by_label + ((config.density,) if config.density is not None and config.density not in by_label else ())
        self.prompts: ClassPrompts | None = None

    def start(self, context: TrainContext) -> None:
        """Makes the table of the training pairs and, to learn from labels, reads the classes. Raises ConfigError without class names."""
        self.allocate(context.rows)
        if self.config.supervised == "label":
            self.prompts = ClassPrompts(context, self.config.templates)

    def allocate(self, rows: int) -> None:
        """Makes the table: both weights of each row are 1/2."""
        self.register_buffer("log_weight_R2", torch.full((rows, 2), 0.5).log())

    @property
    def weight_R2(self) -> Tensor:
        """The weights of every pair: of supervision and of consistency. With one view only the first column has a meaning."""
        return self.log_weight_R2.exp()

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss` and its parts before weighting, `supervised` and `consistency`; `weight`, the mean weight of supervision in the batch;
        `weight_dense` and `weight_sparse`, that of its label-dense and of its label-sparse pairs, where it has any.

        The pair's own picture is the first view, `view0_NCHW` the second.
        """
        batch = encoded.batch
        pictures = [batch["image_NCHW"], *([batch["view0_NCHW"]] if self.views else [])]
        latent_ND, *others = encoded.encode_image(torch.cat(pictures), normalize=False).chunk(len(pictures))
        second_ND = others[0] if others else latent_ND
        supervised = [self._supervised(normalize(each_ND, dim=-1), encoded) for each_ND in (latent_ND, *others)]
        distance_N = self.config.lambda_ac * consistency(latent_ND, second_ND)
        terms = Terms(supervised[0], supervised[-1], distance_N, self._dense(batch), *(latent_ND.new_zeros(2)))
        loss = self.step(batch["row_N"], terms)
        means = {"supervised": terms.supervised_N.mean(), "consistency": terms.consistency_N.mean()}
        weight_N = self.log_weight_R2[batch["row_N"], 0].exp()
        parts = {"weight": weight_N.mean(), **_by_kind(weight_N, terms.dense_N)}
        return {"loss": loss, **{name: value.detach() for name, value in means.items()}, **parts}

    def step(self, row_N: Tensor, terms: Terms) -> Tensor:
        """Moves the weights of the batch's rows, then gives the loss under the moved weights: a scalar, a mean over the pairs of all ranks.

        Args:
            row_N: int64, rows of the table; of rows that come twice the last counts.
            terms: carry gradients; the weights never do.
        """
        seen = self.gathered(row_N, terms)
        with torch.no_grad():
            self._move(seen)
            weight_N2 = self.log_weight_R2[row_N].exp()
        weighted_N, kept_N, kept = self._weighted(terms, weight_N2, seen)
        share = self.config.dice_ratio
        dice = terms.dice_1 if self.config.mode in ONE_VIEW else (terms.dice_1 + terms.dice_2) / 2
        # The released code counts the Dice loss for the pairs that are left out, too.
        loss_N = share * dice + (1 - share) * kept_N * weighted_N
        return (kept > 0) * loss_N.sum() / kept.clamp(min=1) * world_size()

    def kept(self, terms: Terms, seen: Seen) -> tuple[Tensor, Tensor]:
        """Which pairs of this rank count, bool `[N]`, and how many do on all ranks: the trimmed modes leave some out."""
        match self.config.mode:
            case "trim_train":
                return terms.dense_N, seen.dense_N.sum()
            case "trim_ratio":
                least = seen.supervised_N.quantile(self.config.trim_ratio)
                return terms.supervised_N.detach() > least, (seen.supervised_N > least).sum()
        everything_N = torch.ones_like(terms.dense_N)
        return everything_N, torch.ones_like(seen.dense_N).sum()

    def _weighted(self, terms: Terms, weight_N2: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs' losses under the mode, `[N]`, and what `kept` says of them."""
        both_N, distance_N = terms.supervised_N, terms.consistency_N
        match self.config.mode:
            case "adawac":
                loss_N = weight_N2[:, 0] * both_N + weight_N2[:, 1] * distance_N
            case "base":
                loss_N = terms.first_N
            case "reweight_only" | "pm_dro":
                loss_N = weight_N2[:, 0] * terms.first_N
            case "pair":
                loss_N = both_N
            case "pseudo":
                loss_N = torch.where(terms.dense_N, both_N, distance_N)
            case "trim_train" | "trim_ratio" | "dac_only":
                loss_N = (both_N + distance_N) / 2
        return loss_N, *self.kept(terms, seen)

    def _move(self, seen: Seen) -> None:
        """The step of mirror descent (algorithm 1), in logarithms, so that a weight that was next to nothing can come back."""
        config, log_N2 = self.config, self.log_weight_R2[seen.row_N]
        match config.mode:
            case "adawac":
                logit_N = log_N2[:, 0] - log_N2[:, 1] + config.eta_w * (seen.supervised_N - seen.consistency_N)
                logit_N = logit_N if config.clip is None else logit_N.clamp(-config.clip, config.clip)
                self.log_weight_R2[seen.row_N] = torch.stack([logsigmoid(logit_N), logsigmoid(-logit_N)], dim=1)
            case "reweight_only" | "pm_dro":
                decay = config.eta_w * config.entropy if config.mode == "pm_dro" else 0.0
                log_N = (1 - decay) * log_N2[:, 0] + config.eta_w * seen.first_N
                self.log_weight_R2[seen.row_N, 0] = log_N.log_softmax(dim=0)  # over the batch, not over a pair's two weights

    def gathered(self, row_N: Tensor, terms: Terms) -> Seen:
        """Every rank sees all of the batch, so that all hold the same table. Row numbers are exact in float64."""
        columns = (row_N, terms.first_N, terms.supervised_N, terms.consistency_N, terms.dense_N)
        whole_N5 = gather(torch.stack([column.detach().double() for column in columns], dim=1), with_grad=False)
        row_N, *losses, dense_N = whole_N5.unbind(dim=1)
        first_N, supervised_N, consistency_N = (loss_N.to(self.log_weight_R2.dtype) for loss_N in losses)
        return Seen(row_N.long(), first_N, supervised_N, consistency_N, dense_N > 0)

    def _supervised(self, image_ND: Tensor, encoded: Encoded) -> Tensor:
        """The loss `[N]` of one view against its caption (the contrastive loss of the pair) or its label (0 where there is none)."""
        if self.prompts is not None:
            logits_NK = encoded.logit_scale * image_ND @ self.prompts.weights(encoded).T
            label_N = self.prompts.classes(encoded.batch["label_N"])
            return cross_entropy(logits_NK, label_N, ignore_index=-1, reduction="none")
        logits = clip_logits(image_ND, encoded.text_ND, encoded.logit_scale, local_loss=True, gather_with_grad=True)
        by_image_N, by_text_N = (cross_entropy(side, logits.label_n, reduction="none") for side in (logits.image, logits.text))
        return (by_image_N + by_text_N) / 2

    def _dense(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Pairs whose label says something, bool `[N]`."""
        if self.config.density is not None:
            return batch[f"{self.config.density}_N"] > 0
        if self.config.supervised == "label":
            return batch["label_N"] >= 0
        return torch.ones_like(batch["row_N"], dtype=torch.bool)

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


def _by_kind(weight_N: Tensor, dense_N: Tensor) -> dict[str, Tensor]:
    """Mean weights of the label-dense and the label-sparse pairs of all ranks. A kind that no rank has is left out, on every rank alike."""
    kind_2N = torch.stack([dense_N, ~dense_N]).to(weight_N.dtype)
    sums_22 = gather(torch.stack([kind_2N @ weight_N, kind_2N.sum(dim=1)])[None], with_grad=False).sum(dim=0)
    names = ("weight_dense", "weight_sparse")
    return {name: total / count for name, total, count in zip(names, *sums_22, strict=True) if count > 0}


class Config(BaseConfig):
    """AdaWAC's objective on a dual encoder; the defaults are those of its U-Net recipe."""

    method: Literal["adawac"] = "adawac"
    mode: Mode = Field("adawac", description="adawac, or one of the baselines that share its terms")
    supervised: Literal["caption", "label"] = Field(
        "caption", description="what supervises: the pair's caption, or its label if it has one"
    )
    eta_w: float = Field(1.0, ge=0, description="learning rate of the weights; 0: they stay at 1/2")
    lambda_ac: float = Field(1.0, ge=0, description="weight of the squared distance of two views' features, which are not normalised")
    clip: float | None = Field(20.0, gt=0, description="largest log-ratio of a pair's two weights, either way; null: none")
    trim_ratio: float = Field(
        1 - 1280 / 2211, ge=0, le=1, description="trim_ratio: quantile of the batch's losses below which pairs are left out"
    )
    entropy: float = Field(0.01, ge=0, description="pm_dro: weight of the entropy")
    dice_ratio: float = Field(0.0, ge=0, le=1, description="share of the Dice loss; segmentation only, where it is 0.5")
    density: str | None = Field(None, description="a column; pairs with more than 0 in it are label-dense; null: those with a label")
    view: Literal["weak", "strong", "simclr"] = Field("weak", description="recipe of the second view; the first is the pair's own picture")
    templates: Templates = ("an image of a {}.",)

    @model_validator(mode="after")
    def _density_known(self) -> Self:
        if self.mode in ("pseudo", "trim_train") and self.supervised == "caption" and self.density is None:
            raise ValueError(f"mode {self.mode} must know which captions say something: give the column `density`")
        return self

    def build(self) -> AdaWac:
        """The objective."""
        return AdaWac(self)
