"""Autoregressive decoding in plain torch: greedy, sampled, by beams; guided by what a captioner would say without the picture, or by a language model.

Classifier-free guidance: Kornblith et al., "Guiding Image Captioning Models Toward More Specific Captions" (ICCV 2023), sections 3.1 and 3.2.
A captioner is a function from prefixes `[N, L]` to the next token's logits `[N, V]`, so every source of tokens decodes alike, and two sources
that are mixed always see the same prefix. No keys and values are kept: captions are short.

Shape legend: N captions, L tokens of a prefix, V vocabulary, K beams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Next = Callable[[Tensor], Tensor]
"""Logits `[N, V]` of the token after each prefix `[N, L]`, int64."""
Draw = Callable[[int], Tensor]
"""Uniform draws `[N]` in [0, 1) for the token at a position (the start token has position 0)."""
NONE = -1
"""What stands behind a caption's end where the caller names no padding."""


class Decoded(NamedTuple):
    """Captions: `token_NL` int64 with the start token, the end token where it came, then padding; `logprob_N`, their mean log-probability.

    The mean is over the tokens up to and including the end, under the distribution that they were drawn from (greedy: the scores' softmax).
    """

    token_NL: Tensor
    logprob_N: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The special tokens: `bos` begins a caption, `eos` ends it, `pad` follows."""

    bos: int
    eos: int
    pad: int = NONE


# ---------------------------------------------------------------- scores


def guide(conditional_NV: Tensor, unconditional_NV: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance `u + scale (c - u)` on logits or log-probabilities (equation 2): the softmax of either is the same.

    A scale of 1 is the captioner itself, 0 what it says of no picture; both to the bit. (Another convention writes w = scale - 1.)
    Where both sides say -inf, so does the result.
    """
    if scale == 1:
        return conditional_NV
    if scale == 0:
        return unconditional_NV
    difference_NV = torch.where(conditional_NV == unconditional_NV, 0.0, conditional_NV - unconditional_NV)
    return unconditional_NV + scale * difference_NV


def guide_by_language_model(
    language_NV: Tensor, conditional_NV: Tensor, unconditional_NV: Tensor, alpha: float, beta: float, eos: int, newline: int | None = None
) -> Tensor:
    """Scores `log q + alpha log p(x | image) - beta log p(x)` of a language model q and a captioner p (section 3.2), from logits.

    A language model that was shown captions a line each ends one with a newline: its probability is added to that of `eos` after the
    mixture, as the paper has it, and `newline` itself is ruled out. Any sign of `beta` is allowed: the paper reports a negative one.
    """
    q, c, u = (logits_NV.log_softmax(dim=-1) for logits_NV in (language_NV, conditional_NV, unconditional_NV))
    score_NV = q + alpha * c - beta * u
    if newline is not None:
        score_NV[:, eos] = torch.logaddexp(score_NV[:, eos], score_NV[:, newline])
        score_NV[:, newline] = -torch.inf
    return score_NV


