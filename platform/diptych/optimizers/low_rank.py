"""Adam on gradients of low rank: the bases, the step, and the AdamW that low-rank projection of gradients is made of.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (ICML 2024), as Huang et al. (AAAI 2025) use it.
A gradient G is seen through the leading singular vectors of an earlier one, G = U S V^T; Adam's moments live in that small space.

Shape legend: M rows, N columns of a weight, R rank of the projection.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from diptych.core.errors import DataError
from diptych.optimizers.checks import dense_gradient, refuse_hyperparameters

Projection = Literal["std", "reverse_std", "left", "right", "full"]
State = dict[str, Any]

CORRECTED = 1e9
"""A count of steps after which bias correction has nothing left to correct."""


class Basis(NamedTuple):
    """Orthonormal vectors that a gradient is projected on: `left` `[M, R]`, `right` `[R, N]`; None: that side stays whole."""

    left: Tensor | None
    right: Tensor | None

    def down(self, grad_MN: Tensor) -> Tensor:
        """The gradient in the small space: `[R, N]`, `[M, R]` or `[R, R]`."""
        low = grad_MN if self.left is None else self.left.T @ grad_MN
        return low if self.right is None else low @ self.right.T

    def add_up_(self, weight_MN: Tensor, low: Tensor, scale: float) -> None:
        """weight += scale * (low, carried back), in place and without a copy of the weight's size."""
        left, right = self
        if left is None:
            assert right is not None
            weight_MN.addmm_(low, right, alpha=scale)
        else:
            weight_MN.addmm_(left, low if right is None else low @ right, alpha=scale)


def sides(rows: int, columns: int, projection: Projection) -> tuple[bool, bool]:
    """Whether a matrix is projected from the left and from the right: under `std` the longer side stays, under `reverse_std` the shorter."""
    match projection:
        case "std":
            return rows < columns, rows >= columns
        case "reverse_std":
            return rows >= columns, rows < columns
        case _:
            return projection in ("left", "full"), projection in ("right", "full")


def leading(grad_MN: Tensor, rank: int, projection: Projection) -> Basis:
    """The leading singular vectors of a gradient, found in float32. Sign and order among equal singular values are the library's.

    Raises DataError if the gradient is not finite.
    """
    if not bool(torch.isfinite(grad_MN).all()):
        got = f"shape {tuple(grad_MN.shape)}"
        raise DataError.at("A gradient cannot be projected", got, "<not finite>", "finite gradients", "lower the learning rate")
    U_MK, _, Vh_KN = torch.linalg.svd(grad_MN.float(), full_matrices=False)
    rows, columns = grad_MN.shape
    left, right = sides(rows, columns, projection)
    dtype = grad_MN.dtype
    return Basis(U_MK[:, :rank].to(dtype).contiguous() if left else None, Vh_KN[:rank].to(dtype).contiguous() if right else None)


