"""AdaLoRA: adapters in the form of a singular value decomposition, with one rank budget over all matrices of both towers.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
(ICLR 2023). W = W0 + alpha / R * B diag(E) A; a penalty keeps rows of A and columns of B near orthonormal; entries of E are cut by
importance (`rank_budget.py`), so the budget moves to the matrices that need it.

It works on weights and not on layers: the weights hold the merged result at all times, and the gradients of A, E and B follow from
that of W by the chain rule. So packed q, k, v and output projections of fused attention, whose layers are never called, are adapted
like any other, q, k and v each with an adapter of its own, and a model is saved as it is. `peft_export.py` writes the adapters alone.

Shape legend: P maps stacked in a packed weight, M rows, N columns of a map, R initial rank of its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Curvature
from diptych.optimizers.adamw import Beta
from diptych.optimizers.checks import dense_gradient
from diptych.optimizers.linears import is_adaptable, is_bare, maps_in, named, split
from diptych.optimizers.low_rank import State, adam_
from diptych.optimizers.rank_budget import FACTORS, RankAllocator, Schedule, Triplets

AdapterFormat = Literal["none", "peft", "peft-0.21"]
INIT_STD = 0.02
RANK_EPS = 1e-5  # the authors divide by R + 1e-5


def delta(A_PRN: Tensor, E_PR1: Tensor, B_PMR: Tensor, scale: float) -> Tensor:
    """What the adapters add to a weight, `[P, M, N]`: scale * B diag(E) A."""
    return B_PMR @ (A_PRN * E_PR1) * scale


def factor_gradients(grad_PMN: Tensor, A_PRN: Tensor, E_PR1: Tensor, B_PMR: Tensor, scale: float) -> dict[str, Tensor]:
    """The gradients of `A`, `E` and `B` from that of the weight, by the chain rule."""
    inner_PRN = B_PMR.mT @ grad_PMN * scale
    return {
        "A": inner_PRN * E_PR1,
        "E": (inner_PRN * A_PRN).sum(dim=-1, keepdim=True),
        "B": grad_PMN @ (A_PRN * E_PR1).mT * scale,
    }


def orthogonality(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The mean of |A A^T - I| and |B^T B - I| (Frobenius, not squared) over all matrices, and its gradients in `A` and `B`.

    The paper squares the norms and sums them; this is the authors' code.

    Args:
        factors: (A `[P, R, N]`, B `[P, M, R]`) of each weight, float32 or wider: norms of half precision overflow.
    """
    matrices = 2 * sum(len(A) for A, _ in factors)
    total, grads = factors[0][0].new_zeros(()), []
    for A_PRN, B_PMR in factors:
        (norm_A, gap_A), (norm_B, gap_B) = (_gap(rows) for rows in (A_PRN, B_PMR.mT))
        total += (norm_A.sum() + norm_B.sum()) / matrices
        grads.append({"A": gap_A @ A_PRN * (2 / matrices), "B": B_PMR @ gap_B * (2 / matrices)})
    return total, grads


def _gap(rows_PRN: Tensor) -> tuple[Tensor, Tensor]:
    """The norm `[P]` of X X^T - I, and X X^T - I over its norm `[P, R, R]`, 0 where X is orthonormal."""
    gap_PRR = rows_PRN @ rows_PRN.mT - torch.eye(rows_PRN.shape[1], dtype=rows_PRN.dtype, device=rows_PRN.device)
    norm_P = torch.linalg.matrix_norm(gap_PRR)
    return norm_P, gap_PRR / torch.where(norm_P == 0, 1, norm_P)[:, None, None]


