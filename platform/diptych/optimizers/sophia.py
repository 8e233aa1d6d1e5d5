"""Sophia: momentum over a rarely estimated diagonal of the Hessian, clipped coordinate by coordinate.

Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training" (ICLR 2024; arXiv
2305.14342), algorithm 3, in its parametrisation: p <- p - lr clip(m / (rho h), 1). SophiaG estimates h from labels sampled from the
model, SophiaH from the Hessian's product with a Gaussian probe. Where h is zero or negative, a step is lr sign(m).

The authors' code keeps the factor B (softmaxes a batch) out of h and multiplies it back in the step; here it is in h, as in the
paper, so that a batch may change its size. It also clips the norm of the sampled gradient before squaring it, which shrinks h
wherever the clip bites; here the estimate is left alone. Neither moment is corrected for its bias: warm the learning rate up.

Tune `rho` until `win_rate`, the share of coordinates that are not clipped, lies between 0.1 and 0.5; near 0 this is sign momentum.

Symbols: p weight, g gradient, m momentum, h diagonal of the Hessian.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Curvature
from diptych.optimizers.adamw import Beta
from diptych.optimizers.elementwise import Curved, lots


class _Sophia(Curved):
    """What both share: all but the estimator and the guard of the denominator. State: two tensors a parameter, as AdamW.

    No step looks at a count, so CUDA graphs may hold it.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: largest change of a coordinate by its gradient, >= 0.
        betas: decay of the momentum, a step; of h, an estimate; each in [0, 1).
        rho: factor of h in the denominator (gamma in the paper), >= 0.
        eps: guards the denominator, > 0.
        weight_decay: decoupled, per unit of lr, before the step and never clipped, >= 0.
        every: steps from one estimate of h to the next, >= 1.
        delay: steps before the first estimate, >= 0; until then a step is lr sign(m). 0 in the paper, `every` in the authors' code.
        maximize: ascend; Hutchinson's estimate then counts with the other sign, as the Hessian of what is descended has it.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "hessian")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float],
        rho: float,
        eps: float,
        weight_decay: float,
        every: int = 10,
        delay: int = 0,
        maximize: bool = False,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**hyper, "every": every, "delay": delay, "maximize": maximize})

    def figures(self) -> dict[str, float]:
        """`win_rate`: the share of coordinates that the next step would not clip, by the momentum as it stands."""
        return {"win_rate": self.win_rate()}

    @torch.no_grad()
    def win_rate(self) -> float:
        """The share of coordinates with |m| < rho h, in [0, 1]; 0 before the first step.

        Coordinates that no gradient and no estimate ever reached, such as the words that do not occur, are not counted.
        """
        wins, reached = [], []
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if p in self.state]
            bounds = torch._foreach_mul([state["hessian"] for state in states], group["rho"]) if states else ()
            for state, bound in zip(states, bounds, strict=True):
                wins.append((state["exp_avg"].abs() < bound).sum())
                reached.append(((state["exp_avg"] != 0) | (state["hessian"] != 0)).sum())
        total = int(torch.stack(reached).sum()) if reached else 0
        return int(torch.stack(wins).sum()) / total if total else 0.0

    def _take_in(self, group: dict[str, Any], params: list[Tensor], estimates: list[Tensor]) -> None:
        hessians = [self._state(p, group)["hessian"] for p in params]
        if group["maximize"] and self.curvature == "hutchinson" and estimates:
            estimates = torch._foreach_neg(estimates)  # type: ignore[assignment]
        for h, estimate in lots([hessians, estimates]):
            torch._foreach_lerp_(h, estimate, 1 - group["betas"][1])

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: Any) -> None:
        m, h = columns
        grads = torch._foreach_neg(grads) if group["maximize"] else grads  # type: ignore[assignment]
        torch._foreach_lerp_(m, grads, 1 - group["betas"][0])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        denominator = torch._foreach_mul(h, group["rho"])
        self._guard(denominator, group["eps"])
        ratio = torch._foreach_div(m, denominator)
        torch._foreach_clamp_min_(ratio, -1.0)
        torch._foreach_clamp_max_(ratio, 1.0)
        torch._foreach_add_(params, ratio, alpha=-group["lr"])

    @staticmethod
    def _guard(denominator: tuple[Tensor, ...], eps: float) -> None:
        """Makes a denominator positive, in place."""
        torch._foreach_clamp_min_(denominator, eps)


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimate, which is never negative. Defaults and eps (added to rho h) are the authors'."""

    curvature: ClassVar[Curvature] = "gauss-newton-bartlett"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-15,
        weight_decay: float = 0.1,
        **more: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, rho=rho, eps=eps, weight_decay=weight_decay, **more)

    @staticmethod
    def _guard(denominator: tuple[Tensor, ...], eps: float) -> None:
        torch._foreach_add_(denominator, eps)


class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimate, u * (H u) with u Gaussian. Defaults and eps (the least rho h) are the paper's."""

    curvature: ClassVar[Curvature] = "hutchinson"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.96, 0.99),
        rho: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        **more: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, rho=rho, eps=eps, weight_decay=weight_decay, **more)


class _Config(BaseConfig):
    lr: float = Field(1e-4, gt=0, description="peak learning rate: the largest change of a coordinate in an update, decay aside")
    every: int = Field(10, ge=1, description="updates from one estimate of the curvature to the next")
    delay: int = Field(0, ge=0, description="updates before the first estimate, made by the momentum's sign; the authors' code: `every`")


class SophiaGConfig(_Config):
    """SophiaG; the defaults are the authors'."""

    curvature: ClassVar[Curvature] = "gauss-newton-bartlett"

    method: Literal["sophiag"] = "sophiag"
    betas: tuple[Beta, Beta] = Field((0.965, 0.99), description="decay of the momentum per update, and of the curvature per estimate")
    rho: float = Field(0.04, gt=0, description="factor of the curvature; tune it for a win rate of 0.1 to 0.5")
    eps: float = Field(1e-15, gt=0, description="added to the denominator, in units of the gradient")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay per unit of learning rate, on parameters that decay")

    def build(self, groups: Iterable[dict[str, Any]]) -> SophiaG:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        return SophiaG(list(groups), **self.model_dump(exclude={"method"}))


class SophiaHConfig(_Config):
    """SophiaH; the defaults are the paper's."""

    curvature: ClassVar[Curvature] = "hutchinson"

    method: Literal["sophiah"] = "sophiah"
    betas: tuple[Beta, Beta] = Field((0.96, 0.99), description="decay of the momentum per update, and of the curvature per estimate")
    rho: float = Field(0.01, gt=0, description="factor of the curvature; tune it for a win rate of 0.1 to 0.5")
    eps: float = Field(1e-12, gt=0, description="least denominator, in units of the gradient")
    weight_decay: float = Field(0.2, ge=0, description="decoupled decay per unit of learning rate, on parameters that decay")

    def build(self, groups: Iterable[dict[str, Any]]) -> SophiaH:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        return SophiaH(list(groups), **self.model_dump(exclude={"method"}))
