"""CgT-GAN: a captioner that learns from pictures and sentences which have nothing to do with each other.

"CgT-GAN: CLIP-guided Text GAN for Image Captioning" (ACM MM 2023). Stage `text`: the decoder of a CoCa whose two towers are a trained dual encoder
learns to say each corpus sentence from that sentence's own feature. Stage `adversarial`: conditioned on pictures, it samples captions and is
rewarded where a discriminator takes them for the corpus and where CLIP finds them near the picture's text target. The corpus is the
captions of the training pairs; which picture a caption came with is never looked at. The towers stay as they are.

The paper gives the discriminator an optimizer of its own. Here both losses are added: no gradient of either reaches the other's parameters, so for
an optimizer that works on each parameter alone it is the same but for its warm-up; `discriminator_lr` sets the two rates apart. Rewards are those
of the weights before the step.

Shape legend: N pictures, S samples a picture, M = N * S, L tokens, V tokens that may be said, T corpus sentences, D feature width, W width.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.core.chance import uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Encoded, TrainContext
from diptych.models.captioner import Captioner, in_caption, keep_only, tokens_of
from diptych.models.decoding import decode, filtered, mean_logprob, said
from diptych.objectives.cgt_reward import advantage, aggregate, clip_reward, clip_weight, combined, discriminator_loss, policy_loss
from diptych.objectives.coca import caption_loss

CORPUS_BATCH = 256
REAL = 1 << 20
"""Names the draws of real sentences apart from those of sampled tokens, whose positions are small."""


class Discriminator(nn.Module):
    """Tells sentences of the corpus from samples: embeddings, a GRU, and two layers on its state at the sentence's end. One logit each."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1))

    def forward(self, place_NL: Tensor, eos: int) -> Tensor:
        """Logits `[N]`, high for real, of sentences of places in the vocabulary; what stands behind their end is not looked at."""
        state_NLW, _ = self.gru(self.embedding(place_NL))
        last_N = said(place_NL, eos).sum(dim=1) - 1
        logit: Tensor = self.head(state_NLW[torch.arange(len(place_NL), device=place_NL.device), last_N])[:, 0]
        return logit


