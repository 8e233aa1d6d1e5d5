"""Learning rates by step: pure functions of integers, float64.

Sources: the cosine of CLIP's recipe (Radford et al. 2021, section 2.5, as open_clip counts its steps), constant with a
cooldown (open_clip), warm-up, stable, decay with the 1 - sqrt of its last part (Hägele et al. 2024, "Scaling Laws and Compute-Optimal
Training Beyond Fixed Training Durations", section 3), the table of LaCLIP (Fan et al. 2023), which warms up with both ends included, and the part of a cosine of FixMatch
(Sohn et al. 2020, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.config import Config

Schedule = Callable[[int], float]
"""Step (updates made so far) -> learning rate of the next update."""


READ_BY = {
    "final_lr": ("cosine", "linear", "constant", "wsd", "laclip"),
    "start_lr": ("laclip",),
    "cooldown": ("constant", "wsd"),
    "cooldown_power": ("constant",),
}
"""The kinds that look at a setting; with others it must keep its default."""


class ScheduleConfig(Config):
    """How the learning rate moves. A `warmup` or `cooldown` below 1 is a share of the run; an integer is steps."""

    kind: Literal["cosine", "linear", "constant", "wsd", "laclip", "fixmatch"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup: int | float = Field(default=0.05, ge=0, description="steps (integer) or share of the run (below 1) of linear warm-up")
    final_lr: float = Field(default=0.0, ge=0, description="learning rate at the end")
    start_lr: float = Field(default=1e-6, ge=0, description="laclip: learning rate of the first step")
    cooldown: int | float = Field(default=0, ge=0, description="constant, wsd: steps or share at the end that decay to final_lr")
    cooldown_power: float = Field(default=1.0, gt=0, description="constant: 1 decays linearly")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        for name in ("warmup", "cooldown"):
            value = getattr(self, name)
            if isinstance(value, float) and value >= 1:
                raise ValueError(f"{name} {value} is neither a share below 1 nor a whole number of steps")
        for name, kinds in READ_BY.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with kind: {self.kind}, only with {' or '.join(kinds)}")
        if self.kind == "wsd" and not self.cooldown:
            raise ValueError("wsd decays in its cooldown, so it needs one: steps, or a share such as 0.2")
        if isinstance(self.warmup, float) and isinstance(self.cooldown, float) and self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup {self.warmup} and cooldown {self.cooldown} are more than the whole run")
        return self

    def build(self, base_lr: float, total: int) -> Schedule:
        """The schedule of a run of `total` steps that reaches `base_lr` after its warm-up."""
        warmup = _steps(self.warmup, total)
        match self.kind:
            case "cosine":
                return lambda step: cosine(step, base_lr, warmup, total, self.final_lr)
            case "linear":
                return lambda step: linear(step, base_lr, warmup, total, self.final_lr)
            case "wsd":
                cooldown = _steps(self.cooldown, total)
                return lambda step: warmup_stable_decay(step, base_lr, warmup, total, cooldown, self.final_lr)
            case "constant":
                cooldown = _steps(self.cooldown, total)
                return lambda step: constant_with_cooldown(step, base_lr, warmup, total, cooldown, self.cooldown_power, self.final_lr)
            case "fixmatch":
                return lambda step: fixmatch(step, base_lr, total, warmup)
            case "laclip":
                rates: list[float] = laclip_schedule(base_lr, self.final_lr, 1, total, warmup / total, self.start_lr).tolist()
                return rates.__getitem__


def cosine(step: int, base_lr: float, warmup: int, total: int, final_lr: float = 0.0) -> float:
    """Linear warm-up that reaches `base_lr` at step `warmup - 1`, then half a cosine to `final_lr` at step `total`."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    return final_lr + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * (base_lr - final_lr)


def linear(step: int, base_lr: float, warmup: int, total: int, final_lr: float = 0.0) -> float:
    """Linear warm-up that reaches `base_lr` at step `warmup - 1`, then a straight line to `final_lr` at step `total`."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    return base_lr + (final_lr - base_lr) * (step - warmup) / (total - warmup)


def warmup_stable_decay(step: int, base_lr: float, warmup: int, total: int, cooldown_steps: int, final_lr: float = 0.0) -> float:
    """Linear warm-up, then `base_lr`, then over the last `cooldown_steps` a fall as 1 - sqrt(t) to `final_lr` at step `total`."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    into_cooldown = step - (total - cooldown_steps)
    if into_cooldown < 0 or cooldown_steps == 0:
        return base_lr
    return final_lr + (1 - math.sqrt(into_cooldown / cooldown_steps)) * (base_lr - final_lr)


def constant_with_cooldown(
    step: int, base_lr: float, warmup: int, total: int, cooldown_steps: int, cooldown_power: float = 1.0, cooldown_end_lr: float = 0.0
) -> float:
    """Linear warm-up, then `base_lr`, then a polynomial decay over the last `cooldown_steps` to `cooldown_end_lr` at step `total`."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    into_cooldown = step - (total - cooldown_steps)
    if into_cooldown < 0 or cooldown_steps == 0:
        return base_lr
    left: float = (1 - into_cooldown / cooldown_steps) ** cooldown_power
    return left * (base_lr - cooldown_end_lr) + cooldown_end_lr


def fixmatch(step: int, base_lr: float, total: int, warmup: int = 0) -> float:
    """FixMatch's schedule: linear warm-up, then `base_lr * cos(7 pi t / 16 T)`, which ends at a fifth of `base_lr`."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    return base_lr * math.cos(7 * math.pi * (step - warmup) / (16 * (total - warmup)))


def laclip_schedule(
    base: float, final: float, epochs: int, iters_per_epoch: int, warmup_epochs: float = 0, start: float = 0.0
) -> NDArray[np.float64]:
    """LaCLIP's learning rate of every iteration, float64 `[epochs * iters_per_epoch]`.

    The warm-up is linear from `start` to `base`, both included, so `base` comes twice; the cosine stops one iteration short of `final`.
    """
    total = epochs * iters_per_epoch
    warmup = min(total, round(warmup_epochs * iters_per_epoch))
    rest = np.arange(total - warmup, dtype=np.float64)
    decay = final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / max(1, len(rest))))
    return np.concatenate([np.linspace(start, base, warmup), decay])


def _steps(amount: float, total: int) -> int:
    return min(total, amount if isinstance(amount, int) else round(amount * total))
