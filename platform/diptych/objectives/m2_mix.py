"""Geodesic multi-modal mixup: hard negatives on the great circle between a picture and its own caption; for fine-tuning.

Oh, So et al., "Geodesic Multi-Modal Mixup for Robust Fine-Tuning" (NeurIPS 2023), sections 4.1 (m2-Mix) and 4.2 (its uni-modal and joint
companions; with them it is m3-Mix). A pair's partner in those is its mirror image in the global batch: row g with row N - 1 - g.

Shape legend: n pairs on this rank, N pairs in the global batch, D feature width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoded, TrainContext
from diptych.objectives.gather import gather, rank, world_size
from diptych.objectives.temperature import fix_logit_scale

Kind = Literal["multimodal", "visual", "language", "joint"]
"""m2-Mix; V-Mix; L-Mix; VL-Mix."""


def slerp(a_ND: Tensor, b_ND: Tensor, share: float) -> Tensor:
    """The point on the great circle from `b` (share 0) to `a` (share 1), row by row, for rows of unit norm (equation 4).

    Where rows are parallel or opposite to within the dtype's precision, the normalised straight mix takes its place, so that no gradient
    is infinite.
    """
    cosine_N1 = (a_ND * b_ND).sum(dim=1, keepdim=True)
    straight_N1 = cosine_N1.abs() > 1 - 8 * torch.finfo(a_ND.dtype).eps
    angle_N1 = torch.where(straight_N1, 0.0, cosine_N1).acos()
    arc_ND = ((share * angle_N1).sin() * a_ND + ((1 - share) * angle_N1).sin() * b_ND) / angle_N1.sin()
    return torch.where(straight_N1, normalize(share * a_ND + (1 - share) * b_ND, dim=1), arc_ND)


class Sides(NamedTuple):
    """The features of this rank and of all ranks; `own_n`, `mirror_n`: rows, in the global batch, of this rank's pairs and partners."""

    image_nD: Tensor
    text_nD: Tensor
    images_ND: Tensor
    texts_ND: Tensor
    own_n: Tensor
    mirror_n: Tensor

    def mine(self, all_ND: Tensor) -> Tensor:
        """This rank's rows of something that every rank made of all features."""
        return all_ND[self.own_n]


def gather_sides(image_nD: Tensor, text_nD: Tensor) -> Sides:
    """Every rank sees all features, with gradients, and scores its own pairs."""
    images_ND, texts_ND = gather(torch.cat([image_nD, text_nD], dim=1), with_grad=True).chunk(2, dim=1)
    own_n = torch.arange(len(image_nD), device=image_nD.device) + len(image_nD) * rank()
    return Sides(image_nD, text_nD, images_ND, texts_ND, own_n, len(images_ND) - 1 - own_n)


def mixed_target_loss(logits_nN: Tensor, own_n: Tensor, mirror_n: Tensor, own: float, mirror: float) -> Tensor:
    """Cross-entropy against the weights `own` on a query's partner and `mirror` on its mirror's; a scalar, the mean over the queries."""
    return own * cross_entropy(logits_nN, own_n) + mirror * cross_entropy(logits_nN, mirror_n)


