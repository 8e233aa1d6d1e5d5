"""diffGrad: Adam whose step shrinks, coordinate by coordinate, where the gradient has stopped changing.

Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri, "diffGrad: An Optimization Method for Convolutional Neural Networks" (IEEE
TNNLS 31(11), 2020; arXiv 1909.11015). The friction is sigmoid(|change of the gradient|), between 1/2 and 1.

The first official implementation kept a reference to the gradient where a copy was meant; with gradients zeroed in place the change
is then always 0 and the method is Adam at half its rate. Here the gradient is copied, as in the official second version, and the
caller's gradient is left alone, to which that version adds the decay. Gradients of a mean loss change by much less than 1 from
step to step, so that even the right method is close to Adam at half its rate: compare it with that.

Symbols: p weight, g gradient, m and v first and second moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Curvature
from diptych.optimizers.adamw import Beta
from diptych.optimizers.elementwise import Elementwise, advance


class DiffGrad(Elementwise):
    """Adam with friction. State: three tensors a parameter, one and a half times AdamW's.

    The friction depends on the scale of the loss: undo loss scaling before the step, and average, not add, accumulated gradients.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size, >= 0.
        betas: decay of the moments, each in [0, 1).
        eps: >= 0; added to the root of the second moment.
        weight_decay: coupled: that much of the weight is added to the gradient, before anything looks at it; >= 0.
        corrected_eps: adds eps to the root of the bias-corrected second moment, as AdamW does and as the authors' one-dimensional
            examples do; their optimizer adds it before the correction, which makes it larger in the first steps.
        capturable: counts steps on the device, for CUDA graphs.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "previous_grad")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        corrected_eps: bool = False,
        capturable: bool = False,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**hyper, "corrected_eps": corrected_eps, "capturable": capturable})

    def _scalars(self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> Sequence[Sequence[Any]]:
        """Step sizes with the bias corrections; with `corrected_eps`, the eps that goes with each."""
        beta1, beta2 = group["betas"]
        steps = advance(states)
        roots = [(1 - beta2**t) ** 0.5 for t in steps]
        sizes = [group["lr"] * root / (1 - beta1**t) for t, root in zip(steps, roots, strict=True)]
        return (sizes, [group["eps"] * root for root in roots]) if group["corrected_eps"] else (sizes,)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: Any) -> None:
        m, v, previous, sizes, *eps = columns
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])  # type: ignore[assignment]
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        move = previous  # its memory; the gradient takes its place at the end
        torch._foreach_sub_(move, grads)
        torch._foreach_abs_(move)
        _sigmoid_(move)
        torch._foreach_mul_(move, m)
        torch._foreach_mul_(move, sizes)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, eps[0] if eps else group["eps"])
        torch._foreach_addcdiv_(params, move, denominator, -1.0)
        torch._foreach_copy_(previous, grads)


def _sigmoid_(tensors: list[Tensor]) -> None:
    """The logistic function of each tensor, in place; compilers, which know no foreach version, get one call a tensor to fuse."""
    if torch.compiler.is_compiling():
        for tensor in tensors:
            tensor.sigmoid_()
    else:
        torch._foreach_sigmoid_(tensors)


class Config(BaseConfig):
    """diffGrad; the defaults are the authors'."""

    curvature: ClassVar[Curvature] = "none"

    method: Literal["diffgrad"] = "diffgrad"
    lr: float = Field(1e-3, gt=0, description="peak learning rate, per update; acts like half of it in Adam where gradients are small")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay per update of the first and the second moment")
    eps: float = Field(1e-8, ge=0, description="added to the root of the second moment, in units of the gradient")
    weight_decay: float = Field(0.0, ge=0, description="coupled decay: this much of the weight is added to its gradient")
    corrected_eps: bool = Field(False, description="add eps after the bias correction, as AdamW does; the authors add it before")

    def build(self, groups: Iterable[dict[str, Any]]) -> DiffGrad:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        return DiffGrad(list(groups), **self.model_dump(exclude={"method"}))
