"""Softmax losses over similarities of which never more than a few rows exist at once.

The similarities of n queries to N keys are computed `chunk` rows at a time, once for the value and once more in the backward: memory grows
with n + N instead of n * N. The sums of exponents over columns run along with the chunks (the online softmax of Milakov and Gimelshein
2018, "Online normalizer calculation for softmax"), so both directions of a square cost one product.

Shape legend: n queries, N keys, C rows of a chunk, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def chunked_nll(
    query_nD: Tensor, key_ND: Tensor, scale: Tensor, *, offset: int, chunk: int, columns: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What a query, and a key, pays for its partner: `logsumexp` of its scores less the partner's score, in nats.

    Differentiable in the features and the scale, once in linear memory. A second derivative (`create_graph`) is right too, but the
    step that takes it builds all `[n, N]` scores.

    Args:
        query_nD, key_ND: float features, used as they are; row i's partner is the key `offset + i`.
        scale: scalar factor of the scores.
        offset: place of the first query's partner.
        chunk: rows of scores that exist at once, >= 1.
        columns: also give what the keys pay; the scores must be square then, with `offset` 0.

    Returns:
        `[n]` of the queries; `[N]` of the keys, or None; and bool `[n]`: whether no key scores higher than the partner.
    """
    assert 0 <= offset <= len(key_ND) - len(query_nD), f"{len(query_nD)} partners from {offset} among {len(key_ND)} keys"
    assert not columns or len(query_nD) == len(key_ND), f"{len(query_nD)} x {len(key_ND)} scores are not square"
    row_n, column_N, hit_n = _Nll.apply(query_nD, key_ND, scale, offset, chunk, columns)
    return row_n, column_N if columns else None, hit_n


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_nD: Tensor, key_ND: Tensor, scale: Tensor, offset: int, chunk: int, columns: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, N = len(query_nD), len(key_ND)
        row_n, own_n = query_nD.new_empty(n), query_nD.new_empty(n)
        hit_n = torch.empty(n, dtype=torch.bool, device=query_nD.device)
        top_N = query_nD.new_full((N if columns else 0,), -torch.inf)
        sum_N = torch.zeros_like(top_N)
        for rows, label_C, score_CN in _chunks(query_nD, key_ND, scale, offset, chunk):
            top_C, best_C = score_CN.max(dim=1)
            own_n[rows] = score_CN.gather(1, label_C[:, None])[:, 0]
            hit_n[rows] = best_C == label_C
            if columns:
                new_N = torch.maximum(top_N, score_CN.amax(dim=0))
                sum_N.mul_((top_N - new_N).exp_()).add_((score_CN - new_N).exp_().sum(dim=0))
                top_N = new_N
            row_n[rows] = score_CN.sub_(top_C[:, None]).exp_().sum(dim=1).log_().sub_(own_n[rows] - top_C)
        # The gap of the own score to the highest is taken first: the two are large and nearly equal once a pair is learnt.
        column_N = sum_N.log_().sub_(own_n - top_N) if columns else top_N
        ctx.save_for_backward(query_nD, key_ND, scale, row_n + own_n, column_N + own_n if columns else column_N)
        ctx.settings = offset, chunk, columns
        ctx.mark_non_differentiable(hit_n)
        return row_n, column_N, hit_n

    @staticmethod
    def backward(ctx: Any, row_n: Tensor, column_N: Tensor, _: Tensor) -> Any:
        query_nD, key_ND, scale, row_total_n, column_total_N = ctx.saved_tensors
        offset, chunk, columns = ctx.settings
        if torch.is_grad_enabled():
            return *_twice(query_nD, key_ND, scale, (row_n, column_N), offset, columns), None, None, None
        query_grad, key_grad = torch.empty_like(query_nD), torch.zeros_like(key_ND)
        for rows, label_C, score_CN in _chunks(query_nD, key_ND, scale, offset, chunk):
            paid_C = row_n[rows]
            if columns:
                column_CN = (score_CN - column_total_N).exp_().mul_(column_N)
                paid_C = paid_C + column_N[rows]
                score_CN.sub_(row_total_n[rows, None]).exp_().mul_(row_n[rows, None]).add_(column_CN)
            else:
                score_CN.sub_(row_total_n[rows, None]).exp_().mul_(row_n[rows, None])
            score_CN[torch.arange(len(label_C), device=label_C.device), label_C] -= paid_C
            torch.mm(score_CN, key_ND, out=query_grad[rows])
            key_grad.addmm_(score_CN.T, query_nD[rows])
        scale_grad = (query_grad * query_nD).sum().to(scale.dtype)
        return query_grad.mul_(scale), key_grad.mul_(scale), scale_grad, None, None, None


def _chunks(query_nD: Tensor, key_ND: Tensor, scale: Tensor, offset: int, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk its rows, the columns of their partners, and a fresh `[C, N]` of scores."""
    for start in range(0, len(query_nD), chunk):
        rows = slice(start, min(start + chunk, len(query_nD)))
        label_C = torch.arange(rows.start, rows.stop, device=query_nD.device) + offset
        yield rows, label_C, (query_nD[rows] * scale) @ key_ND.T


def _twice(
    query_nD: Tensor, key_ND: Tensor, scale: Tensor, paid: tuple[Tensor, Tensor], offset: int, columns: bool
) -> tuple[Tensor | None, ...]:
    """The gradient with a graph of its own, by plain operations."""
    score_nN = scale * query_nD @ key_ND.T
    own_n = score_nN.diagonal(offset)
    outputs, gradients = [score_nN.logsumexp(dim=1) - own_n], [paid[0]]
    if columns:
        outputs.append(score_nN.logsumexp(dim=0) - own_n)
        gradients.append(paid[1])
    inputs = [tensor for tensor in (query_nD, key_ND, scale) if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in (query_nD, key_ND, scale))
