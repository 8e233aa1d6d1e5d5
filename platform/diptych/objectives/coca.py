"""CoCa's loss: a captioner and a dual encoder in one model, with pictures hidden from the captioner for classifier-free guidance.

Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models" (TMLR 2022), section 3.2. Hiding the picture: Kornblith et al.,
"Guiding Image Captioning Models Toward More Specific Captions" (ICCV 2023), section 3.1: half of the fine-tuning examples, none before.

Shape legend: N pairs on this rank, L tokens, V tokens that may be said.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from diptych.core.chance import uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoded, TrainContext
from diptych.models.captioner import Captioner, in_caption, keep_only, said_tokens, tokens_of
from diptych.objectives.clip import clip_loss
from diptych.objectives.gather import gather, world_size


class Coca(nn.Module):
    """The objective; it runs the model itself, for the decoder needs more than features. State: the tokens that may be said."""

    encodes: tuple[()] = ()
    whole_batch = whole_weights = True
    token_V: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.seed = 0

    def start(self, context: TrainContext) -> None:
        """Settles which tokens may be said. Raises ConfigError for a model that is no captioner."""
        self.seed = context.seed
        model = context.model
        Captioner(model)  # type: ignore[arg-type]
        if self.config.vocabulary == "seen":
            token_V = tokens_of([text for texts in context.captions() for text in texts], context.tokenizer)
            keep_only(model, token_V.to(context.device))  # type: ignore[arg-type]
        else:
            token_V = said_tokens(model.clip)
        self.register_buffer("token_V", token_V)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`; its parts `caption` (nats a token, over the captions of all ranks) and, unless its weight is 0, `contrastive` (nats)."""
        assert encoded.model is not None
        config, captioner = self.config, Captioner(encoded.model, self.token_V)  # type: ignore[arg-type]
        text_NL, contrastive = encoded.batch["text_NL"], config.contrastive_weight > 0
        with encoded.arithmetic(text_NL.device):
            image_ND, seen_NSW = captioner.see(encoded.batch["image_NCHW"])
            text_ND, state_NLW = captioner.read(text_NL) if contrastive else (image_ND, captioner.states(text_NL))
            shown_N = ~hidden(self.seed, encoded.batch["row_N"], encoded.step, config.drop)
            logits_NLV = captioner.head(captioner.look(seen_NSW * shown_N[:, None, None], state_NLW[:, :-1]))
        caption = caption_loss(logits_NLV.float(), text_NL, self.token_V)
        loss, parts = config.caption_weight * caption, {"caption": caption.detach()}
        if contrastive:
            pull = clip_loss(normalize(image_ND.float(), dim=-1), normalize(text_ND.float(), dim=-1), encoded.logit_scale)
            loss, parts = loss + config.contrastive_weight * pull, {**parts, "contrastive": pull.detach()}
        return {"loss": loss, **parts}

    def after_step(self, step: int, model: nn.Module) -> None:
        """Keeps tokens ruled out that no gradient reaches, should an optimizer have moved them."""
        del step
        if self.config.vocabulary == "seen":
            keep_only(model, self.token_V)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


def hidden(seed: int, row_N: Tensor, step: int, share: float) -> Tensor:
    """Which pairs see no picture in this step, bool `[N]`: drawn by `(seed, row, step)`, whatever rank they are on."""
    if share == 0:
        return torch.zeros(len(row_N), dtype=torch.bool, device=row_N.device)
    draw_N = uniform(seed, row_N.cpu().numpy().astype(np.uint64), step)
    return torch.from_numpy(draw_N < share).to(row_N.device)


def caption_loss(logits_NLV: Tensor, text_NL: Tensor, token_V: Tensor) -> Tensor:
    """Cross-entropy of each next token, in nats: the mean over the tokens of all ranks, padding left out.

    Args:
        logits_NLV: `[N, L - 1, V]`, of the tokens behind the first L - 1.
        text_NL: ids of the tokenizer; each row holds its end token.
        token_V: the ids that the columns of the logits stand for, rising; they hold every token of the captions.
    """
    own_NL = in_caption(text_NL)[:, 1:]
    target_M = torch.searchsorted(token_V, text_NL[:, 1:][own_NL])
    assert (token_V[target_M.clamp(max=len(token_V) - 1)] == text_NL[:, 1:][own_NL]).all(), "a caption has a token that may not be said"
    count = gather(own_NL.sum().float()[None], with_grad=False).sum() / world_size()
    return cross_entropy(logits_NLV[own_NL], target_M, reduction="sum") / count


class Config(BaseConfig):
    """CoCa's objective; without its contrastive part a plain captioner, with `drop` one that can be guided."""

    method: Literal["coca"] = "coca"
    caption_weight: float = Field(2.0, ge=0, description="weight of the captioning loss")
    contrastive_weight: float = Field(1.0, ge=0, description="weight of the contrastive loss; 0: captioning alone")
    drop: float = Field(
        0.0, ge=0, lt=1, description="share of examples whose picture the decoder does not see, for guidance; the paper: 0.5 in fine-tuning"
    )
    vocabulary: Literal["all", "seen"] = Field(
        "all",
        description="tokens that may be said: all of the tokenizer, or those of the training captions, which is cheaper for small sets",
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.caption_weight == self.contrastive_weight == 0:
            raise ValueError("caption_weight and contrastive_weight are both 0: nothing would be trained")
        return self

    def build(self) -> Coca:
        """The objective."""
        return Coca(self)
