"""SigLIP: every picture-text combination of the batch is a yes-or-no question of its own; no softmax ties them together.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (ICCV 2023), section 3.2 and algorithm 1. An architecture with a `logit_bias`
(open_clip's `init_logit_bias`) keeps the bias in the model; for any other the objective has one of its own, which training needs and the
ranking of pictures or texts does not.

Shape legend: n pairs on this rank, N pairs in the global batch, D feature width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoded, TrainContext
from diptych.objectives.gather import gather, rank


def sigmoid_loss(image_nD: Tensor, text_nD: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The sum over all texts of the binary cross-entropies of a picture, in nats: a scalar, the mean over this rank's pictures.

    A rank scores its own pictures against the texts of all ranks, so texts alone are gathered; the mean over the ranks is the loss of the
    global batch, and the averaged gradients are its gradients.

    Args:
        image_nD, text_nD: features of this rank, used as they are: normalise them first.
        logit_scale, logit_bias: scalars, the scale already exponentiated.

    Raises ConfigError if ranks hold batches of different sizes.
    """
    text_ND = gather(text_nD, with_grad=True)
    logits_nN = logit_scale * image_nD @ text_ND.T + logit_bias
    own_n = torch.arange(len(image_nD), device=image_nD.device)
    sign_nN = torch.full_like(logits_nN, -1.0)
    sign_nN[own_n, own_n + len(image_nD) * rank()] = 1.0
    return -logsigmoid(sign_nN * logits_nN).sum(dim=1).mean()


class SigLip(nn.Module):
    """The objective; owns a bias where the model has none."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.logit_bias: nn.Parameter | None = None

    def start(self, context: TrainContext) -> None:
        """Makes the bias, unless the model has one. A model's own bias goes on from where it is."""
        if _bias_of(context.model) is None:
            self.logit_bias = nn.Parameter(torch.tensor(self.config.bias, device=context.device))

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`, and `bias`, detached."""
        bias = _bias_of(encoded.model) if self.logit_bias is None else self.logit_bias
        assert bias is not None, "start() comes first"
        loss = sigmoid_loss(encoded.image_ND, encoded.text_ND, encoded.logit_scale, bias)
        return {"loss": loss, "bias": bias.detach()}

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


def _bias_of(model: Any) -> nn.Parameter | None:
    found: nn.Parameter | None = getattr(model, "logit_bias", None)
    return found


class Config(BaseConfig):
    """SigLIP's objective. The scale starts at the model's own, which open_clip's SigLIP architectures set to 10."""

    method: Literal["siglip"] = "siglip"
    bias: float = Field(-10.0, description="what the bias starts at where the model has none; at -10 few combinations count at first")

    def build(self) -> SigLip:
        """The objective."""
        return SigLip(self)
