"""Decoding of first-order captioners: tables of the next token's logits by the previous token."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diptych.models.decoding import (
    NONE,
    Vocabulary,
    beam_search,
    decode,
    filtered,
    guide,
    guide_by_language_model,
    guided,
    mean_logprob,
    said,
    sampled,
)

WORDS = 6
VOCABULARY = Vocabulary(bos=0, eos=1)


def table(seed: int, captions: int = 3, end: float = 0.0) -> Tensor:
    logits = torch.randn(captions, WORDS, WORDS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    logits[..., 1] += end
    return logits


def following(logits_NVV: Tensor) -> Callable[[Tensor], Tensor]:
    def next_token(token_ML: Tensor) -> Tensor:
        rows = torch.arange(len(token_ML)) // (len(token_ML) // len(logits_NVV))
        return logits_NVV[rows, token_ML[:, -1]]

    return next_token


def test_guidance_at_its_fixed_points_and_beyond() -> None:
    c, u = torch.tensor([[2.0, 0.5, -torch.inf]]), torch.tensor([[1.0, 1.0, -torch.inf]])
    assert guide(c, u, 1.0) is c
    assert guide(c, u, 0.0) is u
    assert guide(c, u, 3.0).tolist() == [[4.0, -0.5, -np.inf]]


def test_guidance_on_logits_and_on_log_probabilities_is_the_same_distribution() -> None:
    c, u = table(0)[0], table(1)[0]
    on_logits = guide(c, u, 2.5).softmax(dim=-1)
    on_logprobs = guide(c.log_softmax(dim=-1), u.log_softmax(dim=-1), 2.5).softmax(dim=-1)
    torch.testing.assert_close(on_logits, on_logprobs)


def test_the_unguided_branch_is_not_asked_where_it_does_not_count() -> None:
    def refuses(_: Tensor) -> Tensor:
        raise AssertionError("asked")

    c = following(table(0))
    assert guided(c, refuses, 1.0) is c
    assert guided(refuses, c, 0.0) is c


def test_both_branches_see_the_guided_prefix() -> None:
    seen: list[Tensor] = []
    u = following(table(1))

    def watched(token_NL: Tensor) -> Tensor:
        seen.append(token_NL)
        return u(token_NL)

    found = decode(guided(following(table(0)), watched, 4.0), 3, VOCABULARY, 4).token_NL
    for prefix_NL in seen[1:]:
        length = prefix_NL.shape[1]
        alive = said(found[:, 1:length], 1).all(dim=1)
        assert (prefix_NL[alive] == found[alive, :length]).all()


def test_a_language_model_ends_a_caption_with_its_newline() -> None:
    q, c, u = torch.full((1, WORDS), 0.0), table(0)[:1, 0], table(1)[:1, 0]
    q[0, 2] = 8.0
    scores = guide_by_language_model(q, c, u, 1.0, 0.0, eos=1, newline=2)
    plain = q.log_softmax(dim=-1) + c.log_softmax(dim=-1)
    assert scores[0, 1] == pytest.approx(float(torch.logsumexp(plain[0, [1, 2]], dim=0)))
    assert scores[0, 2] == -np.inf
    torch.testing.assert_close(
        guide_by_language_model(q, c, u, 2.0, -1.0, eos=1), q.log_softmax(-1) + 2 * c.log_softmax(-1) + u.log_softmax(-1)
    )


def test_greedy_decoding_ends_captions_one_by_one() -> None:
    logits = torch.full((2, WORDS, WORDS), -5.0)
    logits[0, 0, 3] = logits[0, 3, 1] = 5.0
    logits[1, :, 4] = 5.0
    found = decode(following(logits), 2, VOCABULARY, 3)
    assert found.token_NL.tolist() == [[0, 3, 1, NONE], [0, 4, 4, 4]]
    assert decode(following(logits), 2, VOCABULARY, 3, force_end=True).token_NL.tolist() == [[0, 3, 1, NONE], [0, 4, 4, 1]]
    assert decode(following(logits[:1]), 1, VOCABULARY, 9).token_NL.shape == (1, 3)
    assert decode(following(logits), 0, VOCABULARY, 3).token_NL.shape == (0, 1)


def test_sampling_follows_the_distribution_and_the_draws() -> None:
    logprob_NV = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(4000, 3)
    draw_N = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(sampled(logprob_NV, draw_N)) / 4000
    assert share.tolist() == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
    assert sampled(logprob_NV[:3], torch.tensor([0.0, 0.6, 0.999999])).tolist() == [0, 1, 2]


def test_top_k_and_temperature() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    kept = filtered(scores, temperature=0.5, top_k=2)
    assert kept[0, [1, 3]].tolist() == [-np.inf, -np.inf]
    assert kept[0, 0].exp() == pytest.approx(1 / (1 + np.exp(-2.0)))
    torch.testing.assert_close(filtered(scores, top_k=9), scores.log_softmax(dim=-1))


def test_log_probabilities_of_samples_can_be_scored_again_and_have_gradients() -> None:
    logits = table(2, captions=4, end=1.5).requires_grad_()
    draws = torch.rand(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = decode(following(logits), 4, VOCABULARY, 12, draw=lambda position: draws[position - 1])
    rows = torch.arange(4)[:, None]
    logprob_NLV = logits[rows, found.token_NL[:, :-1].clamp(min=0)].log_softmax(dim=-1)
    again = mean_logprob(logprob_NLV, found.token_NL[:, 1:], 1)
    torch.testing.assert_close(again, found.logprob_N)
    again.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_tokens_behind_the_end_do_not_count() -> None:
    logprob_NLV = torch.tensor([[[-1.0, -2.0], [-torch.inf, -3.0]]])
    assert mean_logprob(logprob_NLV, torch.tensor([[1, 0]]), 1).tolist() == [-2.0]
    assert said(torch.tensor([[4, 1, 1, 3], [4, 4, 4, 4]]), 1).tolist() == [[True, True, False, False], [True] * 4]


def test_one_beam_is_greedy() -> None:
    logits = table(3, captions=5)
    assert (
        beam_search(following(logits), 5, 1, VOCABULARY, 6).token_NL.tolist()
        == decode(following(logits), 5, VOCABULARY, 6).token_NL.tolist()
    )


def test_wide_beams_find_the_best_caption() -> None:
    logits, length = table(4, captions=1), 3
    logprob = logits[0].log_softmax(dim=-1)

    def mean(tokens: tuple[int, ...]) -> float:
        total = [float(logprob[before, after]) for before, after in itertools.pairwise((0, *tokens))]
        return sum(total) / len(total)

    captions = [
        tokens
        for count in range(1, length + 1)
        for tokens in itertools.product(range(WORDS), repeat=count)
        if 1 not in tokens[:-1] and (tokens[-1] == 1 or count == length)
    ]
    best = max(captions, key=mean)
    found = beam_search(following(logits), 1, 200, VOCABULARY, length)
    assert [token for token in found.token_NL[0].tolist() if token != NONE] == [0, *best]
    assert float(found.logprob_N[0]) == pytest.approx(mean(best))
