"""AdaLoRA's rank budget: which singular values stay, by their importance over all matrices.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
(ICLR 2023), section 3.2 and equations 8 to 12, in the form of the authors' code.

Shape legend: P maps of equal shape side by side, M rows, N columns of a map, R initial rank of its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diptych.core.errors import ConfigError

FACTORS = ("A", "E", "B")


@dataclass
class Triplets:
    """The singular triplets of P adapters of one shape, delta = B diag(E) A, and what is known of their importance.

    Attributes:
        A, E, B: `[P, R, N]`, `[P, R, 1]`, `[P, M, R]`.
        importance, uncertainty: by factor, averages of |w g| and of its distance from that average; zeros to start with.
    """

    A: Tensor
    E: Tensor
    B: Tensor
    importance: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in (self.importance, self.uncertainty):
            for name in FACTORS:
                table.setdefault(name, torch.zeros_like(getattr(self, name)))

    @property
    def count(self) -> int:
        """How many triplets there are: P R."""
        return self.E.numel()

    def scores(self) -> Tensor:
        """The score of each triplet, `[P, R]`: that of E_i, plus the means of those of row i of A and column i of B."""
        A, E, B = (self.importance[name] * self.uncertainty[name] for name in FACTORS)
        return E.squeeze(-1) + A.mean(dim=-1) + B.mean(dim=-2)


@dataclass(frozen=True)
class Schedule:
    """How many triplets may stay, by step (from 0): all of them, then fewer along a cubic, then the target.

    Attributes:
        initial: triplets at the start, over all matrices.
        target: triplets at the end.
        total_steps: of the run.
        init_warmup, final_warmup: steps at the start without a cut, and at the end with the target.
        mask_interval: steps between two cuts in between.

    Raises ConfigError if the phases do not fit into the run or the target is above the start.
    """

    initial: int
    target: int
    total_steps: int
    init_warmup: int
    final_warmup: int
    mask_interval: int

    def __post_init__(self) -> None:
        if self.total_steps <= self.init_warmup + self.final_warmup:
            got = f"{self.init_warmup} + {self.final_warmup} steps of warm-up"
            fix = "shorten init_warmup or final_warmup, or give them as shares of the run"
            raise ConfigError.at("The rank budget has no time to shrink", "total_steps", got, f"less than {self.total_steps} steps", fix)
        if self.target > self.initial:
            raise ConfigError.at("The rank budget would grow", "target_rank", self.target, f"at most {self.initial} triplets in all")

    @property
    def final_from(self) -> int:
        """The first step of the final phase, at whose predecessors scores are still updated."""
        return self.total_steps - self.final_warmup

    def at(self, step: int) -> tuple[int, bool]:
        """The budget in triplets at a step, and whether triplets are cut at it."""
        if step <= self.init_warmup:
            return self.initial, False
        if step > self.final_from:
            return self.target, True
        left = 1 - (step - self.init_warmup) / (self.final_from - self.init_warmup)
        return int(self.target + (self.initial - self.target) * left**3), step % self.mask_interval == 0


class RankAllocator:
    """Cuts singular values after each step. What is cut keeps its vectors and its gradient: it may grow back and stay.

    Args:
        schedule: the budget by step.
        beta1, beta2: decay of importance and uncertainty, each in [0, 1).
        final: what the final phase cuts at every step. `scores`: whatever the frozen scores say, as the paper's code has it, which
            makes a last cut before that phase only where the interval falls on it. `pattern`: what stands after a cut at
            `schedule.final_from`, as 🤗 peft has it.
    """

    def __init__(
        self, schedule: Schedule, beta1: float = 0.85, beta2: float = 0.85, final: Literal["scores", "pattern"] = "scores"
    ) -> None:
        self.schedule, self.beta1, self.beta2, self.final = schedule, beta1, beta2, final
        self._pattern: list[Tensor] | None = None

    @torch.no_grad()
    def after_step(self, step: int, triplets: Sequence[Triplets], grads: Sequence[dict[str, Tensor]]) -> float | None:
        """Call after the optimizer's step, before the gradients go. Gives the threshold if values were cut, in units of a score.

        Args:
            step: updates made before this one.
            triplets: of all matrices, in the same order at every step; E is cut in place.
            grads: by factor, those that the update was made with: averaged over ranks and clipped.
        """
        if step < self.schedule.final_from:
            self._observe(triplets, grads)
        budget, cuts = self.schedule.at(step)
        if self.final == "pattern":
            if self._pattern is not None and step > self.schedule.final_from:
                torch._foreach_mul_([each.E for each in triplets], self._pattern)
                return None
            cuts = cuts or step == self.schedule.final_from
        threshold = self._cut(triplets, budget) if cuts else None
        if self.final == "pattern" and step == self.schedule.final_from:
            self._pattern = [(each.E != 0).to(each.E.dtype) for each in triplets]
        return threshold

    def _observe(self, triplets: Sequence[Triplets], grads: Sequence[dict[str, Tensor]]) -> None:
        """I <- b1 I + (1 - b1) |w g|, then U <- b2 U + (1 - b2) | |w g| - I |."""
        flat = [(each, name, grad[name]) for each, grad in zip(triplets, grads, strict=True) for name in FACTORS]
        sensitivity = torch._foreach_mul([getattr(each, name) for each, name, _ in flat], [grad for _, _, grad in flat])
        torch._foreach_abs_(sensitivity)
        importance = [each.importance[name] for each, name, _ in flat]
        uncertainty = [each.uncertainty[name] for each, name, _ in flat]
        torch._foreach_lerp_(importance, sensitivity, 1 - self.beta1)
        torch._foreach_sub_(sensitivity, importance)
        torch._foreach_abs_(sensitivity)
        torch._foreach_lerp_(uncertainty, sensitivity, 1 - self.beta2)

    def _cut(self, triplets: Sequence[Triplets], budget: int) -> float | None:
        """Sets to zero every E whose score is not above the (count - budget)-th smallest of all; ties go together."""
        scores = [each.scores() for each in triplets]
        surplus = sum(each.count for each in triplets) - budget
        if surplus <= 0:
            return None
        threshold = torch.kthvalue(torch.cat([score.flatten() for score in scores]), surplus).values
        for each, score in zip(triplets, scores, strict=True):
            each.E.masked_fill_((score <= threshold).unsqueeze(-1), 0)
        return float(threshold)
