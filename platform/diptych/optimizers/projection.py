"""The geometry of AdamP: which weights are scale-invariant, and the radial part of a step.

Heo et al., "AdamP" (ICLR 2021), section 3 and algorithm 1. If f(c p) = f(p), the gradient g is orthogonal to p; so where |cos(g, p)|
is small, the weight is taken to be invariant and the part of the step u along p, which only makes p longer, can go.

Shape legend: R rows (output channels), K columns of a weight seen as a matrix (R, everything else).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

# Elements multiplied at a time: on a CPU a megabyte of float32, which stays in the cache; elsewhere, few launches matter more.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


class View(IntEnum):
    """How a weight is seen when its step is projected. A vector or scalar never is; `NONE` is a weight that is not invariant."""

    VECTOR = -1
    NONE = 0
    CHANNEL = 1
    LAYER = 2


def choose_views(weights: Sequence[Tensor], grads: Sequence[Tensor], *, delta: float = 0.1, eps: float = 1e-8) -> list[View]:
    """The view in which each weight is scale-invariant (algorithm 1, the test before the projection).

    A view fires if in all of its rows |cos(g, p)| < delta / sqrt(row width); the channel view is tried first. Each norm in the
    cosine is at least `eps`, so a zero weight fires.

    Args:
        weights, grads: floating tensors of equal shapes, each `[...]`; values before weight decay and momentum.
        delta: > 0, without unit.
        eps: >= 0, in units of a norm.
    """
    return [view for view, _ in inspect(weights, grads, delta, eps, Workspace())]


class Workspace:
    """Memory for intermediate results, reused from weight to weight: taking it afresh costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of this shape and of `like`'s device and dtype; valid until taken again for this purpose."""
        key, count = (purpose, like.device, like.dtype), math.prod(shape)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < count:
            memory = self._memory[key] = like.new_empty(count)
        return memory[:count].view(tuple(shape))


@torch.no_grad()
def inspect(
    weights: Sequence[Tensor], grads: Sequence[Tensor], delta: float, eps: float, workspace: Workspace
) -> list[tuple[View, Tensor | None]]:
    """The view of each weight, and its norm: `[R]` in the channel view, `[1]` in the layer view, None without a view."""
    found: list[tuple[View, Tensor | None]] = [(View.VECTOR if weight.ndim < 2 else View.NONE, None) for weight in weights]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, weight in enumerate(weights):
        if weight.ndim > 1 and weight.numel():
            alike.setdefault((weight.device, weight.dtype), []).append(index)
    for members in alike.values():
        pairs = [(matrix(weights[index]), matrix(grads[index])) for index in members]
        for index, result in zip(members, _inspect_matrices(pairs, delta, eps, workspace), strict=True):
            found[index] = result
    return found


def _inspect_matrices(
    pairs: list[tuple[Tensor, Tensor]], delta: float, eps: float, workspace: Workspace
) -> list[tuple[View, Tensor | None]]:
    """`inspect` for matrices of one device and dtype: all their rows side by side, decided in a few operations and one host sync."""
    rows = [len(weight) for weight, _ in pairs]
    like = pairs[0][0]
    measured = like.new_empty((3, sum(rows)), dtype=torch.promote_types(like.dtype, torch.float32))
    for (weight, grad), part in zip(pairs, torch.split(measured, rows, dim=1), strict=True):
        row_dots(weight, grad, part[0], workspace)
        torch.linalg.vector_norm(grad, dim=1, dtype=part.dtype, out=part[1])
        torch.linalg.vector_norm(weight, dim=1, dtype=part.dtype, out=part[2])

    counts = torch.tensor([(len(weight), weight.shape[1]) for weight, _ in pairs]).to(like.device)
    owner = torch.repeat_interleave(counts[:, 0], output_size=sum(rows))
    dot, grad_norm, weight_norm = measured
    bound = (delta / counts[:, 1].double().sqrt()).to(dot.dtype)[owner] * grad_norm.clamp(min=eps) * weight_norm.clamp(min=eps)
    # Counting rows that do not pass, rather than taking a maximum, keeps a NaN from passing.
    radial_rows = torch.zeros_like(counts[:, 0]).index_add_(0, owner, (~(dot.abs() < bound)).long())

    sums = torch.zeros((3, len(pairs)), dtype=torch.float64, device=like.device)
    sums.index_add_(1, owner, torch.stack([dot, grad_norm.square(), weight_norm.square()]).double())
    layer_norms = sums[1:].sqrt()
    layer_bound = delta / counts.prod(dim=1).double().sqrt() * layer_norms.clamp(min=eps).prod(dim=0)
    views = torch.where(radial_rows == 0, View.CHANNEL, torch.where(sums[0].abs() < layer_bound, View.LAYER, View.NONE)).tolist()

    norms = {View.CHANNEL: torch.split(weight_norm, rows), View.LAYER: torch.split(layer_norms[1].to(dot.dtype), 1)}
    return [(View(view), norms[View(view)][index] if view else None) for index, view in enumerate(views)]


def matrix(tensor: Tensor) -> Tensor:
    """`[R, K]`: a view of a contiguous tensor, else a copy."""
    return tensor.reshape(len(tensor), -1)


def row_dots(left_RK: Tensor, right_RK: Tensor, out: Tensor, workspace: Workspace) -> Tensor:
    """Row-wise dot products `[R]` into `out`, in `out`'s precision, a bounded number of rows at a time."""
    (height, width), elements = left_RK.shape, CHUNK_ELEMENTS.get(out.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    step = min(height, max(1, elements // width))
    products = workspace.take("products", (step, width), out)
    for start in range(0, height, step):
        left, right = left_RK[start : start + step], right_RK[start : start + step]
        if left.dtype != out.dtype:  # products of half-precision numbers need more digits than they have
            left, right = left.to(out.dtype), right.to(out.dtype)
        torch.sum(torch.mul(left, right, out=products[: len(left)]), dim=1, out=out[start : start + step])
    return out


def radial(weight: Tensor, update: Tensor, norm: Tensor, view: View, *, eps: float, workspace: Workspace) -> Tensor:
    """The factor c, `[R, 1]` or `[1, 1]`, that makes u - c p orthogonal to p in a view: c = p.u / (|p| + eps)^2.

    Args:
        weight, update: p and u, contiguous, `[...]` alike.
        norm: of p in this view, as `inspect` gives it.
        view: channel or layer.
        eps: >= 0, in units of a norm.
        workspace: reused memory.
    """
    dot = row_dots(matrix(weight), matrix(update), norm.new_empty(len(weight)), workspace)
    if view is View.LAYER:
        dot = dot.sum(dim=0, keepdim=True, dtype=torch.float64).to(dot.dtype)
    return (dot / (norm + eps) ** 2).unsqueeze(1)