class AdaLoRA(Optimizer):
    """AdamW on the adapters of matrices, and the allocator that moves ranks between them.

    Call `plan(total_steps)`, or give `total_steps`, before the first step: the budget shrinks over the run. The weights of the start
    stay in the state, so that rounding never accumulates in them; weight decay, which would fight the penalty, touches no adapter.
    A parameter without a gradient counts as one with a gradient of zero. Dropout on an adapter's input has no counterpart on
    merged weights and is not offered. State of matrices: the copy of the start, and five numbers for each number in an adapter.

    Args:
        params: parameters or groups. In a group with `adapt` (a default below) all are matrices, float32 or float64; in one
            without they take an AdamW step if the group says `train`, else they keep their values.
        lr: step size, >= 0.
        betas: decay of Adam's moments, each in [0, 1).
        eps: >= 0, beside the root of the corrected second moment.
        weight_decay: decoupled, per unit of lr, >= 0; on parameters without an adapter.
        rank: R, >= 1, cut to the shorter side of a map; the paper advises 1.5 times `target_rank`.
        target_rank: mean rank of a map at the end.
        alpha: adapters count alpha / R; <= 0: R / R. R stays what it was, however many ranks are cut.
        penalty: gamma, the weight of `orthogonality`, >= 0.
        init_warmup, final_warmup: steps (integer) or share of the run (below 1) before the first cut, and at the end with the target.
        mask_interval: steps between two cuts.
        beta1, beta2: decay of importance and uncertainty, each in [0, 1).
        total_steps: of the run.
        seed: names the adapters' first values, the same on every rank.
        adapt, train: of groups that do not say.

    Attributes:
        threshold: the score at which the latest step cut; None if it did not.
        adapter: what `save_adapter` writes: `none`, `peft`, or `peft-0.21` for versions that count output projections twice.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 12,
        target_rank: float = 8,
        alpha: float = 16.0,
        penalty: float = 0.1,
        init_warmup: float = 0.1,
        final_warmup: float = 0.3,
        mask_interval: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        total_steps: int | None = None,
        seed: int = 0,
        adapt: bool = True,
        train: bool = True,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "alpha": alpha, "penalty": penalty}
        budget = {"target_rank": target_rank, "init_warmup": init_warmup, "final_warmup": final_warmup, "mask_interval": mask_interval}
        super().__init__(params, {**hyper, **budget, "beta1": beta1, "beta2": beta2, "seed": seed, "adapt": adapt, "train": train})
        self._allocator: RankAllocator | None = None
        self.adapter: AdapterFormat = "none"
        self.threshold: float | None = None
        for place, group in enumerate(self.param_groups):
            for index, (name, parameter) in enumerate(named(group) if group["adapt"] else ()):
                self._attach(group, name or f"{place}.{index}", maps_in(name, parameter), parameter)
        if not self.adapted():
            raise ConfigError.at("There is nothing to adapt", "params", "no matrix", "at least one")
        if total_steps is not None:
            self.plan(total_steps)

    @torch.no_grad()
    def _attach(self, group: State, name: str, maps: int, parameter: Tensor) -> None:
        if parameter.ndim != 2 or not parameter.is_contiguous() or parameter.dtype not in (torch.float32, torch.float64):
            got = f"{name}, shape {tuple(parameter.shape)}, {parameter.dtype}"
            raise ConfigError.at("AdaLoRA adapts contiguous matrices", "params", got, "float32 or float64", "use a group with adapt=False")
        rows, columns = parameter.shape[0] // maps, parameter.shape[1]
        rank = min(group["rank"], rows, columns)
        generator = torch.Generator().manual_seed(int(chance.mix(group["seed"], chance.key_hash(name))) >> 1)
        A_PRN, B_PMR = (torch.empty(shape, dtype=parameter.dtype) for shape in ((maps, rank, columns), (maps, rows, rank)))
        values = {"A": A_PRN.normal_(std=INIT_STD, generator=generator), "B": B_PMR.normal_(std=INIT_STD, generator=generator)}
        values["E"] = torch.zeros(maps, rank, 1, dtype=parameter.dtype)
        values = {factor: values[factor].to(parameter.device) for factor in FACTORS}
        self.state[parameter] |= {
            "base": parameter.detach().clone(),
            "steps_made": 0,
            "factors": {factor: {"value": value} for factor, value in values.items()},
            "importance": {factor: torch.zeros_like(value) for factor, value in values.items()},
            "uncertainty": {factor: torch.zeros_like(value) for factor, value in values.items()},
        }

    def plan(self, total_steps: int) -> None:
        """Lays the budget over a run of this many updates. Raises ConfigError if its phases do not fit."""
        triplets = [self.triplets(parameter) for _, parameter in self.adapted()]
        maps = sum(len(each.E) for each in triplets)
        first, last = (_steps(self.defaults[name], total_steps) for name in ("init_warmup", "final_warmup"))
        target = round(self.defaults["target_rank"] * maps)
        schedule = Schedule(sum(each.count for each in triplets), target, total_steps, first, last, self.defaults["mask_interval"])
        self._allocator = RankAllocator(schedule, self.defaults["beta1"], self.defaults["beta2"])

    def adapted(self) -> list[tuple[State, Tensor]]:
        """The group and the parameter of every adapted matrix, in order."""
        return [(group, parameter) for group in self.param_groups if group["adapt"] for parameter in group["params"]]

    def triplets(self, parameter: Tensor) -> Triplets:
        """The adapters of a parameter, `[P, …]`, as they are kept: writing into them changes the state, not yet the weight."""
        state = self.state[parameter]
        factors = {factor: state["factors"][factor]["value"] for factor in FACTORS}
        return Triplets(**factors, importance=state["importance"], uncertainty=state["uncertainty"])

    def scale(self, group: State, parameter: Tensor) -> float:
        """What a parameter's adapters are multiplied by."""
        rank = self.state[parameter]["factors"]["E"]["value"].shape[1]
        alpha: float = group["alpha"] if group["alpha"] > 0 else rank
        return float(alpha / (rank + RANK_EPS))

    def ranks(self) -> dict[str, list[int]]:
        """The ranks left in each map of each adapted matrix, by its name, or by its place where it has none."""
        names = [name or str(index) for group in self.param_groups if group["adapt"] for index, (name, _) in enumerate(named(group))]
        kept = [(self.triplets(parameter).E != 0).sum(dim=(1, 2)).tolist() for _, parameter in self.adapted()]
        return dict(zip(names, kept, strict=True))

    def save_adapter(self, model: nn.Module, directory: Path, base_model: str = "") -> None:
        """Writes the adapters of a dual encoder into `directory/adapter`, in the format that was asked for; nothing if none was."""
        if self.adapter != "none":
            from diptych.optimizers.peft_export import export_peft

            inner: nn.Module = getattr(model, "clip", model)  # open_clip's model: peft wraps that
            export_peft(self, inner, directory / "adapter", base_model, doubles_output=self.adapter == "peft-0.21")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every adapter and of every other parameter that is trained; gives the closure's loss, if there is one.

        Raises ConfigError for sparse or complex gradients, and before `plan`; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._allocator is None:
            raise ConfigError.at(
                "The rank budget does not know the length of the run", "total_steps", None, "an integer", "call plan(total_steps)"
            )
        others = [(group, list(self._others(group))) for group in self.param_groups if group["train"] and not group["adapt"]]
        adapted = self.adapted()
        triplets = [self.triplets(parameter) for _, parameter in adapted]
        grads = self._gradients(adapted, triplets)
        for group, members in others:
            _adamw(group, members, self.state)
        self._step_factors(adapted, triplets, grads)
        step = self.state[adapted[0][1]]["steps_made"]
        self.threshold = self._allocator.after_step(step, triplets, grads)
        for (group, parameter), each in zip(adapted, triplets, strict=True):
            self.state[parameter]["steps_made"] += 1
            self._merge(parameter, each, self.scale(group, parameter))
        return loss

    def _others(self, group: State) -> Iterator[tuple[Tensor, Tensor]]:
        return ((p, dense_gradient(p, self)) for p in group["params"] if p.grad is not None)

    def _gradients(self, adapted: list[tuple[State, Tensor]], triplets: list[Triplets]) -> list[dict[str, Tensor]]:
        """By factor, those of the loss and of the penalty."""
        grads = []
        for (group, parameter), each in zip(adapted, triplets, strict=True):
            grad = torch.zeros_like(parameter) if parameter.grad is None else dense_gradient(parameter, self)
            grad_PMN = grad.view(len(each.E), -1, parameter.shape[1])
            grads.append(factor_gradients(grad_PMN, each.A, each.E, each.B, self.scale(group, parameter)))
        _, pulls = orthogonality([(each.A, each.B) for each in triplets])
        for (group, _), grad_of, pull_of in zip(adapted, grads, pulls, strict=True):
            for factor, pull in pull_of.items():
                grad_of[factor].add_(pull, alpha=group["penalty"])
        return grads

    def _step_factors(self, adapted: list[tuple[State, Tensor]], triplets: list[Triplets], grads: list[dict[str, Tensor]]) -> None:
        for group in self.param_groups:
            members = [
                (getattr(each, factor), grad[factor], self.state[parameter]["factors"][factor])
                for (owner, parameter), each, grad in zip(adapted, triplets, grads, strict=True)
                for factor in FACTORS
                if owner is group
            ]
            if members:
                targets, gradients, states = zip(*members, strict=True)
                adam_(targets, gradients, states, group, eps_beside="corrected")

    def _merge(self, parameter: Tensor, each: Triplets, scale: float) -> None:
        weight_PMN, base_PMN = (tensor.view(len(each.E), -1, parameter.shape[1]) for tensor in (parameter, self.state[parameter]["base"]))
        torch.baddbmm(base_PMN, each.B, each.A * each.E, alpha=scale, out=weight_PMN)


