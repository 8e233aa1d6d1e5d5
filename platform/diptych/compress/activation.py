"""How many nodes of a network are dead: the dead-node rates of AP, measured on the outputs of its activations.

Source: Liu, Ghosh, Tan, Motani, AP: Selective Activation for De-sparsifying Pruned Neural Networks (TMLR 2023), section 2.

Shape legend: N inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU)


class DeadNodes(NamedTuple):
    """Shares in [0, 1]: of (node, input) pairs whose output is 0, and of nodes whose output is 0 for every input."""

    dynamic: float
    static: float


def dead_nodes(outputs: Iterable[Tensor], least: float = 0.0) -> DeadNodes:
    """The dead-node rates of a batch.

    Args:
        outputs: what the activations gave, each `[N, …]`; every entry of an input is a node.
        least: outputs of at most this size count as 0; above 0 for activations without exact zeros, such as GELU.
    """
    dead = [(output.detach().abs() <= least).flatten(1) for output in outputs]
    nodes = sum(each.shape[1] for each in dead)
    pairs = sum(each.numel() for each in dead)
    return DeadNodes(
        sum(int(each.sum()) for each in dead) / max(1, pairs), sum(int(each.all(dim=0).sum()) for each in dead) / max(1, nodes)
    )


@torch.no_grad()
def activations(module: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """What every activation under a module gave while `run` ran, in the order of the calls; sequences of the text side too."""
    seen: list[Tensor] = []

    def look(_: nn.Module, __: Sequence[Tensor], output: Tensor) -> None:
        seen.append(output.detach())

    handles = [each.register_forward_hook(look) for each in module.modules() if is_activation(each)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation that can die; open_clip has classes of its own, by name."""
    return isinstance(module, ACTIVATIONS) or type(module).__name__ in ("QuickGELU", "ReLUSquared")
