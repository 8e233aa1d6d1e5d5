"""CLOOB: features are replaced by what a modern Hopfield network retrieves for them from the batch, and compared leaving the pair itself out.

Fürst et al., "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP" (NeurIPS 2022), sections 3 and 4. It matters in training only;
a trained model is used as any other. The loss is not bounded below by zero, since a positive is no part of its own denominator.

Shape legend: n pairs on this rank, N pairs in the global batch, M rows of a memory, D feature width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.objectives.gather import gather, put_back, rank, world_size
from diptych.objectives.temperature import fix_logit_scale

Contrast = Literal["infoloob", "infonce"]


class Retrieved(NamedTuple):
    """What images (`_x`) and texts (`_y`) retrieve: `u` from the images of the batch, `v` from its texts; `[N, D]` each."""

    u_x: Tensor
    u_y: Tensor
    v_y: Tensor
    v_x: Tensor


def read(state_ND: Tensor, memory_MD: Tensor, beta: float | Tensor) -> Tensor:
    """One step of a Hopfield network: `softmax(beta * state @ memory^T) @ memory`, scaled to unit norm, `[N, D]`.

    A state that is stored in the memory finds itself there, too. Gradients go through states, memory and attention.
    """
    attention_NM = (beta * state_ND @ memory_MD.T).softmax(dim=1)
    return normalize(attention_NM @ memory_MD, dim=1)


def retrieve(image_ND: Tensor, text_ND: Tensor, images_MD: Tensor, texts_MD: Tensor, beta: float | Tensor) -> Retrieved:
    """What some pairs retrieve from a memory of images and from one of texts."""
    return Retrieved(
        u_x=read(image_ND, images_MD, beta),
        u_y=read(text_ND, images_MD, beta),
        v_y=read(text_ND, texts_MD, beta),
        v_x=read(image_ND, texts_MD, beta),
    )


def contrast(anchor_nD: Tensor, sample_ND: Tensor, inv_tau: Tensor, partner_n: Tensor, kind: Contrast = "infoloob") -> Tensor:
    """InfoLOOB, or InfoNCE, of anchors against samples, times tau: a scalar, the mean over the anchors.

    Args:
        anchor_nD, sample_ND: compared by inner products, used as they are.
        inv_tau: scalar, the inverse temperature.
        partner_n: int64, the sample that belongs to each anchor; InfoLOOB leaves it out of the denominator.
    """
    logits_nN = inv_tau * anchor_nD @ sample_ND.T
    positive_n = logits_nN.gather(1, partner_n[:, None])[:, 0]
    if kind == "infoloob":
        logits_nN = logits_nN.scatter(1, partner_n[:, None], -torch.inf)
    return (logits_nN.logsumexp(dim=1) - positive_n).mean() / inv_tau


class Cloob(nn.Module):
    """The objective; owns no parameters."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def start(self, context: TrainContext) -> None:
        """Fixes the model's logit scale at `inv_tau`, unless it is to be learnt."""
        if self.config.inv_tau is not None:
            fix_logit_scale(context.model, self.config.inv_tau)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`, and what it is the sum of: `image`, compared as retrieved from images, and `text`, as retrieved from texts."""
        inv_tau = encoded.logit_scale
        if self.config.inv_tau is not None:
            inv_tau = inv_tau.new_tensor(self.config.inv_tau)
        image, text = self.terms(encoded.image_ND, encoded.text_ND, inv_tau)
        return {"loss": image + text, "image": image.detach(), "text": text.detach()}

    def terms(self, image_nD: Tensor, text_nD: Tensor, inv_tau: Tensor) -> tuple[Tensor, Tensor]:
        """Both terms of this rank, scalars, from its features of unit norm.

        Every rank reads the memories of all ranks for its own pairs; the mean over the ranks is the loss of the global batch.
        Raises ConfigError for a global batch of one pair, which has nothing to be told from.
        """
        config, n = self.config, len(image_nD)
        pairs = n * world_size()
        if pairs < 2:
            raise ConfigError.at("CLOOB compares a pair with others", "train.batch_size", pairs, "at least 2 pairs")
        images_ND, texts_ND = gather(torch.cat([image_nD, text_nD], dim=1), with_grad=config.gather_with_grad).chunk(2, dim=1)
        own = torch.arange(n, device=image_nD.device) + n * rank()
        if not config.gather_with_grad:
            images_ND, texts_ND = put_back(images_ND, image_nD), put_back(texts_ND, text_nD)
            image_nD, text_nD, own = images_ND, texts_ND, torch.arange(pairs, device=image_nD.device)
        if not config.retrieval:
            pairs_compared = ((image_nD, texts_ND), (text_nD, images_ND))
        else:
            found = retrieve(image_nD, text_nD, images_ND, texts_ND, config.beta)
            samples_ND = torch.cat([found.u_y, found.v_x], dim=1)
            if config.gather_with_grad:
                samples_ND = gather(samples_ND, with_grad=True)
            u_y_ND, v_x_ND = samples_ND.chunk(2, dim=1)
            pairs_compared = ((found.u_x, u_y_ND), (found.v_y, v_x_ND))
        image, text = (contrast(anchor_nD, sample_ND, inv_tau, own, config.loss) for anchor_nD, sample_ND in pairs_compared)
        return image, text

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


class Config(BaseConfig):
    """CLOOB's objective; the defaults are those of its Conceptual Captions recipe."""

    method: Literal["cloob"] = "cloob"
    inv_tau: float | None = Field(
        30.0, ge=1, le=100, description="inverse temperature of the loss, fixed; null: the model's logit scale, learnt"
    )
    beta: float = Field(8.0, gt=0, description="inverse temperature of the retrieval")
    retrieval: bool = Field(True, description="compare what is retrieved; false: the features themselves, InfoLOOB alone")
    loss: Contrast = Field("infoloob", description="infonce: keep a pair in its own denominator, for comparison")
    gather_with_grad: bool = Field(
        True, description="gradients flow between ranks; false: as released, where the gradient is W times too small on W ranks"
    )

    def build(self) -> Cloob:
        """The objective."""
        return Cloob(self)
