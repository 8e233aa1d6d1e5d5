"""AdamP and SGDP: momentum without the part of the step that only makes a scale-invariant weight longer.

Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha, "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights"
(ICLR 2021), algorithms 1 and 2. If f(c w) = f(w), the gradient is orthogonal to w and every step lengthens w, so the effective
step shrinks; momentum makes it worse. Where gradient and weight are found to be orthogonal, the radial part of the step is removed.

Symbols: p weight, g gradient, u update direction, m and v first and second moment.
Shape legend: R rows (output channels) of a weight seen as a matrix.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Curvature
from diptych.optimizers.adamw import Beta
from diptych.optimizers.checks import dense_gradient, refuse_hyperparameters
from diptych.optimizers.projection import View, Workspace, inspect, matrix, radial


@dataclass
class _Slot:
    """A parameter with a gradient, as a step sees it. `weight` is the parameter itself, or a contiguous copy to be written back."""

    parameter: Tensor
    weight: Tensor
    grad: Tensor
    state: dict[str, Any]
    view: View = View.NONE
    norm: Tensor | None = None

    def advance(self, move: Tensor, factor: float, decay: float, radial_R1: Tensor | None) -> None:
        """p <- (1 - decay) p + factor (move - radial p), in at most two passes."""
        if radial_R1 is not None:
            matrix(self.weight).mul_((1 - decay) - factor * radial_R1)
        elif decay:
            self.weight.mul_(1 - decay)
        self.weight.add_(move, alpha=factor)

    def radial(self, update: Tensor, eps: float, workspace: Workspace) -> Tensor | None:
        """The factor of p to take out of an update; None if the slot is not projected."""
        return None if self.norm is None else radial(self.weight, update, self.norm, self.view, eps=eps, workspace=workspace)


class _Projecting(Optimizer):
    """What AdamP and SGDP share: who is projected. Subclasses make the step.

    Attributes:
        views: what the latest step decided for each parameter that had a gradient.
    """

    views: dict[Tensor, View]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        refuse_hyperparameters(self, defaults)
        super().__init__(params, defaults)
        self.views = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.views = {}
        for saved in self.state.values():  # other implementations keep the layout of the weight
            saved.update({key: value.contiguous() for key, value in saved.items() if isinstance(value, Tensor)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gives the closure's loss, if there is one.

        Raises:
            ConfigError: a gradient is sparse or not real floating; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [self._slot(p) for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        workspace = Workspace()
        self.views = {}
        for group, slots in groups:
            inspected = inspect([slot.weight for slot in slots], [slot.grad for slot in slots], group["delta"], group["eps"], workspace)
            for slot, (view, norm) in zip(slots, inspected, strict=True):
                slot.view, slot.norm = view, norm
                self.views[slot.parameter] = view
            self._update(group, slots, workspace)
            for slot in slots:
                if slot.weight is not slot.parameter:
                    slot.parameter.copy_(slot.weight)
        return loss

    def _slot(self, parameter: Tensor) -> _Slot:
        # Kernels below walk weight, gradient and moments in one order, which only contiguous tensors share for certain.
        return _Slot(parameter, parameter.contiguous(), dense_gradient(parameter, self), self.state[parameter])

    @abstractmethod
    def _update(self, group: dict[str, Any], slots: list[_Slot], workspace: Workspace) -> None:
        """Steps all slots of a group: moments and weights, in place."""


class AdamP(_Projecting):
    """AdamW whose step has no radial part on scale-invariant weights (algorithm 2); defaults of the paper.

    What is not projected takes torch's fused AdamW kernel, so a model without scale-invariant weights costs a fused AdamW and the
    test. Scalars and vectors are never projected. Complex and sparse gradients are refused. Memory: two moments a parameter; during
    a step, one buffer (two under nesterov) of the size of the largest projected weight. One host sync a group and dtype; under
    nesterov one more a weight, to read its count of steps.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size, >= 0.
        betas: decay of the moments, each in [0, 1).
        eps: >= 0; added to the root of the bias-corrected second moment, to norms, and the least norm in cosines.
        weight_decay: decoupled, per unit of lr, >= 0.
        delta: threshold of the cosine test times the root of the row width, >= 0.
        wd_ratio: factor on the weight decay (never on lr) of projected weights, in [0, 1].
        nesterov: look one gradient ahead.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, {**hyper, "nesterov": nesterov})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter, saved in self.state.items():  # the step of other implementations is an int; the fused kernel needs a tensor
            if "step" in saved:
                saved["step"] = torch.as_tensor(float(saved["step"]), dtype=torch.float32, device=parameter.device)

    def _slot(self, parameter: Tensor) -> _Slot:
        slot = super()._slot(parameter)
        if not slot.state:
            slot.state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            slot.state["exp_avg"] = torch.zeros_like(slot.weight, memory_format=torch.contiguous_format)
            slot.state["exp_avg_sq"] = torch.zeros_like(slot.weight, memory_format=torch.contiguous_format)
        return slot

    def _update(self, group: dict[str, Any], slots: list[_Slot], workspace: Workspace) -> None:
        move_of = _nesterov_move if group["nesterov"] else _adam_move
        direct = [slot for slot in slots if slot.norm is None and not group["nesterov"]]
        _fused_adamw(group, direct, [slot.weight for slot in direct], group["weight_decay"])
        for slot in slots:
            if slot.norm is not None or group["nesterov"]:
                move = move_of(group, slot, workspace)
                decay = group["lr"] * group["weight_decay"] * (1.0 if slot.norm is None else group["wd_ratio"])
                slot.advance(move, 1.0, decay, slot.radial(move, group["eps"], workspace))