class CgtGan(nn.Module):
    """The objective. State: the discriminator. The corpus, as tokens and as features, follows from the training pairs."""

    encodes: tuple[()] = ()
    whole_batch = whole_weights = True
    token_V: Tensor
    corpus_TL: Tensor
    corpus_TD: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.seed = 0
        self.lr_scales = {"discriminator": config.discriminator_lr}
        self.discriminator: Discriminator | None = None

    def start(self, context: TrainContext) -> None:
        """Freezes the towers, reads the corpus. Raises ConfigError for a model that cannot be conditioned on a feature, DataError without corpus."""
        self.seed, model = context.seed, context.model
        clip: Any = model.clip
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(name.startswith("text_decoder."))
        texts = [text for texts in context.captions() for text in texts[:1]]
        if not texts:
            raise DataError.at("There is no corpus", "captions", "none", "a caption in some training pair")
        token_V = tokens_of(texts, context.tokenizer).to(context.device)
        captioner = Captioner(model, token_V)  # type: ignore[arg-type]  # refuses a model that is no captioner
        captioner.of_feature(torch.zeros(1, 1))  # refuses a decoder that looks at pictures' tokens
        keep_only(model, token_V)  # type: ignore[arg-type]
        self.register_buffer("token_V", token_V)
        if self.config.stage == "adversarial":
            self._read_corpus(captioner, torch.from_numpy(context.tokenizer.encode_cut(texts)).to(context.device))
            self.discriminator = Discriminator(len(token_V), self.config.discriminator_width)

    @torch.no_grad()
    def _read_corpus(self, captioner: Captioner, text_TL: Tensor) -> None:
        feature_TD = torch.cat([captioner.read(text_NL)[0] for text_NL in torch.split(text_TL, CORPUS_BATCH)])
        place_TL = torch.searchsorted(captioner.token_V, text_TL.contiguous()).masked_fill(~in_caption(text_TL), captioner.vocabulary.eos)
        self.register_buffer("corpus_TL", place_TL, persistent=False)
        self.register_buffer("corpus_TD", feature_TD, persistent=False)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """Stage `text`: `loss`, nats a token. Stage `adversarial`: `loss`, its parts `generator` and `discriminator`, the mean rewards of the
        samples `reward_clip` and `reward_critic`, and the `weight` of CLIP's.
        """
        captioner = Captioner(encoded.model, self.token_V)  # type: ignore[arg-type]
        text_NL = encoded.batch["text_NL"]
        with encoded.arithmetic(text_NL.device):
            if self.config.stage == "adversarial":
                return self._adversarial(captioner, encoded)
            with torch.no_grad():
                feature_ND, state_NLW = captioner.read(text_NL)
            logits_NLV = captioner.head(captioner.look(captioner.of_feature(feature_ND), state_NLW[:, :-1]))
        return {"loss": caption_loss(logits_NLV.float(), text_NL, self.token_V)}

    def _adversarial(self, captioner: Captioner, encoded: Encoded) -> dict[str, Tensor]:
        config, row_N, samples = self.config, encoded.batch["row_N"], self.config.samples
        with torch.no_grad():
            image_ND, seen_NSW = captioner.see(encoded.batch["image_NCHW"])
            target_ND = aggregate(image_ND, self.corpus_TD, config.sharpness).to(image_ND.dtype)
            drawn_ML = self._sampled(captioner, seen_NSW, row_N, encoded.step)
            sample_ML = ended(drawn_ML, captioner.vocabulary.eos)
            baseline_NL = self._greedy(captioner, seen_NSW) if config.baseline == "greedy" else None
        logprob_NS = self._logprob(captioner, seen_NSW.repeat_interleave(samples, dim=0), drawn_ML).view(-1, samples)
        weight = clip_weight(encoded.step, config.wait, config.ramp, config.weight)
        with torch.no_grad():
            scale = float(encoded.logit_scale)
            clip_M, critic_M = self._clip_reward(captioner, sample_ML, image_ND, target_ND, scale), self._score(sample_ML, captioner)
            clip_N = critic_N = None
            if baseline_NL is not None:
                clip_N, critic_N = (
                    self._clip_reward(captioner, baseline_NL, image_ND, target_ND, scale),
                    self._score(baseline_NL, captioner),
                )
        of_clip, of_critic = (
            policy_loss(logprob_NS, advantage(reward_M.view(-1, samples), reward_N))
            for reward_M, reward_N in ((clip_M, clip_N), (critic_M, critic_N))
        )
        generator = combined(of_clip, of_critic, weight)
        real_ML = self.corpus_TL[self._drawn(row_N, samples, encoded.step)]
        discriminator = discriminator_loss(self._score(real_ML, captioner), self._score(sample_ML, captioner))
        figures = {"generator": generator, "discriminator": discriminator, "reward_clip": clip_M.mean(), "reward_critic": critic_M.mean()}
        parts = {name: value.detach() for name, value in figures.items()}
        return {"loss": generator + discriminator, **parts, "weight": torch.tensor(weight)}

    def _greedy(self, captioner: Captioner, seen_NSW: Tensor) -> Tensor:
        """The best captions, places `[N, L]`."""
        length = min(self.config.max_length, captioner.max_length)
        following, device = captioner.following(seen_NSW), seen_NSW.device
        return decode(following, len(seen_NSW), captioner.vocabulary, length, force_end=True, device=device).token_NL

    def _sampled(self, captioner: Captioner, seen_NSW: Tensor, row_N: Tensor, step: int) -> Tensor:
        """S captions a picture, places `[M, L]`, drawn by `(seed, row, sample, step, position)`; one at the limit has no end yet."""
        config, count = self.config, self.config.samples
        row_M = row_N.cpu().numpy().astype(np.uint64).repeat(count)
        sample_M = np.tile(np.arange(count, dtype=np.uint64), len(row_N))
        return decode(
            captioner.following(seen_NSW), len(row_M), captioner.vocabulary, min(config.max_length, captioner.max_length),
            draw=lambda position: torch.from_numpy(uniform(self.seed, row_M, sample_M, step, position)),
            temperature=config.temperature, top_k=config.top_k, device=seen_NSW.device,
        ).token_NL  # fmt: skip

    def _logprob(self, captioner: Captioner, seen_MSW: Tensor, place_ML: Tensor) -> Tensor:
        """The mean log-probability `[M]` of the tokens of each sample as they were drawn, with gradient."""
        with torch.no_grad():
            state_MLW = captioner.states(self.token_V[place_ML[:, :-1]])
        logits_MLV = captioner.head(captioner.look(seen_MSW, state_MLW)).float()
        return mean_logprob(filtered(logits_MLV, self.config.temperature, self.config.top_k), place_ML[:, 1:], captioner.vocabulary.eos)

    def _clip_reward(self, captioner: Captioner, place_ML: Tensor, image_ND: Tensor, target_ND: Tensor, scale: float) -> Tensor:
        """CLIP's reward of captions; M / N of them belong to each picture."""
        text_ML = self.token_V[place_ML].masked_fill(~said(place_ML, captioner.vocabulary.eos), 0)
        text_MD, times = captioner.read(text_ML)[0].float(), len(place_ML) // len(image_ND)
        target_MD, image_MD = (feature_ND.float().repeat_interleave(times, dim=0) for feature_ND in (target_ND, image_ND))
        return clip_reward(text_MD, target_MD, image_MD, scale, self.config.cos_weight, self.config.image_weight).total_N

    def _score(self, place_ML: Tensor, captioner: Captioner) -> Tensor:
        assert self.discriminator is not None, "start() comes first"
        logit_M: Tensor = self.discriminator(place_ML[:, 1:], captioner.vocabulary.eos).float()
        return logit_M

    def _drawn(self, row_N: Tensor, samples: int, step: int) -> Tensor:
        """Rows of the corpus, as many as there are samples, drawn by `(seed, row, sample, step)`."""
        row_N1 = row_N.cpu().numpy().astype(np.uint64)[:, None]
        draw_NS = uniform(self.seed, row_N1, np.arange(samples, dtype=np.uint64), step, REAL)
        return torch.from_numpy((draw_NS * len(self.corpus_TL)).astype(np.int64).ravel()).to(row_N.device)

    def after_step(self, step: int, model: nn.Module) -> None:
        """Keeps tokens ruled out that the corpus does not have."""
        del step
        keep_only(model, self.token_V)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


