"""LightCLIP: softened labels, patches matched with words, and masked words told with the picture's help: for small towers.

Nie et al., "LightCLIP: Learning Multi-Level Interaction for Lightweight Vision-Language Models" (2023). There is no released code, and the form
of the three parts is our reading of the paper's abstract, with weights of our own. Nothing of it is needed after training.

Shape legend: n pairs on this rank, N pairs in the global batch, P patches, L tokens, D feature width, S what the fusion looks at, U its width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize, pad

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models.captioner import tokens_of
from diptych.models.image_tokens import normalized, see, transformer_of
from diptych.models.maps import text_tokens
from diptych.models.tokenizer import Tokenizer
from diptych.objectives.clip import Logits, clip_logits
from diptych.objectives.gather import gather, rank
from diptych.objectives.masked_words import Masked, MaskedWords, mask_words, masked_loss, text_tower, words_of

Softening = Literal["similarity", "uniform"]
Matching = Literal["relaxed", "exact"]


def softness(step: int, ramp_steps: float, most: float) -> float:
    """What the negatives get of a target's mass: from 0 by a straight line to `most` after `ramp_steps` steps."""
    return most * min(1.0, step / ramp_steps)


@torch.no_grad()
def soft_targets(logits_nN: Tensor, label_n: Tensor, alpha: float, kind: Softening = "similarity") -> Tensor:
    """Targets `[n, N]` that sum to 1: `1 - alpha` for the partner, the rest for the negatives, as similar as they are, or evenly.

    A batch of one pair has no negatives, so its target stays whole.
    """
    one_hot_nN = torch.zeros_like(logits_nN).scatter(1, label_n[:, None], 1.0)
    pairs = logits_nN.shape[1]
    if pairs < 2:
        return one_hot_nN
    off_nN = (1 - one_hot_nN) / (pairs - 1)
    if kind == "similarity":
        off_nN = logits_nN.scatter(1, label_n[:, None], -torch.inf).softmax(dim=1)
    return (1 - alpha) * one_hot_nN + alpha * off_nN


def soft_loss(logits: Logits, alpha: float, kind: Softening = "similarity") -> Tensor:
    """CLIP's loss of this rank with softened targets, in nats; no gradient goes through the targets."""
    by_image, by_text = (
        -(soft_targets(scores_nN, logits.label_n, alpha, kind) * log_softmax(scores_nN, dim=1)).sum(dim=1).mean()
        for scores_nN in (logits.image, logits.text)
    )
    return (by_image + by_text) / 2


def relaxed(patch_NPD: Tensor, word_MLD: Tensor, words_ML: Tensor, chunk: int = 64) -> Tensor:
    """How well each picture's patches match each caption's words, `[N, M]`: the mean over words of the best patch's cosine.

    A patch may serve several words, which is what is relaxed. `chunk` pictures at a time, since all cosines are `[N, M, L, P]`.
    """
    rows = []
    for part_CPD in torch.split(patch_NPD, chunk):
        best_CML = torch.einsum("cpd,mld->cmlp", part_CPD, word_MLD).max(dim=3).values
        rows.append((best_CML * words_ML).sum(dim=2))
    return torch.cat(rows) / words_ML.sum(dim=1).clamp(min=1)


@torch.no_grad()
def assignment(patch_PD: Tensor, word_LD: Tensor, words_L: Tensor) -> Tensor:
    """The patch of each word, int64 `[L]`, so that the sum of cosines is largest and no patch serves two words; -1: none."""
    from scipy.optimize import linear_sum_assignment

    place_L = torch.full(words_L.shape, -1, dtype=torch.int64, device=words_L.device)
    own_K = words_L.nonzero()[:, 0]
    word, patch = linear_sum_assignment((word_LD[own_K] @ patch_PD.T).cpu().numpy(), maximize=True)
    place_L[own_K[torch.from_numpy(np.asarray(word)).to(own_K.device)]] = torch.from_numpy(np.asarray(patch)).to(own_K.device)
    return place_L


def exact(patch_NPD: Tensor, word_MLD: Tensor, words_ML: Tensor) -> Tensor:
    """As `relaxed` with the best one-to-one matching, `[N, M]`: the mean over the matched words. One assignment a cell, on the processor."""
    rows = []
    for patch_PD in patch_NPD:
        for word_LD, words_L in zip(word_MLD, words_ML, strict=True):
            place_L = assignment(patch_PD, word_LD, words_L)
            cosine_L = (word_LD * patch_PD[place_L.clamp(min=0)]).sum(dim=1)
            rows.append((cosine_L * (place_L >= 0)).sum() / (place_L >= 0).sum().clamp(min=1))
    return torch.stack(rows).view(len(patch_NPD), len(word_MLD))


