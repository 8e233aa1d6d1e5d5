"""Captioning with open_clip's CoCa: what the text decoder looks at, the next token's logits, and whole captions.

Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models" (TMLR 2022). The decoder looks at the picture's tokens, or, in a model
that says `condition: embedding`, at its unit-norm contrastive feature alone (the bottleneck of Kornblith et al., ICCV 2023): then a text's
feature can stand in for a picture's. "No picture" is zeros in the place of what the decoder looks at, in training and in decoding alike.

A column of the decoder's head that is exactly zero belongs to a token that the captioner never learnt (`keep_only`): it is never said. So a small
captioner need not score fifty thousand tokens.

Shape legend: N pictures, L tokens, S what the decoder looks at (1 with `embedding`), W width, V tokens that may be said, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.models import decoding, preprocess
from diptych.models.tokenizer import EOT, SOT, Tokenizer

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

Condition = Literal["tokens", "embedding"]


class Captioner:
    """A CoCa as a captioner. Owns nothing: the parameters are the model's.

    Args:
        model: a dual encoder whose `clip` is open_clip's CoCa, with CLIP's tokenizer.
        token_V: ids that may be said, int64; None: all whose column of the head is not zero.

    Raises ConfigError for a model that cannot caption.
    """

    def __init__(self, model: DualEncoder, token_V: Tensor | None = None) -> None:
        coca: Any = model.clip
        if not hasattr(coca, "text_decoder"):
            fix = "train one with `model: coca-…` and `objective: {method: coca}`"
            raise ConfigError.at("The model is no captioner", "model", type(coca).__name__, "open_clip's CoCa", fix)
        if not isinstance(model.tokenizer, Tokenizer):
            raise ConfigError.at("The captioner has a tokenizer of its own", "text_cfg", type(model.tokenizer).__name__, "CLIP's tokenizer")
        if getattr(coca.text, "cls_emb", None) is None:  # open_clip itself runs such a tower on full contexts only
            raise ConfigError.at("The captioner's text tower has no class token", "text_cfg.embed_cls", False, "true, as CoCa has it")
        self.model, self.coca = model, coca
        self.condition: Condition = model.captioner.get("condition", "tokens")
        width, features = coca.text_decoder.text_projection.shape[0], model.config.get("embed_dim")
        if self.condition == "embedding" and width != features:
            raise ConfigError.at("The decoder cannot look at the features", "embed_dim", features, f"the decoder's width, {width}")
        self.max_length = model.context_length - 1
        self.token_V = said_tokens(coca) if token_V is None else token_V

    @property
    def vocabulary(self) -> decoding.Vocabulary:
        """The special tokens as places in `token_V`, which is how this captioner numbers tokens in decoding."""
        bos, eos = (int((self.token_V == special).nonzero()[0, 0]) for special in (SOT, EOT))
        return decoding.Vocabulary(bos, eos, eos)

    # ------------------------------------------------------------ what the decoder looks at

    def see(self, image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Raw features `[N, D]` of pictures (uint8, or normalised floats) and what the decoder looks at, `[N, S, W]`."""
        if image_NCHW.dtype == torch.uint8:
            image_NCHW = preprocess.normalize(image_NCHW, self.model.mean, self.model.std)
        feature_ND, token_NSW = self.coca._encode_image(image_NCHW, normalize=False)
        return feature_ND, self.of_feature(feature_ND) if self.condition == "embedding" else token_NSW

    def of_feature(self, feature_ND: Tensor) -> Tensor:
        """What a decoder of the condition `embedding` looks at, `[N, 1, W]`, from a feature of either tower. Raises ConfigError for others."""
        if self.condition != "embedding":
            fix = "choose an architecture with `captioner: {condition: embedding}`, e.g. coca-digits-16-bottleneck"
            raise ConfigError.at("The decoder looks at a picture's tokens", "captioner.condition", self.condition, "embedding", fix)
        return nn.functional.normalize(feature_ND, dim=-1)[:, None]

    # ------------------------------------------------------------ scores

    def read(self, text_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Raw features `[N, D]` of captions, and the unimodal states `[N, L, W]` of their tokens, from one pass of the text tower.

        The class token that makes the feature stands behind a full context, as in `encode_text`.
        """
        length = text_NL.shape[1]
        feature_ND, state_NLW = self.coca.text(nn.functional.pad(text_NL, (0, self.model.context_length - length)))
        return feature_ND, state_NLW[:, :length]

    def states(self, text_NL: Tensor) -> Tensor:
        """The unimodal states alone: no token sees what follows it, so the batch stays as short as it is."""
        state_NLW: Tensor = self.coca.text(text_NL)[1]
        return state_NLW

    def look(self, seen_NSW: Tensor, state_NLW: Tensor) -> Tensor:
        """The decoder's states `[N, L, W]` before its head, of unimodal states that look at a picture."""
        decoder, length = self.coca.text_decoder, state_NLW.shape[1]
        mask_LL = decoder.attn_mask[:length, :length]
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            state_NLW = cross(block(state_NLW, attn_mask=mask_LL), k_x=seen_NSW, v_x=seen_NSW)
        state: Tensor = decoder.ln_final(state_NLW)
        return state

    def logits(self, seen_NSW: Tensor, text_NL: Tensor) -> Tensor:
        """Logits `[N, L, V]` of the token after each token of captions (ids of the tokenizer), for the tokens that may be said."""
        return self.head(self.look(seen_NSW, self.states(text_NL)))

    def head(self, state: Tensor) -> Tensor:
        """Logits `[…, V]` of states `[…, W]`."""
        projection_WV = self.coca.text_decoder.text_projection
        whole = len(self.token_V) == projection_WV.shape[1]
        logits: Tensor = state @ (projection_WV if whole else projection_WV[:, self.token_V])
        return logits

    def following(self, seen_NSW: Tensor) -> decoding.Next:
        """The logits after prefixes of places in `token_V`, for `decoding.decode`; rows repeat a picture's as often as they outnumber it."""

        def logits(place_ML: Tensor) -> Tensor:
            seen_MSW = seen_NSW.repeat_interleave(len(place_ML) // len(seen_NSW), dim=0)
            return self.head(self.look(seen_MSW, self.states(self.token_V[place_ML]))[:, -1])

        return logits

    # ------------------------------------------------------------ captions

    @torch.no_grad()
    def caption(
        self,
        image_NCHW: Tensor,
        guidance: float = 1.0,
        *,
        beams: int = 1,
        draw: Callable[[int], Tensor] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        max_length: int | None = None,
    ) -> list[str]:
        """One caption a picture: the best token each time, by beams, or sampled with `draw`; see `decoding`.

        Args:
            image_NCHW: pictures as the model takes them, on its device.
            guidance: the scale of classifier-free guidance; 1: none.
            beams: of the search; more than one excludes sampling.
            draw, temperature, top_k: of the sampling.
            max_length: tokens of a caption; by default what the context holds.
        """
        assert beams == 1 or draw is None, "a beam search draws nothing"
        seen_NSW = self.see(image_NCHW)[1]
        following = decoding.guided(self.following(seen_NSW), self.following(torch.zeros_like(seen_NSW)), guidance)
        length, count, device = min(max_length or self.max_length, self.max_length), len(seen_NSW), seen_NSW.device
        if beams > 1:
            found = decoding.beam_search(following, count, beams, self.vocabulary, length, device=device)
        else:
            options: dict[str, Any] = {"draw": draw, "temperature": temperature, "top_k": top_k}
            found = decoding.decode(following, count, self.vocabulary, length, device=device, **options)
        return self.texts(found.token_NL)

    def texts(self, place_NL: Tensor) -> list[str]:
        """The texts of places in `token_V`."""
        tokenizer: Any = self.model.tokenizer
        texts: list[str] = tokenizer.decode(self.token_V[place_NL].tolist())
        return texts


def said_tokens(coca: Any) -> Tensor:
    """The ids of the tokens whose column of the head is not zero, int64 `[V]`, rising."""
    head: Tensor = coca.text_decoder.text_projection
    return (head.detach() != 0).any(dim=0).nonzero()[:, 0]


@torch.no_grad()
def keep_only(model: DualEncoder, token_V: Tensor) -> None:
    """Rules out all tokens but these for good: the other columns of the head become zero, and nothing that trains on `token_V` moves them."""
    head: Any = model.clip.text_decoder.text_projection
    kept_V = torch.zeros(head.shape[1], dtype=head.dtype, device=head.device)
    kept_V[token_V] = 1.0
    head.mul_(kept_V)


def tokens_of(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """The ids that texts are made of, int64 `[V]`, rising, with the start and the end token and without padding."""
    text_NL = torch.from_numpy(tokenizer.encode_cut(list(texts)))
    token_V: Tensor = torch.unique(torch.cat([text_NL[in_caption(text_NL)], torch.tensor([SOT, EOT])]))
    return token_V


def in_caption(text_NL: Tensor) -> Tensor:
    """Which tokens belong to their caption, bool `[N, L]`: all up to and including the end token. Padding has an id that words have too."""
    return torch.arange(text_NL.shape[1], device=text_NL.device) <= (text_NL == EOT).int().argmax(dim=1)[:, None]
