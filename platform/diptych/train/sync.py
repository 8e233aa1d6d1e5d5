"""What ranks tell each other during training: gradients, decisions, and the weights they start from.

Gradients are averaged here and not by DistributedDataParallel: the loss gathers features, objectives own parameters, and
with micro-batches a weight gets its gradient in several passes. One average after the backward is right for all of these;
it gives up the overlap of communication with the backward. Sums go through fixed buckets, so they are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.train.sharding import is_sharded

BUCKET_BYTES = 1 << 25


def average_gradients(parameters: Iterable[Tensor], world: int) -> None:
    """Replaces the gradients by their mean over the ranks. Parameters without a gradient must be the same ones on every rank.

    Those of weights that are shared out (`sharding.py`) come averaged and are left alone.
    """
    average([parameter.grad for parameter in parameters if parameter.grad is not None and not is_sharded(parameter)], world)


def average(tensors: Iterable[Tensor], world: int) -> None:
    """Replaces each tensor by its mean over the ranks."""
    if world == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        flat /= world
        for tensor, averaged in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(averaged.view_as(tensor))


def broadcast(tensors: Iterable[Tensor], world: int) -> None:
    """Gives every rank the tensors of rank 0."""
    if world > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def gathered(rows_ND: Tensor, world: int) -> Tensor:
    """The rows of all ranks in rank order, without gradient; as many on every rank."""
    if world == 1:
        return rows_ND
    every = rows_ND.new_empty((world * len(rows_ND), *rows_ND.shape[1:]))
    dist.all_gather_into_tensor(every, rows_ND.contiguous())
    return every


def agree(flags: Sequence[bool], world: int, device: torch.device | str) -> list[bool]:
    """Each flag is true everywhere if it is true on any rank. One small message, so that no rank leaves the others waiting."""
    if world == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def mean(values: Sequence[float], world: int, device: torch.device | str) -> list[float]:
    """The mean of each value over the ranks."""
    if world == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    averaged: list[float] = (total / world).tolist()
    return averaged


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, at most `BUCKET_BYTES` each unless one alone is larger."""
    bucket: list[Tensor] = []
    size_bytes = 0
    for tensor in tensors:
        if bucket and (size_bytes + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(tensor)
        size_bytes += tensor.nbytes
    if bucket:
        yield bucket
