"""GradNormLoRP: weight-normalised matrices whose gradients are projected to a low rank before Adam.

Huang, Shen, Zhu, Rudinac, Kanoulas, "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training" (AAAI 2025). A weight
is a magnitude times a direction, W = g * v / |v| row by row, and the gradient of the direction is seen through a basis of low rank.
The authors' code holds it in two forms, both here: on full weights (`WeightNormAdamW`, their fine-tuning), and on a low-rank adapter
with its own magnitude over a frozen weight (`DoraAdamW`, their pre-training). GaLore alone is `low_rank.LowRankAdamW`.

Both work on weights and not on layers, so packed q, k, v and output projections of fused attention are reached like any other, and
the model is at all times a plain one: nothing has to be merged before it is saved.

Shape legend: M rows (output neurons), N columns of a weight, R rank of an adapter, P maps stacked in a packed weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.optimizer import ParamsT

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Curvature
from diptych.optimizers.adamw import Beta
from diptych.optimizers.checks import dense_gradient
from diptych.optimizers.linears import maps_in, named, split
from diptych.optimizers.low_rank import LowRankAdamW, Matrix, ProjectingOptimizer, Projection, State, adam_, step_low_rank
from diptych.optimizers.projection import Workspace, row_dots


class WeightNormAdamW(ProjectingOptimizer):
    """Adam on magnitude and direction of each row, the direction's gradient projected to a low rank.

    A step takes v, the direction, and g = |v|: the magnitude is set back to the norm of v at every step, so what it learns lasts for
    one forward pass. Adam steps v on the projected gradient and g on sum(grad * v) / |v|; both decay; the weight becomes g v / |v|.

    The authors keep v beside the weight. As v is the weight with other row lengths, two numbers a row hold it here, which agrees
    to rounding and saves a copy of the model. Where |v| is 0 the authors divide by it; here such a row takes the plain step and is
    normalised from the next one on.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size, >= 0.
        betas: decay of the moments, each in [0, 1).
        eps: >= 0, beside the root of the uncorrected second moment.
        weight_decay: decoupled, per unit of lr, after the step, >= 0; on v and g.
        rank, update_proj_gap, scale, proj_type, correct_bias: as for `LowRankAdamW`.
        normalize: false in a group: its tensors take a plain Adam step. True: matrices have a magnitude a row, vectors one as a
            whole, and any other shape is refused.
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
        normalize: bool = True,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "normalize": normalize}
        more = {"update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, "correct_bias": correct_bias}
        super().__init__(params, {**hyper, **more})

    def _refuse(self, group: State) -> None:
        super()._refuse(group)
        odd = [tuple(p.shape) for p in group["params"] if p.ndim not in (1, 2)] if group["normalize"] else []
        if odd:
            fix = "put scalars and convolutions into a group with normalize=False"
            raise ConfigError.at("Only vectors and matrices can be weight-normalised", "params", odd, "one or two dimensions", fix)

    def _update(self, group: State, grads: dict[Tensor, Tensor]) -> None:
        if not group["normalize"]:
            step_low_rank(self, {**group, "rank": None}, [(p, "weight", p, grad, self.state[p]) for p, grad in grads.items()])
            return
        workspace = Workspace()
        rows = [_Rows(self, group, p, grad, self.state[p], workspace) for p, grad in grads.items()]
        members = [member for each in rows for member in each.members()]
        targets, gradients, states = zip(*members, strict=True)
        adam_(targets, gradients, states, group, eps_beside="uncorrected")
        for each in rows:
            each.finish()


class _Rows:
    """One weight during a step: v is built in the weight's own memory, stepped, and scaled back to rows of length g."""

    def __init__(
        self, optimizer: WeightNormAdamW, group: State, parameter: Tensor, grad: Tensor, state: State, workspace: Workspace
    ) -> None:
        self.parameter, self.group, self.state = parameter, group, state
        self.weight = parameter.contiguous()
        self.v_MN = self.weight if parameter.ndim == 2 else self.weight.view(1, -1)
        grad_MN = grad.view_as(self.v_MN)
        if "length" not in state:
            state["length"], state["stretch"] = torch.linalg.vector_norm(self.v_MN, dim=1), self.v_MN.new_ones(len(self.v_MN))
        direction = state.setdefault("direction", {})
        state.setdefault("magnitude", {})
        self.v_MN.mul_(state["stretch"].unsqueeze(1))
        self.is_zero_M = state["length"] == 0
        along_M = row_dots(grad_MN, self.v_MN, torch.empty_like(state["length"]), workspace)
        self.grad_M = torch.where(self.is_zero_M, 0, along_M / state["length"])
        projects = group["rank"] is not None and parameter.ndim == 2
        self.basis = optimizer.basis(parameter, "weight", grad_MN, direction, group) if projects else None
        self.low = grad_MN if self.basis is None else self.basis.down(grad_MN)
        self.target = self.v_MN if self.basis is None else torch.zeros_like(self.low)
        self.g_M = state["length"].clone()

    def members(self) -> Iterator[tuple[Tensor, Tensor, State]]:
        """What Adam steps: (target, gradient, state) of direction and magnitude."""
        yield self.target, self.low, self.state["direction"]
        yield self.g_M, self.grad_M, self.state["magnitude"]

    def finish(self) -> None:
        """Carries the low-rank move back, decays, and writes g v / |v|; the state keeps |v| and the factor that leads back to v."""
        if self.basis is not None:
            self.basis.add_up_(self.v_MN, self.target, self.group["scale"])
        kept = 1 - self.group["lr"] * self.group["weight_decay"]
        norm_M = torch.linalg.vector_norm(self.v_MN, dim=1)
        length_M, g_M = norm_M * kept, self.g_M * kept
        plain_M = self.is_zero_M | (norm_M == 0) | (g_M == 0)  # rows that g v / |v| cannot lead back from
        # Of a magnitude that is exactly zero nothing is left: such a row starts anew from zero.
        self.state["length"] = torch.where(g_M == 0, torch.where(self.is_zero_M, length_M, 0), length_M)
        self.state["stretch"] = torch.where(plain_M, 1, length_M / g_M)
        self.v_MN.mul_(torch.where(self.is_zero_M | (norm_M == 0), kept, g_M / norm_M).unsqueeze(1))
        if self.weight is not self.parameter:
            self.parameter.copy_(self.weight)


class DoraAdamW(ProjectingOptimizer):
    """A DoRA adapter under every linear map, trained by Adam on projected gradients; the weights hold the merged result.

    W = m * (W0 + s B A) / |W0 + s B A| by rows, s = lora_alpha / lora_rank, the norm a constant in the backward pass. A starts Kaiming
    uniform, B at zero, m at the row norms of W0, so W starts as W0. The gradients of A, B and m follow from that of W by the chain
    rule. A and B are projected to `rank`, which saves memory only below `lora_rank`: from there on it is a rotation. A row of
    zeros stays zero. Dropout on the adapter's input has no counterpart on merged weights and is not offered.

    Args:
        params: parameters or groups. A group with `adapt` (a default below) holds matrices; one without steps like `LowRankAdamW`
            at full rank. Packed projections, known by `param_names`, get an adapter for each of their maps.
        lr, betas, eps, weight_decay, rank, update_proj_gap, scale, proj_type: as for `LowRankAdamW`; W0 does not decay.
        lora_rank: R, >= 1; at most the shorter side of a map.
        lora_alpha: > 0.
        seed: names the draws of A.
        adapt: whether a group's parameters are adapted.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = 4,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: Projection = "std",
        correct_bias: bool = True,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        seed: int = 0,
        adapt: bool = True,
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "correct_bias": correct_bias}
        projection = {"update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, {**hyper, **projection, "lora_rank": lora_rank, "lora_alpha": lora_alpha, "seed": seed, "adapt": adapt})
        for place, group in enumerate(self.param_groups):
            if group["adapt"]:
                for index, (name, parameter) in enumerate(named(group)):
                    self._attach(group, name or f"{place}.{index}", maps_in(name, parameter), parameter)

    @torch.no_grad()
    def _attach(self, group: State, name: str, maps: int, parameter: Tensor) -> None:
        if parameter.ndim != 2 or not parameter.is_contiguous():
            got = f"{name}, shape {tuple(parameter.shape)}"
            raise ConfigError.at("Only contiguous matrices can be adapted", "params", got, "two dimensions", "use a group with adapt=False")
        self.state[parameter]["base"] = parameter.detach().clone()
        self.state[parameter]["adapters"] = [
            _first_adapter(W0_MN, group["lora_rank"], chance.mix(group["seed"], chance.key_hash(name), place))
            for place, W0_MN in enumerate(self.state[parameter]["base"].chunk(maps))
        ]

    def adapter(self, parameter: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(A `[R, N]`, B `[M, R]`, m `[M]`) of each map stacked in a parameter."""
        return [(each["A"]["value"], each["B"]["value"], each["m"]["value"]) for each in self.state[parameter]["adapters"]]

    @torch.no_grad()
    def load_adapter(self, parameter: Tensor, adapters: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Takes over A, B and m of each map of a parameter, e.g. trained elsewhere over the same W0, and writes the weight anew."""
        for own, other in zip(self.adapter(parameter), adapters, strict=True):
            for value, new in zip(own, other, strict=True):
                value.copy_(new)
        for each in self._maps(self._group_of(parameter), parameter, torch.zeros_like(parameter)):
            each.merge()

    @torch.no_grad()
    def gradients(self, parameter: Tensor) -> list[dict[str, Tensor]]:
        """The gradients of `A`, `B` and `m` of each map, from that of the weight."""
        grad = dense_gradient(parameter, self)
        return [each.gradients() for each in self._maps(self._group_of(parameter), parameter, grad)]

    def _group_of(self, parameter: Tensor) -> State:
        return next(group for group in self.param_groups if any(each is parameter for each in group["params"]))

    def _update(self, group: State, grads: dict[Tensor, Tensor]) -> None:
        if not group["adapt"]:
            step_low_rank(self, {**group, "rank": None}, [(p, "weight", p, grad, self.state[p]) for p, grad in grads.items()])
            return
        maps = [each for p, grad in grads.items() for each in self._maps(group, p, grad)]
        step_low_rank(self, group, [member for each in maps for member in each.members()])
        for each in maps:
            each.merge()

    def _maps(self, group: State, parameter: Tensor, grad: Tensor) -> Iterator[_Map]:
        state = self.state[parameter]
        count = len(state["adapters"])
        parts = zip(parameter.chunk(count), state["base"].chunk(count), grad.chunk(count), state["adapters"], strict=True)
        for place, (W_MN, W0_MN, grad_MN, adapter) in enumerate(parts):
            yield _Map(parameter, place, W_MN, W0_MN, grad_MN, adapter, group["lora_alpha"] / group["lora_rank"])


def _first_adapter(W0_MN: Tensor, rank: int, draw: Any) -> State:
    """A ~ U(-1/sqrt(N), 1/sqrt(N)) (Kaiming uniform as nn.Linear has it), B = 0, m = |W0| by rows."""
    rows, columns = W0_MN.shape
    if rank > min(rows, columns):
        raise ConfigError.at(
            "The adapter is larger than the matrix", "lora_rank", rank, f"at most {min(rows, columns)}, a side of {rows} x {columns}"
        )
    generator = torch.Generator().manual_seed(int(draw) >> 1)
    A_RN = torch.empty(rank, columns, dtype=W0_MN.dtype).uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
    values = {"A": A_RN.to(W0_MN.device), "B": W0_MN.new_zeros(rows, rank), "m": torch.linalg.vector_norm(W0_MN, dim=1)}
    return {name: {"value": value} for name, value in values.items()}


class _Map:
    """One linear map during a step: the gradients of its adapter, and the weight that comes of it."""

    def __init__(self, parameter: Tensor, place: int, W_MN: Tensor, W0_MN: Tensor, grad_MN: Tensor, adapter: State, scale: float) -> None:
        self.parameter, self.place, self.grad_MN, self.adapter = parameter, place, grad_MN, adapter
        self.W_MN, self.W0_MN, self.scale = W_MN, W0_MN, scale
        self.A_RN, self.B_MR, self.m_M = (adapter[name]["value"] for name in ("A", "B", "m"))

    def _direction(self) -> tuple[Tensor, Tensor]:
        """W0 + s B A `[M, N]` and the norms of its rows `[M]`, 1 where a row is zero."""
        V_MN = torch.addmm(self.W0_MN, self.B_MR, self.A_RN, alpha=self.scale)
        norm_M = torch.linalg.vector_norm(V_MN, dim=1)
        return V_MN, torch.where(norm_M == 0, 1, norm_M)

    def gradients(self) -> dict[str, Tensor]:
        """Of A, B and m, by the chain rule: dL/dV = m / |V| * dL/dW, the norm held constant."""
        V_MN, norm_M = self._direction()
        grad_m_M = (self.grad_MN * V_MN).sum(dim=1) / norm_M
        grad_V_MN = torch.mul(self.grad_MN, (self.m_M / norm_M).unsqueeze(1), out=V_MN)
        return {"A": self.B_MR.T @ grad_V_MN * self.scale, "B": grad_V_MN @ self.A_RN.T * self.scale, "m": grad_m_M}

    def members(self) -> Iterator[Matrix]:
        """What Adam steps."""
        for name, grad in self.gradients().items():
            yield self.parameter, f"{name}{self.place}", self.adapter[name]["value"], grad, self.adapter[name]

    def merge(self) -> None:
        """Writes m V / |V| into the weight."""
        V_MN, norm_M = self._direction()
        torch.mul(V_MN, (self.m_M / norm_M).unsqueeze(1), out=self.W_MN)


class Config(BaseConfig):
    """GradNormLoRP on the linear maps of both towers; everything else takes a plain Adam step."""

    curvature: ClassVar[Curvature] = "none"

    method: Literal["gradnormlorp"] = "gradnormlorp"
    variant: Literal["weight-norm", "dora", "galore"] = Field(
        "weight-norm", description="full weights with a magnitude a row; a DoRA adapter over the weights of the start; projection alone"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate, per update")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay per update of the first and the second moment")
    eps: float = Field(1e-6, ge=0, description="added to the root of the uncorrected second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay per unit of learning rate, on parameters that decay")
    rank: int = Field(8, ge=1, description="rank of the gradients' projection; under dora it saves memory only below lora_rank")
    update_proj_gap: int = Field(200, ge=1, description="updates between two bases")
    scale: float = Field(1.0, gt=0, description="factor on projected steps")
    proj_type: Projection = Field("std", description="which side of a gradient is projected; std: the longer one stays")
    correct_bias: bool = Field(True, description="divide out that the moments start at zero")
    lora_rank: int = Field(8, ge=1, description="dora: rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="dora: adapters count lora_alpha / lora_rank")
    seed: int = Field(0, description="dora: names the adapters' first values")

    def build(self, groups: Iterable[dict[str, Any]]) -> WeightNormAdamW | DoraAdamW | LowRankAdamW:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        hyper: dict[str, Any] = self.model_dump(exclude={"method", "variant", "lora_rank", "lora_alpha", "seed"})
        match self.variant:
            case "galore":
                return LowRankAdamW(split(groups, {}, {"rank": None}), **hyper)
            case "dora":
                adapter: dict[str, Any] = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha, "seed": self.seed}
                return DoraAdamW(split(groups, {}, {"adapt": False}), **hyper, **adapter)
            case "weight-norm":
                return WeightNormAdamW(split(groups, {}, {"normalize": False}), **hyper)
