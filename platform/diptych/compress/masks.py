"""Which weights stay, given a score for each: the rules that pruning methods share, and how a mask is put on a model.

All masks are bool, True stays. Scores are >= 0 and of the shape of the weights, out x in; the larger, the more a weight is needed.
Sources: Wanda (Sun et al., ICLR 2024, section 3 and its code's variant); SparseGPT (Frantar and Alistarh, ICML 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.compress.blocks import Matrix
from diptych.compress.magnitude import PATTERN, largest, n_of_m
from diptych.models.store import MASK


def in_rows(score: Tensor, sparsity: float) -> Tensor:
    """In every row all but the `int(inputs * sparsity)` smallest; of equal ones the earlier go first."""
    mask = torch.ones_like(score, dtype=torch.bool)
    goes = score.argsort(dim=1, stable=True)[:, : int(score.shape[1] * sparsity)]
    return mask.scatter_(1, goes, value=False)


def above_threshold(score: Tensor, sparsity: float) -> Tensor:
    """All that exceed the entry at place `int(n * sparsity)` of the sorted scores: one more goes than asked, and all ties with it.

    The rule of the published code of SparseGPT, PERP and the magnitude baselines. `magnitude.largest` keeps the count exactly.
    """
    place = int(score.numel() * sparsity)
    return score > score.flatten().sort().values[place]


def n_of_m_by_topk(score: Tensor, n: int, m: int) -> Tensor:
    """`magnitude.n_of_m` with ties as `torch.topk` happens to break them, as in the published codes; rows divide into groups of m."""
    groups = score.view(score.shape[0], -1, m)
    goes = groups.topk(m - n, dim=-1, largest=False).indices
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, goes, value=False).view_as(score)


def by_share_of_sum(score: Tensor, sparsity: float) -> Tensor:
    """Wanda's variant: rows lose the small scores that make up one share of the row's sum, the same for all rows; found by bisection.

    The bracket of the share is [0, 0.8]; it stops within 0.001 of the sparsity, or of the bracket's width. At least one weight a row goes.
    """
    ordered = score.sort(dim=1, stable=True).values
    reached, total = ordered.cumsum(dim=1), score.sum(dim=1, keepdim=True)

    def kept(share: float) -> Tensor:
        count = (reached <= total * share).sum(dim=1, keepdim=True)
        return score > ordered.gather(1, (count - 1).clamp(min=0))

    low, high, share = 0.0, 0.8, 0.4
    mask = kept(share)
    while abs(found := float((~mask).float().mean()) - sparsity) > 0.001 and high - low >= 0.001:
        low, high = (low, share) if found > 0 else (share, high)
        share = (low + high) / 2
        mask = kept(share)
    return mask


def by_pattern(score: Tensor, sparsity: float, pattern: str, rows: bool = True, name: str = "weight") -> Tensor:
    """The mask for `unstructured` (within rows, or within the matrix) or for n:m. Raises ConfigError where rows do not divide into groups."""
    if found := PATTERN.match(pattern):
        return n_of_m(score, int(found[1]), int(found[2]), name)
    return in_rows(score, sparsity) if rows else largest(score, sparsity)


@torch.no_grad()
def put(matrix: Matrix, mask: Tensor) -> None:
    """Zeroes what a mask says and keeps the mask with the model, joined with one that is there already."""
    put_on(matrix.owner, matrix.leaf, mask)


@torch.no_grad()
def put_on(owner: nn.Module, leaf: str, mask: Tensor) -> None:
    """`put` for any parameter `leaf` of a module, biases included."""
    earlier = getattr(owner, leaf + MASK, None)
    parameter: Tensor = getattr(owner, leaf)
    mask = mask.to(parameter.device)
    joined = mask if earlier is None else mask & earlier
    parameter.mul_(joined)
    owner.register_buffer(leaf + MASK, joined)
