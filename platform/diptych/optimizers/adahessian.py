"""AdaHessian: Adam with the squared gradient replaced by the squared diagonal of the Hessian, averaged over neighbours.

Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning" (AAAI 2021;
arXiv 2006.00719). The diagonal is Hutchinson's estimate z * (H z) with z of independent signs, of which the absolute value is
averaged over neighbouring coordinates (the paper averages signed values; the three official programs, and this one, do not).

The official programs differ in what a neighbourhood is; `block_sizes` says all three. They also have faults that are not repeated
here: tensors of three axes took over the estimate of the tensor before them, a second parameter group got the first one's gradients,
and what the ranks had averaged was thrown away.

Symbols: p weight, g gradient, m first moment, d estimate of the diagonal, D moment of its square.
Shape legend: of parameters, O rows or output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Curvature
from diptych.optimizers.adamw import Beta
from diptych.optimizers.elementwise import Curved, advance, lots

Blocks = tuple[int, int, int, int]

IMAGE: Blocks = (1, 1, -1, -1)
"""The official image program: kernels are averaged, nothing else."""
INSTRUCTION: Blocks = (-1, -1, -1, -1)
"""The official instruction program: rows of matrices and kernels are averaged."""
TRANSFORMER: Blocks = (1, 32, -1, -1)
"""The official translation program: matrices in runs of 32."""


class AdaHessian(Curved):
    """Adam on curvature. State: two tensors a parameter, as AdamW.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size, >= 0; near SGD's rather than Adam's.
        betas: decay of m, a step; of D, an estimate; each in [0, 1).
        eps: > 0; added to the root of D. Large on purpose: where the curvature vanishes, a step is m / eps.
        weight_decay: decoupled, per unit of lr, >= 0.
        hessian_power: k in (0, 1]: the denominator is the root of D to the power k.
        block_sizes: for parameters of 1, 2, 3, and 4 or more axes: how many consecutive coordinates, in row-major order, share the mean
            of |d|. 1: none do. -1: what belongs together by shape: rows of matrices, the last axis of three, the kernel of (O, I, …).
        every: steps from one estimate to the next; D and its bias correction count estimates. 1 in the official programs.
        capturable: counts steps on the device, for CUDA graphs.

    Raises:
        ConfigError: a parameter's size is not a multiple of its block, or a step is asked for before curvature was supplied.
    """

    curvature: ClassVar[Curvature] = "hutchinson"
    probe = "rademacher"
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "hessian_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        block_sizes: Blocks = IMAGE,
        every: int = 1,
        capturable: bool = False,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "hessian_power": hessian_power}
        super().__init__(params, {**hyper, "block_sizes": tuple(block_sizes), "every": every, "capturable": capturable})
        for group in self.param_groups:
            for p in group["params"]:
                _check_block(p, _block(p, group["block_sizes"]))

    def _check(self, parameters: Sequence[Tensor]) -> None:
        super()._check(parameters)
        if any("estimates" not in self.state.get(p, ()) for p in parameters):
            fix = "call update_curvature before step; with every > 1, all parameters that train must have a gradient at each estimate"
            raise ConfigError.at("AdaHessian has gradients without curvature", "update_curvature", "no estimate yet", "an estimate", fix)

    def _take_in(self, group: dict[str, Any], params: list[Tensor], estimates: list[Tensor]) -> None:
        """D <- b2 D + (1 - b2) d d, kept divided by 1 - b2^n, so that a step need not correct it."""
        beta2 = group["betas"][1]
        states = [self._state(p, group) for p in params]
        counts = [state.get("estimates", 0) + 1 for state in states]
        for state, count in zip(states, counts, strict=True):
            state["estimates"] = count
        gains = [(1 - beta2) / (1 - beta2**n) for n in counts]
        keeps = [1 - gain for gain in gains]
        squares = [averaged(d, _block(d, group["block_sizes"])) for d in estimates]
        for D, d, keep, gain in lots([[state["hessian_sq"] for state in states], squares, keeps, gains]):
            torch._foreach_mul_(D, keep)
            torch._foreach_addcmul_(D, d, d, gain)

    def _scalars(self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> Sequence[Sequence[Any]]:
        return ([group["lr"] / (1 - group["betas"][0] ** t) for t in advance(states)],)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: Any) -> None:
        m, D, sizes = columns
        torch._foreach_lerp_(m, grads, 1 - group["betas"][0])
        power = group["hessian_power"]
        denominator = torch._foreach_sqrt(D) if power == 1 else torch._foreach_pow(D, power / 2)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_div_(denominator, sizes)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(params, m, denominator, -1.0)


def averaged(estimate: Tensor, block: int) -> Tensor:
    """The mean of |d| over neighbours: of the estimate's shape, or with axes of size 1 where all of an axis is one.

    Args:
        estimate: d, `[...]`.
        block: consecutive coordinates in row-major order; 1: none, the estimate comes back as it is; -1: by shape (`AdaHessian`).
    """
    if block == 1 or estimate.ndim == 0 or (block == -1 and estimate.ndim == 1):
        return estimate
    if block > 1:
        return estimate.abs().reshape(-1, block).mean(dim=1).repeat_interleave(block).view(estimate.shape)
    return estimate.abs().mean(dim=tuple(range(min(2, estimate.ndim - 1), estimate.ndim)), keepdim=True)


def _block(tensor: Tensor, blocks: Sequence[int]) -> int:
    return blocks[min(tensor.ndim, 4) - 1] if tensor.ndim else 1


def _check_block(parameter: Tensor, block: int) -> None:
    if block > 1 and parameter.numel() % block:
        got = f"{block} for a parameter of shape {tuple(parameter.shape)}"
        raise ConfigError.at("AdaHessian's blocks do not divide a parameter", "block_sizes", got, "a divisor of its size, 1 or -1")


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("a block has at least one coordinate, or -1: by shape")
    return value


Block = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]


class Config(BaseConfig):
    """AdaHessian; the defaults are those of the authors' image program."""

    curvature: ClassVar[Curvature] = "hutchinson"

    method: Literal["adahessian"] = "adahessian"
    lr: float = Field(0.15, gt=0, description="peak learning rate, per update; near SGD's")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the first moment per update, and of the curvature's per estimate")
    eps: float = Field(1e-4, gt=0, description="added to the root of the curvature's moment, in units of the Hessian; large on purpose")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay per unit of learning rate, on parameters that decay")
    hessian_power: float = Field(1.0, gt=0, le=1, description="power of the curvature in the denominator")
    block_sizes: tuple[Block, Block, Block, Block] = Field(
        IMAGE, description="coordinates that share a mean of the curvature, by number of axes; 1: none do; -1: rows, or kernels"
    )
    every: int = Field(1, ge=1, description="updates from one estimate of the curvature to the next")

    def build(self, groups: Iterable[dict[str, Any]]) -> AdaHessian:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        return AdaHessian(list(groups), **self.model_dump(exclude={"method"}))