def token_loss(patch_nPD: Tensor, word_nLD: Tensor, words_nL: Tensor, logit_scale: Tensor, matching: Matching = "relaxed") -> Tensor:
    """The symmetric cross-entropy of matched tokens in the global batch, in nats: this rank's pictures and captions against all.

    Args:
        patch_nPD, word_nLD: of unit norm.
        words_nL: bool, which tokens are words; L may differ between ranks.
    """
    longest = int(gather(torch.tensor([word_nLD.shape[1]], device=words_nL.device), with_grad=False).max())
    missing = longest - word_nLD.shape[1]
    word_nLD, words_nL = pad(word_nLD, (0, 0, 0, missing)), pad(words_nL, (0, missing))
    patch_NPD, word_NLD = gather(patch_nPD, with_grad=True), gather(word_nLD, with_grad=True)
    words_NL = gather(words_nL.to(torch.uint8), with_grad=False).bool()
    match = relaxed if matching == "relaxed" else exact
    image_nN = match(patch_nPD, word_NLD, words_NL)
    text_nN = (image_nN if patch_NPD is patch_nPD else match(patch_NPD, word_nLD, words_nL)).T
    label_n = torch.arange(len(patch_nPD), device=patch_nPD.device) + len(patch_nPD) * rank()
    return (cross_entropy(logit_scale * image_nN, label_n) + cross_entropy(logit_scale * text_nN, label_n)) / 2


class Towers(NamedTuple):
    """What both towers make of a batch: features `[n, D]` and, of unit norm, patches and words `[n, P, D]`, `[n, L, D]`; what the fusion
    looks at `[n, S, U]`; which tokens are real, bool `[n, L]`.
    """

    image_nD: Tensor
    text_nD: Tensor
    patch_nPD: Tensor
    word_nLD: Tensor
    seen_nSU: Tensor
    real_nL: Tensor