class M2Mix(nn.Module):
    """The objective; owns no parameters. One mixing share is drawn a batch and kind, from the seed and the step, alike on all ranks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.seed, self.rows = 0, 0

    def start(self, context: TrainContext) -> None:
        """Notes the seed and the number of pairs; fixes the model's logit scale at 1 / tau, unless it is to be learnt."""
        self.seed, self.rows = context.seed, context.rows
        if self.config.tau is not None:
            fix_logit_scale(context.model, 1 / self.config.tau)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`, and its parts before they are weighed: `contrastive`, and a `mix_<kind>` for each kind that has a weight."""
        config = self.config
        scale = encoded.logit_scale if config.tau is None else encoded.logit_scale.new_tensor(1 / config.tau)
        parts = self.terms(encoded.image_ND, encoded.text_ND, scale, {kind: self.share(kind, encoded.step) for kind in self.weights})
        steps_an_epoch = max(1, self.rows // (len(encoded.image_ND) * world_size()))
        loss = self.total(parts, encoded.step // steps_an_epoch)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    @property
    def weights(self) -> dict[Kind, float]:
        """The kinds that count, with their weights."""
        config = self.config
        every: dict[Kind, float] = {
            "multimodal": config.multimodal,
            "visual": config.visual,
            "language": config.language,
            "joint": config.joint,
        }
        return {kind: weight for kind, weight in every.items() if weight > 0}

    def share(self, kind: Kind, step: int) -> float:
        """The mixing share of a step, in [0, 1], from a symmetric Beta distribution."""
        beta = {"multimodal": self.config.beta_multimodal, "joint": self.config.beta_joint}.get(kind, self.config.beta_single)
        return float(chance.generator(self.seed, "m2-mix", kind, step).beta(beta, beta))

    def total(self, parts: dict[str, Tensor], epoch: int) -> Tensor:
        """The loss of the parts: mixing fades with the epochs, which are counted from 0, if `fade` is set."""
        mixed = sum((weight * parts[f"mix_{kind}"] for kind, weight in self.weights.items()), start=torch.zeros_like(parts["contrastive"]))
        return parts["contrastive"] + mixed / (epoch + 1 if self.config.fade else 1)

    def terms(self, image_nD: Tensor, text_nD: Tensor, scale: Tensor, shares: dict[Kind, float]) -> dict[str, Tensor]:
        """The contrastive loss and the mixed ones of this rank's pairs, scalars whose means over the ranks are those of the global batch.

        Args:
            image_nD, text_nD: features of this rank, of unit norm.
            scale: scalar, 1 / tau.
            shares: the mixing share of each kind that is wanted.
        """
        sides = gather_sides(image_nD, text_nD)
        by_image, by_text = scale * image_nD @ sides.texts_ND.T, scale * text_nD @ sides.images_ND.T
        parts = {"contrastive": (cross_entropy(by_image, sides.own_n) + cross_entropy(by_text, sides.own_n)) / 2}
        for kind, share in shares.items():
            mix = self._multi_modal(sides, scale, share) if kind == "multimodal" else self._partners(kind, sides, scale, share)
            parts[f"mix_{kind}"] = mix
        return parts

    def _multi_modal(self, sides: Sides, scale: Tensor, share: float) -> Tensor:
        """m2-Mix: positives as they are, negatives mixed; the sum over both modalities, not halved."""
        mixed_ND = slerp(sides.images_ND, sides.texts_ND, share)
        positive_n = (sides.image_nD * sides.text_nD).sum(dim=1)
        scale = scale if self.config.tau2 is None else scale.new_tensor(1 / self.config.tau2)
        losses = []
        for query_nD in (sides.image_nD, sides.text_nD):
            cosine_nN = (query_nD @ mixed_ND.T).scatter(1, sides.own_n[:, None], positive_n[:, None])
            losses.append(cross_entropy(scale * cosine_nN, sides.own_n))
        return losses[0] + losses[1]

    def _partners(self, kind: Kind, sides: Sides, scale: Tensor, share: float) -> Tensor:
        """V-, L- or VL-Mix: rows mixed with their mirrors within a modality, both directions halved.

        The targets of VL-Mix are 1 for both partners, as published, so that they sum to 2.
        """
        images_ND, texts_ND = sides.images_ND, sides.texts_ND
        if kind in ("visual", "joint"):
            images_ND = slerp(images_ND, images_ND.flip(0), share)
        if kind in ("language", "joint"):
            texts_ND = slerp(texts_ND, texts_ND.flip(0), share)
        own, mirror = (1.0, 1.0) if kind == "joint" else (share, 1 - share)
        losses = []
        for all_ND, others_ND, plain_nD, plain_ND in (
            (images_ND, texts_ND, sides.image_nD, sides.texts_ND),
            (texts_ND, images_ND, sides.text_nD, sides.images_ND),
        ):
            cosine_nN = sides.mine(all_ND) @ others_ND.T
            if self.config.original_negatives:
                column_N = torch.arange(len(all_ND), device=all_ND.device)
                partner_nN = (column_N == sides.own_n[:, None]) | (column_N == sides.mirror_n[:, None])
                cosine_nN = torch.where(partner_nN, cosine_nN, plain_nD @ plain_ND.T)
            losses.append(mixed_target_loss(scale * cosine_nN, sides.own_n, sides.mirror_n, own, mirror))
        return (losses[0] + losses[1]) / 2

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


class Config(BaseConfig):
    """m2-Mix, or with weights for `visual`, `language` and `joint` m3-Mix; the defaults are of the released fine-tuning."""

    method: Literal["m2-mix"] = "m2-mix"
    tau: float | None = Field(0.01, gt=0, le=1, description="temperature of the loss, fixed; null: the model's logit scale, learnt")
    tau2: float | None = Field(0.07, gt=0, description="temperature of m2-Mix; null: that of the loss")
    multimodal: float = Field(0.01, ge=0, description="weight of m2-Mix")
    visual: float = Field(0.0, ge=0, description="weight of V-Mix: pictures mixed with their mirrors")
    language: float = Field(0.0, ge=0, description="weight of L-Mix: captions mixed with their mirrors")
    joint: float = Field(0.0, ge=0, description="weight of VL-Mix: both")
    beta_multimodal: float = Field(0.5, gt=0, description="both parameters of the Beta distribution of m2-Mix's share")
    beta_single: float = Field(0.5, gt=0, description="of V-Mix's and of L-Mix's")
    beta_joint: float = Field(1.0, gt=0, description="of VL-Mix's")
    fade: bool = Field(True, description="divide the mixed losses by the epoch, counted from 1")
    original_negatives: bool = Field(False, description="V-, L- and VL-Mix mix positives alone")

    def build(self) -> M2Mix:
        """The objective."""
        return M2Mix(self)