def _fused_adamw(group: dict[str, Any], slots: list[_Slot], weights: list[Tensor], weight_decay: float) -> None:
    """Updates the slots' moments and steps `weights` with torch's kernel."""
    adamw(
        weights,
        [slot.grad for slot in slots],
        [slot.state["exp_avg"] for slot in slots],
        [slot.state["exp_avg_sq"] for slot in slots],
        [],
        [slot.state["step"] for slot in slots],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def _adam_move(group: dict[str, Any], slot: _Slot, workspace: Workspace) -> Tensor:
    """-lr / (1 - beta1^t) u before projection: where Adam takes a weight that is zero."""
    origin = workspace.take("move", slot.weight.shape, slot.weight).zero_()
    _fused_adamw(group, [slot], [origin], weight_decay=0.0)
    return origin


def _nesterov_move(group: dict[str, Any], slot: _Slot, workspace: Workspace) -> Tensor:
    """The same with the gradient looked ahead, for which torch has no kernel."""
    (beta1, beta2), m, v, grad = group["betas"], slot.state["exp_avg"], slot.state["exp_avg_sq"], slot.grad
    t = slot.state["step"].add_(1).item()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = torch.sqrt(v, out=workspace.take("denominator", v.shape, v)).mul_(1 / math.sqrt(1 - beta2**t)).add_(group["eps"])
    ahead = torch.lerp(m, grad, 1 - beta1, out=workspace.take("move", m.shape, m))
    return ahead.div_(denominator).mul_(-group["lr"] / (1 - beta1**t))


class SGDP(_Projecting):
    """SGD with momentum whose step has no radial part on scale-invariant weights (algorithm 1).

    The buffer starts at zero, so the first step carries `1 - dampening` too; decay is divided by `1 - momentum`.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size, >= 0.
        momentum: in [0, 1).
        dampening: in [0, 1].
        weight_decay: decoupled, per unit of lr / (1 - momentum), >= 0.
        nesterov: look one gradient ahead.
        eps: >= 0; added to norms, and the least norm in cosines.
        delta, wd_ratio: as for `AdamP`.
        alias_buffer: without `nesterov` the official step is the momentum buffer itself, so projecting the step projects the
            momentum as well. True does the same; False keeps the momentum whole, as algorithm 1 is written. Under `nesterov` the two agree.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        alias_buffer: bool = True,
    ) -> None:
        hyper = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**hyper, "eps": eps, "delta": delta, "wd_ratio": wd_ratio, "alias_buffer": alias_buffer})

    def _slot(self, parameter: Tensor) -> _Slot:
        slot = super()._slot(parameter)
        if not slot.state:
            slot.state["momentum"] = torch.zeros_like(slot.weight, memory_format=torch.contiguous_format)
        return slot

    def _update(self, group: dict[str, Any], slots: list[_Slot], workspace: Workspace) -> None:
        for slot in slots:
            momentum: Tensor = slot.state["momentum"]
            damped = slot.grad if group["dampening"] == 0 else slot.grad * (1 - group["dampening"])
            update = torch.add(damped, momentum, alpha=group["momentum"], out=momentum)
            if group["nesterov"]:
                update = torch.add(slot.grad, momentum, alpha=group["momentum"], out=workspace.take("move", momentum.shape, momentum))
            radial = slot.radial(update, group["eps"], workspace)
            decay = group["lr"] * group["weight_decay"] / (1 - group["momentum"]) * (1.0 if radial is None else group["wd_ratio"])
            if radial is not None and group["alias_buffer"] and not group["nesterov"]:
                matrix(momentum).addcmul_(matrix(slot.weight), radial.to(momentum.dtype), value=-1)
                radial = None
            slot.advance(update, -group["lr"], decay, radial)


class Config(BaseConfig):
    """AdamP; the defaults are the paper's."""

    curvature: ClassVar[Curvature] = "none"

    method: Literal["adamp"] = "adamp"
    lr: float = Field(1e-3, gt=0, description="peak learning rate, per update")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay per update of the first and the second moment")
    eps: float = Field(1e-8, ge=0, description="added to the root of the second moment and to norms")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay per unit of learning rate, on parameters that decay")
    delta: float = Field(0.1, ge=0, description="a weight is scale-invariant if |cos(gradient, weight)| < delta / sqrt(width)")
    wd_ratio: float = Field(0.1, ge=0, le=1, description="factor on the weight decay of weights found scale-invariant")
    nesterov: bool = Field(False, description="look one gradient ahead")

    def build(self, groups: Iterable[dict[str, Any]]) -> AdamP:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        hyper = self.model_dump(exclude={"method"})
        return AdamP(list(groups), **hyper)