class LightClip(nn.Module):
    """The objective; it runs both towers itself. State: the mask token, the fusion layers and the head of the masked words."""

    encodes: tuple[()] = ()
    whole_batch = whole_weights = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.seed, self.ramp_steps = 0, 1.0
        self.words: MaskedWords | None = None
        self.register_buffer("probe_K", torch.empty(0, dtype=torch.int64), persistent=False)

    def start(self, context: TrainContext) -> None:
        """Makes what the masked words need. Raises ConfigError for towers, or a tokenizer, that this does not go with."""
        config = self.config
        model: Any = context.model
        tower, visual = text_tower(model), transformer_of(model)
        if not isinstance(context.tokenizer, Tokenizer):
            got = type(context.tokenizer).__name__
            raise ConfigError.at("Words are told from start, end and padding by CLIP's tokenizer", "model", got, "a model with it")
        self.seed, self.ramp_steps = context.seed, max(1.0, config.ramp * context.total_steps)
        if config.mlm > 0:
            seen = tokens_of([text for texts in context.captions() for text in texts], context.tokenizer)
            token_V = seen if config.vocabulary == "seen" else torch.arange(len(tower.token_embedding.weight))
            self.words = MaskedWords(tower, visual.ln_post.normalized_shape[0], config.fusion, token_V).to(context.device)
            self.probe_K = torch.tensor([int(context.tokenizer.encode_cut([word])[0, 1]) for word in config.probe], device=context.device)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`; its parts `instance`, `token`, `mlm`, as far as they have weight; `alpha`, what the negatives get of the targets.

        With `probe`, also `told` and `told_other`: the share of masked probe words of this rank that are told right among the probe words,
        with the picture and with another pair's.
        """
        config, model = self.config, encoded.model
        assert model is not None
        scale, alpha = encoded.logit_scale, softness(encoded.step, self.ramp_steps, config.alpha)
        with encoded.arithmetic(encoded.batch["text_NL"].device):
            seen = self._see(model, encoded.batch)
        logits = clip_logits(
            normalize(seen.image_nD, dim=-1), normalize(seen.text_nD, dim=-1), scale, local_loss=True, gather_with_grad=True
        )
        loss = instance = soft_loss(logits, alpha, config.softening)
        parts = {"instance": instance.detach(), "alpha": instance.new_tensor(alpha)}
        if config.token > 0:
            parts["token"] = token_loss(seen.patch_nPD, seen.word_nLD, words_of(seen.real_nL), scale, config.matching)
            loss = loss + config.token * parts["token"]
        if self.words is not None:
            parts["mlm"] = self._tell(self.words, model, encoded, seen)
            loss = loss + config.mlm * parts["mlm"]
            parts |= self._probed(self.words, model, encoded, seen)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _see(self, model: Any, batch: Any) -> Towers:
        """One pass of each tower."""
        visual, tower = transformer_of(model), text_tower(model)
        seen = see(visual, normalized(model, batch["image_NCHW"]))
        token_nLW, text_nD, real_nL = text_tokens(model, batch["text_NL"])
        patch_nPD = seen.patch_NKW if visual.proj is None else seen.patch_NKW @ visual.proj
        word_nLD, projection = tower.ln_final(token_nLW), tower.text_projection
        if projection is not None:
            word_nLD = projection(word_nLD) if isinstance(projection, nn.Module) else word_nLD @ projection
        image_nD, text_nD, patch_nPD, word_nLD, seen_nSU = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (seen.feature_ND, text_nD, patch_nPD, word_nLD, seen.patch_NKW)
        )
        return Towers(image_nD, text_nD, normalize(patch_nPD, dim=-1), normalize(word_nLD, dim=-1), seen_nSU, real_nL)

    def _tell(self, words: MaskedWords, model: Any, encoded: Encoded, seen: Towers) -> Tensor:
        """The loss of the masked words; its gradient reaches the image tower too."""
        text_nL, row_n = encoded.batch["text_NL"], encoded.batch["row_N"]
        share, token_V = self.config.mask, words.token_V
        masked = mask_words(text_nL, words_of(seen.real_nL), share, token_V, seed=self.seed, row_N=row_n, step=encoded.step)
        with encoded.arithmetic(text_nL.device):
            logits_MV = words.logits(text_tower(model), masked, seen.real_nL, seen.seen_nSU)
        logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        return masked_loss(logits_MV, words.targets(text_nL, masked.told_NL))

    @torch.no_grad()
    def _probed(self, words: MaskedWords, model: Any, encoded: Encoded, seen: Towers) -> dict[str, Tensor]:
        """How many of the probe words are told right; nothing learns from it."""
        text_nL = encoded.batch["text_NL"]
        told_nL = torch.isin(text_nL, self.probe_K) & words_of(seen.real_nL)
        if not told_nL.any():
            return {}
        place_K = torch.searchsorted(words.token_V, self.probe_K)
        found = {}
        with encoded.arithmetic(text_nL.device):
            for name, seen_nSU in (("told", seen.seen_nSU), ("told_other", seen.seen_nSU.roll(1, dims=0))):
                logits_MK = words.logits(text_tower(model), Masked(text_nL, told_nL, told_nL), seen.real_nL, seen_nSU)[:, place_K]
                found[name] = (self.probe_K[logits_MK.argmax(dim=1)] == text_nL[told_nL]).float().mean()
        return found

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


class Config(BaseConfig):
    """LightCLIP's objective, in our reading. Needs a vision transformer with a class token and a causal text tower with CLIP's tokenizer."""

    method: Literal["lightclip"] = "lightclip"
    alpha: float = Field(0.2, ge=0, lt=0.5, description="mass that the negatives get of a target in the end; 0: CLIP's own loss")
    ramp: float = Field(1.0, gt=0, description="share of the run over which that mass grows from 0")
    softening: Softening = Field("similarity", description="how it is spread: as similar as the negatives are, or evenly")
    token: float = Field(1.0, ge=0, description="weight of the loss of matched patches and words; 0: none")
    matching: Matching = Field("relaxed", description="relaxed: a patch may serve several words; exact: one-to-one, slow")
    mlm: float = Field(0.5, ge=0, description="weight of the loss of masked words; 0: none")
    mask: float = Field(0.15, gt=0, le=1, description="share of the words that are masked")
    fusion: tuple[int, ...] = Field(
        (-1,), description="text blocks behind which masked words look at the picture; -1 is the last; none: ()"
    )
    vocabulary: Literal["all", "seen"] = Field(
        "all", description="what masked words may be: all tokens, or those of the training captions, which is cheaper for small sets"
    )
    probe: tuple[str, ...] = Field((), description="words whose masks are filled in for the figures `told` and `told_other`; none: ()")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.probe and not self.mlm:
            raise ValueError("probe asks what masked words are told, but mlm is 0")
        if len(set(self.fusion)) < len(self.fusion):
            raise ValueError(f"fusion names a layer twice: {self.fusion}")
        return self

    def build(self) -> LightClip:
        """The objective."""
        return LightClip(self)
