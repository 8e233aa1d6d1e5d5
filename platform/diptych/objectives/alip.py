"""ALIP: a raw and a synthetic caption of each picture, and weights, found on the fly, for pairs in which the three disagree.

Yang et al., "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption" (ICCV 2023), section 3. The synthetic captions are captions
of the pairs whose source is `synthetic:<method>`; the raw one is drawn from the others as for any objective.

Shape legend: n pairs on this rank, N pairs in the global batch, D feature width; the three similarities of a pair, and their histories, are
in the order raw-synthetic, image-raw, image-synthetic.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoded
from diptych.objectives.clip import Logits, clip_logits
from diptych.objectives.gather import gather

SYNTHETIC = "synthetic"


class Gates(NamedTuple):
    """Weights of every pair of the global batch `[N]`: of the pair as a sample, in (0, 1], and of its raw and its synthetic caption."""

    sample_N: Tensor
    raw_N: Tensor
    caption_N: Tensor


class Terms(NamedTuple):
    """The losses of both captions, scalars of this rank, and the weights."""

    raw: Tensor
    caption: Tensor
    gates: Gates


def gates(similarity_N3: Tensor, history_3: Tensor, gamma_sample: float, gamma_pair: float) -> Gates:
    """The language and the description consistency gate (section 3.3).

    A sample whose captions agree less than they used to is weighed down, `exp(S - H) ^ gamma < 1`; in it, each caption is weighed by how
    well it fits the picture beside what was usual, which may exceed 1. Pairs of other samples have the weight 1.
    """
    language_N, *description = (similarity_N3 - history_3).unbind(dim=1)
    gate_N = (gamma_sample * language_N).exp()
    raw_N, caption_N = (torch.where(gate_N < 1, (gamma_pair * excess_N).exp(), 1) for excess_N in description)
    return Gates(gate_N.clamp(max=1), raw_N, caption_N)


def weighted_loss(logits: Logits, weight_N: Tensor) -> Tensor:
    """The mean over this rank's pairs of weight times symmetric cross-entropy; no weight enters a softmax."""
    by_image_n, by_text_n = (cross_entropy(side, logits.label_n, reduction="none") for side in (logits.image, logits.text))
    return (weight_N[logits.label_n] * (by_image_n + by_text_n) / 2).mean()


class Alip(nn.Module):
    """The objective. State: the running means of the three similarities, the same on every rank and kept in checkpoints."""

    history_3: Tensor
    sources = (SYNTHETIC,)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.columns = () if config.intact is None else (config.intact,)
        self.register_buffer("history_3", torch.full((3,), torch.nan if config.warm_start else 1.0))

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`, what it is the sum of, `raw` and `caption`, and `weight`, the mean weight of the raw captions of all ranks.

        With `intact`, also `weight_intact` and `weight_broken`: that of the pairs with more than 0 in the column, and of the others.
        """
        caption_nD = encoded.encode_text(encoded.batch[f"{SYNTHETIC}_NL"])
        terms = self.terms(encoded.image_ND, encoded.text_ND, caption_nD, encoded.logit_scale)
        weight_N = terms.gates.sample_N * terms.gates.raw_N
        parts = {"raw": terms.raw.detach(), "caption": terms.caption.detach(), "weight": weight_N.mean()}
        if self.config.intact is not None:
            intact_N = gather(encoded.batch[f"{self.config.intact}_N"].float()[:, None], with_grad=False)[:, 0] > 0
            kinds = {"weight_intact": weight_N[intact_N], "weight_broken": weight_N[~intact_N]}
            parts |= {name: kind_N.mean() for name, kind_N in kinds.items() if len(kind_N)}
        return {"loss": terms.raw + terms.caption, **parts}

    def terms(self, image_nD: Tensor, raw_nD: Tensor, caption_nD: Tensor, logit_scale: Tensor) -> Terms:
        """Moves the histories by the batch of all ranks, then weighs it by them. Features of this rank, of unit norm."""
        found = self.weigh(image_nD.detach(), raw_nD.detach(), caption_nD.detach())
        grad = self.config.gather_with_grad
        raw, caption = (
            weighted_loss(clip_logits(image_nD, text_nD, logit_scale, local_loss=grad, gather_with_grad=grad), found.sample_N * weight_N)
            for text_nD, weight_N in ((raw_nD, found.raw_N), (caption_nD, found.caption_N))
        )
        return Terms(raw, caption, found)

    @torch.no_grad()
    def weigh(self, image_nD: Tensor, raw_nD: Tensor, caption_nD: Tensor) -> Gates:
        """The weights of the pairs of all ranks, after their similarities went into the histories."""
        sides = ((raw_nD, caption_nD), (image_nD, raw_nD), (image_nD, caption_nD))
        own_n3 = torch.stack([(left_nD * right_nD).sum(dim=1) for left_nD, right_nD in sides], dim=1)
        similarity_N3 = gather(own_n3, with_grad=False)
        mean_3, decay = similarity_N3.mean(dim=0).to(self.history_3.dtype), self.config.decay
        self.history_3 = torch.where(self.history_3.isnan(), mean_3, decay * self.history_3 + (1 - decay) * mean_3)
        if not self.config.gates:
            return Gates(*torch.ones_like(similarity_N3).unbind(dim=1))
        return gates(similarity_N3, self.history_3, self.config.gamma_sample, self.config.gamma_pair)

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


class Config(BaseConfig):
    """ALIP's objective; the defaults are the paper's. Every pair needs a caption of the source `synthetic:…`."""

    method: Literal["alip"] = "alip"
    gates: bool = Field(True, description="weigh samples and pairs; false: both captions with the weight 1, the baseline")
    gamma_sample: float = Field(2.0, ge=0, description="exponent of the language consistency gate")
    gamma_pair: float = Field(2.0, ge=0, description="exponent of the description consistency gate")
    decay: float = Field(0.99, ge=0, lt=1, description="of the running means of similarities, a step")
    warm_start: bool = Field(
        False, description="running means start at the first batch's; false: at 1, which scales down the first hundreds of losses"
    )
    intact: str | None = Field(
        None, description="a column that tells intact pairs (more than 0) from broken ones, for figures; nothing learns from it; null: none"
    )
    gather_with_grad: bool = Field(
        True, description="gradients flow between ranks; false: as released, where the gradient is W times too small on W ranks"
    )

    def build(self) -> Alip:
        """The objective."""
        return Alip(self)
