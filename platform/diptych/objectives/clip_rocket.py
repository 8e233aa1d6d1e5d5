"""CLIP-rocket, and the non-contrastive objectives that it was compared with: SiamLIP, BYOLIP, BarLIP and SwALIP.

Fini et al., "Improved baselines for vision-language pre-training" (TMLR 2023), sections 3 and 4. A plain picture and caption go through CLIP's own
projections; two strongly augmented ones of each through heads of their own, with label smoothing. The plain pair is the loop's; strong pictures
are views of the recipe `view`, strong captions lose words here. Features are used as they are by CLIP after training.

The released code gathers without gradient; here gradients flow between ranks, unless `gather_with_grad` is off for comparison.

Shape legend: n pairs on this rank, N pairs in the global batch, D feature width, E width of a head, V = 2 strong views, L tokens.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models.tokenizer import EOT, Tokenizer
from diptych.objectives.clip import clamp_logit_scale
from diptych.objectives.gather import gather, rank, world_size
from diptych.objectives.projectors import cosine_regression, follow, mlp

Extra = Literal["none", "siamlip", "byolip", "barlip", "swalip"]
VIEWS = 2
STREAM = chance.key_hash("clip-rocket")


class Sides(NamedTuple):
    """Something of both modalities: of the plain pair, and of the strong views. Rows `[n, …]`; the plain one may be missing."""

    image: Tensor
    text: Tensor
    images: tuple[Tensor, ...] = ()
    texts: tuple[Tensor, ...] = ()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The plain pair, then every strong picture with every strong caption."""
        return [(self.image, self.text), *product(self.images, self.texts)]


class Contrast(NamedTuple):
    """Parts of the contrastive loss, scalars of this rank: all of it, by modality, and of the strong views alone by modality."""

    loss: Tensor
    image: Tensor
    text: Tensor
    images: Tensor | None
    texts: Tensor | None


def against(query_nD: Tensor, key_nD: Tensor, scale: Tensor, smoothing: float, with_grad: bool) -> Tensor:
    """Cross-entropy of this rank's queries against the keys of all ranks, in nats; rows are normalised here."""
    key_ND = gather(normalize(key_nD, dim=-1), with_grad=with_grad)
    label_n = torch.arange(len(query_nD), device=query_nD.device) + len(query_nD) * rank()
    return cross_entropy(scale * normalize(query_nD, dim=-1) @ key_ND.T, label_n, label_smoothing=smoothing)


def contrast(plain: Sides, strong: Sides, scale: Tensor, strong_scale: Tensor, smoothing: float, with_grad: bool = True) -> Contrast:
    """The loss of CLIP-rocket: the plain pair, and the strong views in all combinations, which weigh 2 to 1. Without views: CLIP's loss."""
    image, text = (against(a, b, scale, 0.0, with_grad) for a, b in ((plain.image, plain.text), (plain.text, plain.image)))
    views = len(strong.images)
    if not views:
        return Contrast((image + text) / 2, image, text, None, None)
    pairs = list(product(strong.images, strong.texts))
    images = torch.stack([against(a, b, strong_scale, smoothing, with_grad) for a, b in pairs]).mean()
    texts = torch.stack([against(b, a, strong_scale, smoothing, with_grad) for a, b in pairs]).mean()
    image, text = (image + views * images) / (1 + views), (text + views * texts) / (1 + views)
    return Contrast((image + text) / 2, image, text, images, texts)


def siamese(predicted: Sides, target: Sides) -> Tensor:
    """SiamLIP's and BYOLIP's: `2 - 2 cos` of each prediction and the other modality's target, the mean over all pairs, both ways."""
    terms = []
    for (p_image, p_text), (v_image, v_text) in zip(predicted.pairs(), target.pairs(), strict=True):
        terms += [cosine_regression(p_image, v_text), cosine_regression(p_text, v_image)]
    return torch.stack(terms).mean()


