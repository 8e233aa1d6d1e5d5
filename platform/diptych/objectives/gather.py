"""The one gather: every objective that compares pairs across ranks goes through here.

Shape legend: N pairs on this rank, W ranks, D feature width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.core.errors import ConfigError


def world_size() -> int:
    """Ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(features_ND: Tensor, *, with_grad: bool) -> Tensor:
    """Concatenates the features of all ranks in rank order; every rank must call it equally often.

    Args:
        features_ND: `[N, D]`, any floating dtype; N, D and dtype equal on all ranks.
        with_grad: if true the backward sums over ranks the gradients that they send to this shard, and can itself be
            differentiated; every rank must then run the backward. If false the result is a constant, own shard included.

    Returns:
        `[W * N, D]`; `features_ND` itself when W is 1.

    Raises:
        ConfigError: on every rank, when N differs between ranks. The check is one integer a rank, hence one host
            synchronisation; without it a ragged last batch would hang or mix up rows.
    """
    if world_size() == 1:
        return features_ND
    _require_equal_rows(features_ND)
    if with_grad:
        gathered: Tensor = _Gather.apply(features_ND)
        return gathered
    return _all_gather(features_ND.detach())


def put_back(all_ND: Tensor, own_ND: Tensor) -> Tensor:
    """Replaces this rank's rows of a gathered constant `[W * N, D]` by the features `[N, D]` that carry gradient."""
    if world_size() == 1:
        return own_ND
    shards = list(torch.split(all_ND, len(own_ND)))
    shards[rank()] = own_ND
    return torch.cat(shards)


def _require_equal_rows(features_ND: Tensor) -> None:
    own = torch.tensor([features_ND.shape[0]], dtype=torch.int64, device=features_ND.device)
    rows = _all_gather(own).tolist()
    if len(set(rows)) > 1:
        raise ConfigError.at(
            "The ranks hold batches of different sizes",
            "rows by rank",
            rows,
            "the same number of pairs on every rank",
            "drop or fill up the last batch, and divide the global batch evenly",
        )


def _all_gather(shard: Tensor) -> Tensor:
    gathered = shard.new_empty((world_size() * shard.shape[0], *shard.shape[1:]))
    dist.all_gather_into_tensor(gathered, shard.contiguous())
    return gathered


def _reduce_scatter(whole: Tensor) -> Tensor:
    own = whole.new_empty((whole.shape[0] // world_size(), *whole.shape[1:]))
    dist.reduce_scatter_tensor(own, whole.contiguous())
    return own


# Each is the other's backward, so that curvature estimates can differentiate twice.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        del ctx
        return _all_gather(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        del ctx
        return _ReduceScatter.apply(grad)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        del ctx
        return _reduce_scatter(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        del ctx
        return _Gather.apply(grad)