def filtered(score_NV: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """Log-probabilities `[N, V]` of tempered scores among the `top_k` best; -inf for the others. Ties of the last place stay in."""
    tempered_NV = score_NV / temperature
    if top_k is not None and top_k < tempered_NV.shape[-1]:
        least_N1 = tempered_NV.topk(top_k, dim=-1).values[..., -1:]
        tempered_NV = tempered_NV.masked_fill(tempered_NV < least_N1, -torch.inf)
    return tempered_NV.log_softmax(dim=-1)


def sampled(logprob_NV: Tensor, draw_N: Tensor) -> Tensor:
    """Tokens `[N]`, int64, by inverse transform from log-probabilities and uniform draws in [0, 1)."""
    reach_NV = logprob_NV.double().exp().cumsum(dim=-1)
    aim_N1 = draw_N.to(reach_NV)[:, None] * reach_NV[:, -1:]
    return torch.searchsorted(reach_NV, aim_N1, right=True)[:, 0].clamp(max=logprob_NV.shape[1] - 1)


# ---------------------------------------------------------------- decoders


def guided(conditional: Next, unconditional: Next, scale: float) -> Next:
    """A captioner with classifier-free guidance: both branches see the guided prefix. At 0 and 1 only one of them is asked."""
    if scale == 1:
        return conditional
    if scale == 0:
        return unconditional
    return lambda token_NL: guide(conditional(token_NL), unconditional(token_NL), scale)


@torch.no_grad()
def decode(
    following: Next,
    count: int,
    vocabulary: Vocabulary,
    max_length: int,
    *,
    draw: Draw | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    force_end: bool = False,
    device: torch.device | str = "cpu",
) -> Decoded:
    """Captions of at most `max_length` tokens beside the start token: greedy, or sampled with `draw`.

    Ends as soon as every caption has; `token_NL` is as wide as the longest. A caption that reaches the limit has no end token, or with
    `force_end` has it in place of its last token, whose log-probability is still that of the token that was chosen.

    Args:
        following: logits after each prefix; finished captions are still handed in, padded with `eos`.
        draw: uniform draws by position; None takes the best token, the lowest id among equals.
        temperature, top_k: of the sampling; greedy decoding has neither.
    """
    token_NL = torch.full((count, 1), vocabulary.bos, dtype=torch.int64, device=device)
    done_N = torch.zeros(count, dtype=torch.bool, device=device)
    total_N = torch.zeros(count, dtype=torch.float64, device=device)
    length_N = torch.zeros(count, dtype=torch.int64, device=device)
    for position in range(1, max_length + 1):
        if count == 0 or done_N.all():
            break
        score_NV = following(token_NL)
        logprob_NV = score_NV.log_softmax(dim=-1) if draw is None else filtered(score_NV, temperature, top_k)
        next_N = score_NV.argmax(dim=-1) if draw is None else sampled(logprob_NV, draw(position))
        next_N = next_N.masked_fill(done_N, vocabulary.eos)
        said_N = logprob_NV.gather(1, next_N[:, None])[:, 0].double()
        total_N += torch.where(done_N, 0.0, said_N)
        length_N += ~done_N
        if force_end and position == max_length:
            next_N = torch.full_like(next_N, vocabulary.eos)
        token_NL = torch.cat([token_NL, next_N[:, None]], dim=1)
        done_N = done_N | (next_N == vocabulary.eos)
    return Decoded(padded(token_NL, vocabulary), total_N / length_N.clamp(min=1))


@torch.no_grad()
def beam_search(
    following: Next, count: int, beams: int, vocabulary: Vocabulary, max_length: int, *, device: torch.device | str = "cpu"
) -> Decoded:
    """The caption of the best mean log-probability that a search with K beams finds; with one beam it is greedy decoding.

    `following` sees `count * beams` prefixes, the beams of a caption beside each other. A finished beam keeps its place by its mean; the search
    ends when every beam has, or at `max_length` tokens.
    """
    token_ML = torch.full((count * beams, 1), vocabulary.bos, dtype=torch.int64, device=device)
    total_NK = torch.full((count, beams), -torch.inf, dtype=torch.float64, device=device)
    total_NK[:, 0] = 0.0
    length_NK = torch.zeros((count, beams), dtype=torch.int64, device=device)
    done_NK = torch.zeros((count, beams), dtype=torch.bool, device=device)
    for _ in range(max_length):
        if count == 0 or done_NK.all():
            break
        logprob_NKV = following(token_ML).log_softmax(dim=-1).double().view(count, beams, -1)
        width = logprob_NKV.shape[-1]
        stay_NKV = torch.full_like(logprob_NKV, -torch.inf)
        stay_NKV[..., vocabulary.eos] = 0.0
        grown_NKV = total_NK[..., None] + torch.where(done_NK[..., None], stay_NKV, logprob_NKV)
        grown_length_NK = length_NK + ~done_NK
        mean_NKV = grown_NKV / grown_length_NK[..., None].clamp(min=1)
        place_NK = mean_NKV.view(count, -1).topk(beams, dim=1).indices
        parent_NK, next_NK = place_NK // width, place_NK % width
        total_NK = grown_NKV.view(count, -1).gather(1, place_NK)
        length_NK, was_done_NK = grown_length_NK.gather(1, parent_NK), done_NK.gather(1, parent_NK)
        row_M = (torch.arange(count, device=device)[:, None] * beams + parent_NK).view(-1)
        token_ML = torch.cat([token_ML[row_M], next_NK.reshape(-1, 1)], dim=1)
        done_NK = was_done_NK | (next_NK == vocabulary.eos)
    mean_NK = total_NK / length_NK.clamp(min=1)
    best_N = mean_NK.argmax(dim=1)
    token_NL = token_ML.view(count, beams, -1)[torch.arange(count, device=device), best_N]
    return Decoded(padded(token_NL, vocabulary), mean_NK.gather(1, best_N[:, None])[:, 0])


def padded(token_NL: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The tokens with `pad` in place of everything behind the first end token."""
    ended_NL = (token_NL == vocabulary.eos).cumsum(dim=1)
    behind_NL = (ended_NL > 1) | ((ended_NL == 1) & (token_NL != vocabulary.eos))
    return token_NL.masked_fill(behind_NL, vocabulary.pad)


def said(token_NL: Tensor, eos: int) -> Tensor:
    """Which of the tokens belong to their caption, bool `[N, L]`: all up to and including the first end token."""
    ended_NL = (token_NL == eos).cumsum(dim=1)
    return (ended_NL == 0) | ((ended_NL == 1) & (token_NL == eos))


def mean_logprob(logprob_NLV: Tensor, token_NL: Tensor, eos: int) -> Tensor:
    """The mean log-probability `[N]` of each caption's tokens up to and including its end; differentiable in the log-probabilities.

    A filtered distribution has -inf at tokens that it ruled out; what stands behind the end is never looked up.
    """
    own_NL = said(token_NL, eos)
    chosen_NL = logprob_NLV.gather(2, token_NL.masked_fill(~own_NL, eos)[..., None])[..., 0]
    return torch.where(own_NL, chosen_NL, 0.0).sum(dim=1) / own_NL.sum(dim=1)