def barlow(projected: Sides, weight: float, off_diagonal: float, with_grad: bool = True) -> Tensor:
    """BarLIP's: the cross-correlation of the modalities should be the identity, the mean over all pairs.

    The correlation is over the pairs of all ranks. Nothing is standardised here: the projector's last batch norm does it. Without `with_grad`
    the gradient of this rank's own share is left as it is, so that its mean over W ranks is W times too small, as released.
    """
    terms = []
    for image_nE, text_nE in projected.pairs():
        own_EE = image_nE.T @ text_nE / len(image_nE)
        all_EE = gather(own_EE[None], with_grad=with_grad).mean(dim=0)
        if not with_grad:
            all_EE = all_EE.detach() + (own_EE - own_EE.detach()) / world_size()
        apart_EE = (all_EE - torch.eye(len(all_EE), dtype=all_EE.dtype, device=all_EE.device)).square()
        diagonal = apart_EE.diagonal().sum()
        terms.append(weight * (diagonal + off_diagonal * (apart_EE.sum() - diagonal)))
    return torch.stack(terms).mean()


@torch.no_grad()
def sinkhorn(similarity_nN: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments `[n, N]` of this rank's rows to the columns, used evenly over the rows of all ranks; each row sums to 1.

    In float32 at least: `exp(1 / epsilon)` is large.
    """
    dtype = torch.promote_types(similarity_nN.dtype, torch.float32)
    share_Nn = (similarity_nN.to(dtype) / epsilon).exp().T
    codes, rows = share_Nn.shape[0], share_Nn.shape[1] * world_size()
    share_Nn = share_Nn / _over_ranks(share_Nn.sum())
    for _ in range(iterations):
        share_Nn = share_Nn / _over_ranks(share_Nn.sum(dim=1, keepdim=True)) / codes
        share_Nn = share_Nn / share_Nn.sum(dim=0, keepdim=True) / rows
    return (share_Nn * rows).T


def _over_ranks(value: Tensor) -> Tensor:
    """The sum over the ranks, detached."""
    return gather(value.detach()[None], with_grad=False).sum(dim=0)


def swapped(strong: Sides, scale: Tensor, epsilon: float, iterations: int, with_grad: bool = True) -> Tensor:
    """SwALIP's: the other modality's samples are the codes; each pair of views predicts the assignment of the opposite pair of views."""
    images, texts = ([normalize(side_nE, dim=-1) for side_nE in sides] for sides in (strong.images, strong.texts))
    all_images, all_texts = ([gather(side_nE, with_grad=with_grad) for side_nE in sides] for sides in (images, texts))
    places = list(product(range(VIEWS), repeat=2))
    terms = []
    for own, others in ((images, all_texts), (texts, all_images)):
        score = {(a, b): own[a] @ others[b].T for a, b in places}
        target = {place: sinkhorn(score_nN.detach(), epsilon, iterations) for place, score_nN in score.items()}
        terms += [-(target[1 - a, 1 - b] * log_softmax(scale * score[a, b], dim=1)).sum(dim=1).mean() for a, b in places]
    return torch.stack(terms).mean()


@torch.no_grad()
def drop_words(text_NL: Tensor, share: float, *, seed: int, row_N: Tensor, step: int, view: int) -> Tensor:
    """Captions that lost a share of their words, drawn by `(seed, row, step, view, place)`; a caption that would lose all stays as it is.

    Ids of CLIP's tokenizer, `[N, L]`, padded with 0 again.
    """
    place_L = torch.arange(text_NL.shape[1], device=text_NL.device)
    end_N1 = (text_NL == EOT).int().argmax(dim=1, keepdim=True)
    words_NL = (place_L > 0) & (place_L < end_N1)
    row_N1 = row_N.cpu().numpy().astype(np.uint64)[:, None]
    drawn_NL = chance.uniform(seed, STREAM, step, view, row_N1, np.arange(len(place_L), dtype=np.uint64))
    kept_NL = ~(words_NL & (torch.from_numpy(drawn_NL).to(text_NL.device) < share))
    kept_NL = kept_NL | ~(words_NL & kept_NL).any(dim=1, keepdim=True)
    real_NL = kept_NL & (place_L <= end_N1)
    order_NL = (~real_NL).int().argsort(dim=1, stable=True)
    return torch.where(real_NL, text_NL, 0).gather(1, order_NL)


class ClipRocket(nn.Module):
    """The objective. State: the heads, the scale of the strong views, and BYOLIP's averaged projectors and towers' features."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.views = (config.view,) * VIEWS if config.augment else ()
        self.captions = VIEWS if config.augment and config.captions == "several" else 0
        self.whole_weights = config.extra == "byolip"
        self.seed = 0
        self.average: nn.Module | None = None
        self.heads, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        self.predictors, self.averages = nn.ModuleDict(), nn.ModuleDict()

    def start(self, context: TrainContext) -> None:
        """Makes the heads. Raises ConfigError for a tokenizer whose words cannot be left out."""
        config = self.config
        if config.augment and config.drop_words > 0 and not isinstance(context.tokenizer, Tokenizer):
            got = type(context.tokenizer).__name__
            raise ConfigError.at("Words can be left out of CLIP's tokens only", "train.objective.drop_words", got, "CLIP's tokenizer")
        self.seed = context.seed
        model: Any = context.model
        with torch.no_grad():
            width = model.encode_text(torch.from_numpy(context.tokenizer.encode_cut(["a"])).to(context.device)).shape[1]
        if config.augment and config.separate:
            self.heads = nn.ModuleDict({tower: mlp([width, config.hidden, config.hidden, config.width]) for tower in ("image", "text")})
            self.log_scale = nn.Parameter(torch.tensor(1 / 0.1).log())
        if config.extra in ("siamlip", "byolip"):
            widths = [width, config.hidden, config.extra_width]
            self.projectors = nn.ModuleDict({t: mlp(widths, last_norm=True, last_affine=False) for t in ("image", "text")})
            back = [config.extra_width, config.hidden, config.extra_width]
            self.predictors = nn.ModuleDict({tower: mlp(back) for tower in ("image", "text")})
        if config.extra == "barlip":
            widths = [width, config.hidden, config.hidden, config.extra_width]
            self.projectors = nn.ModuleDict({tower: mlp(widths, last_norm=True) for tower in ("image", "text")})
        if config.extra == "byolip":
            self.average = copy.deepcopy(model).requires_grad_(False)
            self.averages = copy.deepcopy(self.projectors).requires_grad_(False)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`; `clip`, the contrastive part before it is summed or averaged; `extra`, the other loss before its weight, if there is one."""
        config, inputs = self.config, self._inputs(encoded)
        raw = Sides(
            encoded.image_ND,
            encoded.text_ND,
            tuple(encoded.encode_image(each, normalize=False) for each in inputs.images),
            tuple(encoded.encode_text(each, normalize=False) for each in inputs.texts),
        )
        strong = self._through(self.heads, raw) if len(self.heads) else raw
        scale = encoded.logit_scale
        strong_scale = self.log_scale.exp() if len(self.heads) else scale
        found = contrast(raw, strong, scale, strong_scale, config.smoothing, config.gather_with_grad)
        loss, parts = self.reduced(found), {"clip": found.loss.detach()}
        if config.extra != "none":
            extra = self._extra(encoded, inputs, raw, strong, strong_scale)
            loss, parts = loss + self.weight * extra, {**parts, "extra": extra.detach()}
        return {"loss": loss, **parts}

    def reduced(self, found: Contrast) -> Tensor:
        """The contrastive part as it enters the loss."""
        return 2 * found.loss if self.config.reduction == "sum" else found.loss

    @property
    def weight(self) -> float:
        """Of the other loss; BarLIP's is inside it."""
        return self.config.swalip_weight if self.config.extra == "swalip" else 1.0

    def _inputs(self, encoded: Encoded) -> Sides:
        """The plain pair and, if there are any, the strong pictures and captions."""
        batch, config = encoded.batch, self.config
        if not config.augment:
            return Sides(batch["image_NCHW"], batch["text_NL"])
        texts = []
        for view in range(VIEWS):
            text_NL = batch[f"text{view + 1}_NL"] if config.captions == "several" else batch["text_NL"]
            if config.drop_words > 0:
                text_NL = drop_words(text_NL, config.drop_words, seed=self.seed, row_N=batch["row_N"], step=encoded.step, view=view)
            texts.append(text_NL)
        images = tuple(batch[f"view{view}_NCHW"] for view in range(VIEWS))
        return Sides(batch["image_NCHW"], batch["text_NL"], images, tuple(texts))

    def _through(self, heads: nn.ModuleDict, raw: Sides) -> Sides:
        """All of a modality through its head, one after another, each with batch statistics of its own."""
        image, text = heads["image"], heads["text"]
        return Sides(image(raw.image), text(raw.text), tuple(map(image, raw.images)), tuple(map(text, raw.texts)))

    def _extra(self, encoded: Encoded, inputs: Sides, raw: Sides, strong: Sides, strong_scale: Tensor) -> Tensor:
        config = self.config
        if config.extra == "swalip":
            return swapped(strong, strong_scale, config.epsilon, config.iterations, config.gather_with_grad)
        projected = self._through(self.projectors, raw)
        if config.extra == "barlip":
            return barlow(projected, config.barlip_weight, config.barlip_off_diagonal, config.gather_with_grad)
        predicted, target = self._through(self.predictors, projected), projected
        if self.average is not None:
            target = self._slow(encoded, inputs)
        return siamese(predicted, target)

    @torch.no_grad()
    def _slow(self, encoded: Encoded, inputs: Sides) -> Sides:
        """What the averaged model and projectors make of the batch."""
        slow: Any = self.average

        def at_least_float32(x: Tensor) -> Tensor:
            return x.to(torch.promote_types(x.dtype, torch.float32))

        with encoded.arithmetic(inputs.text.device):
            image, *images = (slow.encode_image(each, normalize=not index) for index, each in enumerate((inputs.image, *inputs.images)))
            text, *texts = (slow.encode_text(each, normalize=not index) for index, each in enumerate((inputs.text, *inputs.texts)))
        image, text, *rest = map(at_least_float32, (image, text, *images, *texts))
        return self._through(self.averages, Sides(image, text, tuple(rest[: len(images)]), tuple(rest[len(images) :])))

    def after_step(self, step: int, model: nn.Module) -> None:
        """Clamps the scale of the strong views to [1, 100], where it is their own, and moves BYOLIP's averages."""
        del step
        if len(self.heads):
            clamp_logit_scale(self.log_scale)
        if self.average is not None:
            follow(self.average, model, self.config.momentum)
            follow(self.averages, self.projectors, self.config.momentum)

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


class Config(BaseConfig):
    """CLIP-rocket's objective, and with `extra` the non-contrastive ones; the defaults are its recipe for YFCC15M."""

    method: Literal["clip-rocket"] = "clip-rocket"
    augment: bool = Field(True, description="two strong views of each picture and caption beside the plain ones; false: CLIP alone")
    view: Literal["simclr", "crop", "weak", "strong"] = Field(
        "simclr", description="recipe of the strong pictures; crop where captions name sides or colours"
    )
    captions: Literal["same", "several"] = Field("same", description="strong captions are made of the plain one, or of others of the pair")
    drop_words: float = Field(0.2, ge=0, lt=1, description="share of the words that a strong caption loses")
    separate: bool = Field(True, description="strong views have heads and a scale of their own; false: they share CLIP's")
    hidden: int = Field(4096, ge=1, description="width of the hidden layers of all heads")
    width: int = Field(256, ge=1, description="width of what the strong views' heads give")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing of the strong views")
    reduction: Literal["sum", "avg"] = Field("sum", description="sum: both directions of the contrastive part are added, as released")
    extra: Extra = Field(
        "none", description="a non-contrastive loss beside: SimSiam's, BYOL's, Barlow Twins' or SwAV's, between modalities"
    )
    extra_width: int = Field(128, ge=1, description="width of what that loss compares; the paper takes 8192 for barlip")
    momentum: float = Field(0.99, ge=0, le=1, description="byolip: what the average keeps of itself a step")
    barlip_weight: float = Field(0.025, ge=0, description="barlip: weight of the loss")
    barlip_off_diagonal: float = Field(5e-3, ge=0, description="barlip: weight of what is off the diagonal")
    swalip_weight: float = Field(0.2, ge=0, description="swalip: weight of the loss")
    epsilon: float = Field(0.05, gt=0, description="swalip: temperature of the assignments")
    iterations: int = Field(3, ge=1, description="swalip: rounds of Sinkhorn's algorithm")
    gather_with_grad: bool = Field(
        True, description="gradients flow between ranks; false: as released, where they are biased on several ranks"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.extra == "swalip" and (not self.augment or self.smoothing):
            raise ValueError("swalip compares strong views and has no label smoothing: set augment: true and smoothing: 0")
        return self

    def build(self) -> ClipRocket:
        """The objective."""
        return ClipRocket(self)
