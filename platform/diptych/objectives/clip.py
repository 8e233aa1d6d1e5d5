"""CLIP's symmetric contrastive loss, on one process or on many.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), section 2.3 and figure 3;
the four distributed variants are those of open_clip's `ClipLoss`.

Shape legend: n pairs on this rank, W ranks, N = W * n pairs in the global batch, D feature width.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded
from diptych.models.contrastive import symmetric_cross_entropy
from diptych.objectives.chunked import chunked_nll
from diptych.objectives.gather import gather, put_back, rank, world_size

MAX_LOG_SCALE = math.log(100)


class Logits(NamedTuple):
    """Similarities that this rank scores: rows are queries, `label_n[i]` is the column of row i's partner."""

    image: Tensor
    text: Tensor
    label_n: Tensor


def clip_logits(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor, *, local_loss: bool, gather_with_grad: bool) -> Logits:
    """Scaled similarities of this rank's queries (local) or of all queries (global) to the candidates of all ranks.

    Args:
        image_ND, text_ND: features of this rank, `[n, D]`, used as they are: normalise them first.
        logit_scale: scalar, already exponentiated.
        local_loss: `[n, N]` logits, a rank scores its own queries; otherwise every rank builds `[N, N]`.
        gather_with_grad: the gradients that other ranks send to this rank's features reach them.

    Raises:
        ConfigError: ranks hold batches of different sizes.
    """
    all_image, all_text = _candidates(image_ND, text_ND, local_loss=local_loss, gather_with_grad=gather_with_grad)
    if local_loss and world_size() > 1:
        label_n = torch.arange(len(image_ND), device=image_ND.device) + len(image_ND) * rank()
        return Logits(logit_scale * image_ND @ all_text.T, logit_scale * text_ND @ all_image.T, label_n)
    logits = logit_scale * all_image @ all_text.T
    return Logits(logits, logits.T, torch.arange(len(logits), device=logits.device))


def _candidates(image_ND: Tensor, text_ND: Tensor, *, local_loss: bool, gather_with_grad: bool) -> tuple[Tensor, Tensor]:
    """The images and the texts of all ranks, with the gradients that the variant of the loss sends through them."""
    assert image_ND.shape == text_ND.shape, f"{tuple(image_ND.shape)} images against {tuple(text_ND.shape)} texts"
    if world_size() == 1:
        return image_ND, text_ND
    # One collective for both sides.
    all_image, all_text = gather(torch.cat([image_ND, text_ND], dim=1), with_grad=gather_with_grad).chunk(2, dim=1)
    if local_loss or gather_with_grad:
        return all_image, all_text
    return put_back(all_image, image_ND), put_back(all_text, text_ND)


def clip_loss(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor, *, local_loss: bool = True, gather_with_grad: bool = True) -> Tensor:
    """Mean of the image-to-text and the text-to-image cross-entropy: a scalar in nats. Arguments as in `clip_logits`.

    With G the gradient of the one-process loss on the global batch, W ranks, and gradients averaged over ranks as DDP does:

    | local_loss | gather_with_grad | value                    | averaged gradient of the towers  | logits     |
    |------------|------------------|--------------------------|----------------------------------|------------|
    | yes        | yes (default)    | mean over ranks = global | G                                | 2 of n x N |
    | no         | yes              | global on every rank     | G                                | N x N      |
    | no         | no               | global on every rank     | G / W                            | N x N      |
    | yes        | no               | mean over ranks = global | biased: only queries are trained | 2 of n x N |

    The gradient of `logit_scale` is right in all four.
    """
    return symmetric_loss(clip_logits(image_ND, text_ND, logit_scale, local_loss=local_loss, gather_with_grad=gather_with_grad))


def symmetric_loss(logits: Logits) -> Tensor:
    """The mean of both cross-entropies."""
    return symmetric_cross_entropy(logits.image, logits.text, logits.label_n)