def ended(place_ML: Tensor, eos: int) -> Tensor:
    """Captions with an end: one that has none gets it in place of its last token, as the released code has it."""
    lacks_M1 = ~(place_ML == eos).any(dim=1, keepdim=True)
    last_ML = torch.arange(place_ML.shape[1], device=place_ML.device) == place_ML.shape[1] - 1
    return place_ML.masked_fill(lacks_M1 & last_ML, eos)


class Config(BaseConfig):
    """CgT-GAN's objective; start from a trained dual encoder (`init`) whose decoder looks at a feature."""

    method: Literal["cgt-gan"] = "cgt-gan"
    stage: Literal["text", "adversarial"] = Field("adversarial", description="say sentences from their own features first; then the game")
    sharpness: float = Field(100.0, gt=0, le=10_000, description="t of the text target: factor of the cosines of picture and corpus")
    cos_weight: float = Field(0.5, ge=0, le=1, description="share of the cosine in the reward of being near the target; the rest: l1")
    image_weight: float = Field(0.0, ge=0, le=1, description="share of the cosine with the picture itself in CLIP's reward")
    weight: float = Field(0.5, ge=0, le=1, description="weight of CLIP's reward in the end; the rest is the discriminator's")
    wait: int = Field(150, ge=0, description="updates before CLIP's reward counts at all")
    ramp: int = Field(2350, ge=0, description="updates over which its weight rises to `weight`; 0: at once")
    samples: int = Field(5, ge=2, le=64, description="S: captions sampled a picture")
    baseline: Literal["greedy", "sample"] = Field(
        "greedy", description="what a sample is compared with: the greedy caption, the other samples"
    )
    temperature: float = Field(1.0, gt=0, le=10, description="of the sampling")
    top_k: int | None = Field(None, ge=1, description="sample among so many best tokens; null: among all")
    max_length: int = Field(20, ge=2, le=1000, description="tokens of a sampled caption, its end included")
    discriminator_lr: float = Field(
        1.0, gt=0, le=1000, description="factor of the learning rate for the discriminator; the paper's rates are equal"
    )
    discriminator_width: int = Field(64, ge=2, le=8192, description="width of the discriminator's embeddings and state")

    def build(self) -> CgtGan:
        """The objective."""
        return CgtGan(self)