def _adamw(group: State, members: list[tuple[Tensor, Tensor]], states: Mapping[Tensor, State]) -> None:
    """AdamW on whole parameters, in place."""
    if not members:
        return
    weights = [parameter.contiguous() for parameter, _ in members]
    if group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    adam_(weights, [grad for _, grad in members], [states[parameter] for parameter, _ in members], group, eps_beside="corrected")
    for (parameter, _), weight in zip(members, weights, strict=True):
        if weight is not parameter:
            parameter.copy_(weight)


def _steps(amount: float, total: int) -> int:
    return amount if isinstance(amount, int) else round(amount * total)


class Config(BaseConfig):
    """AdaLoRA on the linear maps of both towers; an objective's own parameters are trained whole, the rest as `others` says."""

    curvature: ClassVar[Curvature] = "none"
    counts_updates: ClassVar[bool] = True

    method: Literal["adalora"] = "adalora"
    lr: float = Field(1e-3, gt=0, description="peak learning rate, per update")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay per update of Adam's first and second moment")
    eps: float = Field(1e-8, ge=0, description="added to the root of the second moment, in units of the gradient")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay per unit of learning rate, on parameters without an adapter")
    rank: int = Field(12, ge=1, description="ranks of each map at the start; 1.5 times target_rank in the paper")
    target_rank: float = Field(8, gt=0, description="mean rank of a map at the end")
    alpha: float = Field(16.0, description="adapters count alpha / rank; 0 or less: 1")
    penalty: float = Field(0.1, ge=0, description="weight of the distance of singular vectors from orthonormal ones")
    init_warmup: int | float = Field(0.1, ge=0, description="steps (integer) or share of the run (below 1) before the first cut")
    final_warmup: int | float = Field(0.3, ge=0, description="steps or share of the run at the end, with the target's ranks")
    mask_interval: int = Field(10, ge=1, description="updates between two cuts")
    beta1: Beta = Field(0.85, description="decay per update of a value's importance")
    beta2: Beta = Field(0.85, description="decay per update of the importance's uncertainty")
    projections: bool = Field(True, description="adapt bare projections too; false where the adapters must open in peft")
    others: Literal["freeze", "train"] = Field(
        "freeze", description="biases, norms, embeddings, the logit scale: kept, or trained by AdamW"
    )
    adapter: AdapterFormat = Field(
        "none",
        description="peft: the adapters alone, too, as a directory `adapter` in the model's that 🤗 peft opens; "
        "peft-0.21: for versions up to 0.21.2, which count output projections of fused attention twice",
    )
    seed: int = Field(0, description="names the adapters' first values")

    @model_validator(mode="after")
    def _peft_reaches_all(self) -> Self:
        if self.adapter != "none" and self.projections:
            raise ValueError(f"peft does not reach bare projections: adapter: {self.adapter} needs projections: false")
        return self

    def build(self, groups: Iterable[dict[str, Any]]) -> AdaLoRA:
        """The optimizer over parameter groups; a group's own values win over the configuration's. It wants `plan(total_steps)`."""
        hyper = self.model_dump(exclude={"method", "others", "projections", "adapter"})
        halves = split(groups, {"adapt": True}, {"adapt": False, "train": self.others == "train"}, self._adapts)
        optimizer = AdaLoRA(
            [part for half in halves for part in ([half] if half["adapt"] else split([half], {"train": True}, {}, _is_own))], **hyper
        )
        optimizer.adapter = self.adapter
        return optimizer

    def _adapts(self, name: str | None, parameter: Tensor) -> bool:
        return is_adaptable(name, parameter) and (self.projections or name is None or not is_bare(name))


def _is_own(name: str | None, parameter: Tensor) -> bool:
    """Whether a parameter is the objective's."""
    del parameter
    return name is not None and name.startswith("objective.")