def chunked_clip_loss(
    image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor, chunk: int, *, local_loss: bool = True, gather_with_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """`clip_loss` with at most `chunk` rows of logits in memory at once, and `accuracy` as `Clip` has it.

    Equal to the plain loss, in value and gradients, up to rounding; a third slower to compute where arithmetic is all, and faster where
    the plain logits do not fit into a cache. A step that differentiates twice builds the plain logits.
    """
    all_image, all_text = _candidates(image_ND, text_ND, local_loss=local_loss, gather_with_grad=gather_with_grad)
    if local_loss and world_size() > 1:
        offset = len(image_ND) * rank()
        image_n, _, hit_n = chunked_nll(image_ND, all_text, logit_scale, offset=offset, chunk=chunk, columns=False)
        text_n, _, _ = chunked_nll(text_ND, all_image, logit_scale, offset=offset, chunk=chunk, columns=False)
        return (image_n.mean() + text_n.mean()) / 2, hit_n.float().mean()
    image_n, column_N, hit_n = chunked_nll(all_image, all_text, logit_scale, offset=0, chunk=chunk, columns=True)
    assert column_N is not None
    return (image_n.mean() + column_N.mean()) / 2, hit_n.float().mean()


@torch.no_grad()
def _draw(logits: Tensor, uniform_n: Tensor) -> Tensor:
    """For each row of logits a column, int64 `[n]`, drawn from its softmax by a number in [0, 1)."""
    reached = logits.double().softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(reached, (uniform_n * reached[:, -1]).unsqueeze(1), right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def clamp_logit_scale(parameter: Tensor, maximum: float = MAX_LOG_SCALE) -> None:
    """Clamps the logarithm of the scale to [0, maximum] in place, after an optimizer step.

    Acts on the data: a clamp inside the graph would kill the gradient at the bound, for good.
    """
    parameter.clamp_(0.0, maximum)


class Clip(nn.Module):
    """The objective; owns no parameters."""

    def __init__(self, *, local_loss: bool = True, gather_with_grad: bool = True, chunk: int | None = None) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.chunk = chunk

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss` (nats) and `accuracy`: the share of this rank's image queries whose own text scores highest, in [0, 1].

        Candidates are the texts of all ranks, so chance is 1/N. `accuracy` is detached.
        """
        image_ND, text_ND, scale, local, grad = (
            encoded.image_ND,
            encoded.text_ND,
            encoded.logit_scale,
            self.local_loss,
            self.gather_with_grad,
        )
        if self.chunk is not None:
            loss, accuracy = chunked_clip_loss(image_ND, text_ND, scale, self.chunk, local_loss=local, gather_with_grad=grad)
            return {"loss": loss, "accuracy": accuracy}
        logits = clip_logits(image_ND, text_ND, scale, local_loss=local, gather_with_grad=grad)
        hit = logits.image.detach().argmax(dim=1) == logits.label_n
        return {"loss": symmetric_loss(logits), "accuracy": hit.float().mean()}

    def sampled_loss(self, encoded: Encoded, generator: torch.Generator) -> tuple[Tensor, int]:
        """The loss against partners drawn from the model's own softmaxes, and their number: two a pair of the global batch.

        For the Gauss-Newton-Bartlett estimate (Liu et al., "Sophia", ICLR 2024): with g the gradient of this loss averaged over the
        ranks, 2N * g * g is an unbiased estimate of the Gauss-Newton diagonal of the loss on the global batch. A query's draw
        depends on its place in that batch alone, so it does not matter how many ranks share the batch, or which of them score it.
        The logits are built whole, whatever `chunk` is.

        Args:
            encoded: as for the loss.
            generator: in one state on all ranks; takes `2 * N` draws.

        Raises:
            ConfigError: without `gather_with_grad` on several ranks, where g would be too small, or biased.
        """
        if world_size() > 1 and not self.gather_with_grad:
            fix = "set objective.gather_with_grad, or choose an optimizer that does without"
            raise ConfigError.at("Sampled labels need gradients from all ranks", "objective.gather_with_grad", False, "True", fix)
        logits = clip_logits(encoded.image_ND, encoded.text_ND, encoded.logit_scale, local_loss=self.local_loss, gather_with_grad=True)
        softmaxes = 2 * logits.image.shape[1]
        uniform_2N = torch.rand((2, softmaxes // 2), generator=generator, dtype=torch.float64, device=generator.device)
        own_2n = uniform_2N.to(logits.label_n.device)[:, logits.label_n]
        image_loss, text_loss = (cross_entropy(scores, _draw(scores, own)) for scores, own in zip(logits[:2], own_2n, strict=True))
        return (image_loss + text_loss) / 2, softmaxes


class Config(BaseConfig):
    """CLIP's objective; the switches matter only with more than one rank."""

    method: Literal["clip"] = "clip"
    local_loss: bool = Field(True, description="every rank scores its own queries only: n x N logits in place of N x N")
    gather_with_grad: bool = Field(
        True, description="gradients flow through the gather; without it the gradient is W times too small, or biased with local_loss"
    )

    chunk: int | None = Field(
        None, ge=1, description="rows of logits in memory at once, so that memory is linear in the batch; null: all of them"
    )

    def build(self) -> Clip:
        """The objective."""
        return Clip(local_loss=self.local_loss, gather_with_grad=self.gather_with_grad, chunk=self.chunk)