def adam_(
    targets: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    group: State,
    *,
    eps_beside: Literal["corrected", "uncorrected"],
) -> None:
    """One Adam step of every target, without weight decay, in place; the states hold `step`, `exp_avg` and `exp_avg_sq`, or nothing yet.

    target -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps) where eps stands beside the uncorrected root, as in
    🤗 transformers' AdamW; beside the corrected one the bracket is sqrt(v) + eps * sqrt(1 - beta2^t), torch's. Both are torch's fused
    kernel, in which the first is an eps that changes with t. A target of zeros becomes the move itself.

    Args:
        targets, grads: contiguous, of equal shapes.
        group: `lr`, `betas`, `eps`, and `correct_bias` (true if absent).
    """
    alike: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for index, (target, state) in enumerate(zip(targets, states, strict=True)):
        if "exp_avg" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(target), "exp_avg_sq": torch.zeros_like(target)}
        state["step"] += 1
        alike.setdefault((target.device, target.dtype, state["step"]), []).append(index)
    beta1, beta2 = group["betas"]
    for (device, _, t), members in alike.items():
        corrects = group.get("correct_bias", True)
        eps = group["eps"] / math.sqrt(1 - beta2**t) if corrects and eps_beside == "uncorrected" else group["eps"]
        adamw(
            [targets[index] for index in members],
            [grads[index] for index in members],
            [states[index]["exp_avg"] for index in members],
            [states[index]["exp_avg_sq"] for index in members],
            [],
            list(torch.full((len(members),), t - 1 if corrects else CORRECTED, dtype=torch.float32, device=device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )


class ProjectingOptimizer(Optimizer):
    """What optimizers with low-rank gradients share: checks, the closure, and when a basis is made anew.

    A basis is made at a weight's first step and every `update_proj_gap` steps after. Moments are not turned with it. All ranks
    use rank 0's, since libraries differ in the signs of singular vectors.
    """

    def __init__(self, params: ParamsT, defaults: State) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            self._refuse(group)

    def _refuse(self, group: State) -> None:
        refuse_hyperparameters(self, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gives the closure's loss, if there is one.

        Raises ConfigError for a gradient that is sparse or not real floating; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [{p: dense_gradient(p, self) for p in group["params"] if p.grad is not None} for group in self.param_groups]
        for group, of_group in zip(self.param_groups, grads, strict=True):
            if of_group:
                self._update(group, of_group)
        return loss

    def find_basis(self, parameter: Tensor, role: str, grad_MN: Tensor, group: State) -> Basis:
        """The basis of one matrix from now on; `role` tells matrices apart that belong to one parameter."""
        del parameter, role
        basis = leading(grad_MN, group["rank"], group["proj_type"])
        if dist.is_available() and dist.is_initialized():
            for side in basis:
                if side is not None:
                    dist.broadcast(side, src=0)
        return basis

    def basis(self, parameter: Tensor, role: str, grad_MN: Tensor, state: State, group: State) -> Basis:
        """The basis that a step projects on; kept in the matrix's state as `left` and `right`."""
        if state.get("step", 0) % group["update_proj_gap"] == 0:
            left, right = self.find_basis(parameter, role, grad_MN, group)
            state |= {name: side for name, side in (("left", left), ("right", right)) if side is not None}
        return Basis(state.get("left"), state.get("right"))

    @abstractmethod
    def _update(self, group: State, grads: dict[Tensor, Tensor]) -> None:
        """Steps the parameters of a group that have a gradient."""


class LowRankAdamW(ProjectingOptimizer):
    """AdamW whose moments of matrices live in a space of low rank (GaLore); what has no rank, or is no matrix, steps at full rank.

    p -= s * scale * up(m / (sqrt(v) + eps)), s = lr sqrt(1 - beta2^t) / (1 - beta1^t); then p *= 1 - lr * weight_decay.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size, >= 0.
        betas: decay of the moments, each in [0, 1).
        eps: >= 0, beside the root of the uncorrected second moment.
        weight_decay: decoupled, per unit of lr, after the step, >= 0.
        rank: of the projection, >= 1; None in a group: full rank.
        update_proj_gap: steps between two bases, >= 1.
        scale: factor on a step that was projected.
        proj_type: which side is projected (`leading`).
        correct_bias: divide out that the moments start at zero.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: Projection = "std",
        correct_bias: bool = True,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "correct_bias": correct_bias}
        super().__init__(params, {**hyper, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type})

    def _update(self, group: State, grads: dict[Tensor, Tensor]) -> None:
        step_low_rank(self, group, [(p, "weight", p, grad, self.state[p]) for p, grad in grads.items()])


Matrix = tuple[Tensor, str, Tensor, Tensor, State]
"""The parameter that a tensor belongs to, its role there, the tensor itself, its gradient, its state."""


def step_low_rank(optimizer: ProjectingOptimizer, group: State, members: Iterable[Matrix]) -> None:
    """The step of `LowRankAdamW` on any tensors, in place; matrices are projected if the group has a rank."""
    weights, targets, reduced, states, bases = [], [], [], [], []
    for parameter, role, tensor, grad, state in members:
        weight = tensor.contiguous()
        projects = group["rank"] is not None and weight.ndim == 2
        basis = optimizer.basis(parameter, role, grad, state, group) if projects else None
        low = grad if basis is None else basis.down(grad)
        weights.append((tensor, weight))
        targets.append(weight if basis is None else torch.zeros_like(low))
        reduced.append(low)
        states.append(state)
        bases.append(basis)
    adam_(targets, reduced, states, group, eps_beside="uncorrected")
    for (_, weight), target, basis in zip(weights, targets, bases, strict=True):
        if basis is not None:
            basis.add_up_(weight, target, group["scale"])
    if group["weight_decay"] and weights:
        torch._foreach_mul_([weight for _, weight in weights], 1 - group["lr"] * group["weight_decay"])
    for tensor, weight in weights:
        if weight is not tensor:
            tensor.copy_(weight)
