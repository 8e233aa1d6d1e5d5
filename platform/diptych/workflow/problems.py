"""An experiment on a problem with a known answer: no pairs and no model, only an optimizer and how it is led.

    problem: {method: quadratic, noise: 0.1}
    train: {optimizer: {method: adamw, lr: 0.1}, steps: 150, schedule: {kind: cosine}}

The keys of `train` are those of a workflow and mean the same. Claims about optimizers alone use it as their base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from diptych.core.config import Config
from diptych.train.schedule import ScheduleConfig
from diptych.workflow import methods
from diptych.workflow.methods import Checks

if TYPE_CHECKING:
    from diptych.train.problems.problem import Outcome


class _Training(Config):
    """The `train` key."""

    optimizer: dict[str, Any]
    batch_growth: dict[str, Any] | None = None
    steps: int = Field(ge=1)
    schedule: ScheduleConfig = ScheduleConfig(warmup=0)


class _Skeleton(Config):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    seed: int = Field(ge=0, lt=2**63)
    problem: dict[str, Any]
    train: _Training


@dataclass(frozen=True)
class Experiment:
    """A checked experiment on a problem."""

    name: str
    seed: int
    problem: Config
    optimizer: Config
    batch_growth: Config | None
    steps: int
    schedule: ScheduleConfig

    def run(self) -> Outcome:
        """Solves the problem."""
        from diptych.train.problems.problem import solve
        from diptych.train.run import fixed_arithmetic

        built: Any = self.problem.build()  # type: ignore[attr-defined]
        growth: Any = None if self.batch_growth is None else self.batch_growth.build  # type: ignore[attr-defined]
        with fixed_arithmetic(threads=1):
            return solve(built, self.seed, self.steps, self.schedule.build, self.optimizer.build, growth)  # type: ignore[attr-defined]


def is_problem(raw: Mapping[str, Any]) -> bool:
    """Whether data describe an experiment on a problem, and not a workflow."""
    return "problem" in raw


def check(raw: Mapping[str, Any]) -> Experiment:
    """Checks the data of an experiment. Raises ConfigError with every problem at once."""
    checks = Checks()
    skeleton = checks.attempt(lambda: _Skeleton.parse(dict(raw)))
    train = raw.get("train")
    train = train if isinstance(train, Mapping) else {}
    problem = checks.attempt(lambda: methods.method(raw.get("problem"), "problem", "problem"))
    optimizer = checks.attempt(lambda: methods.method(train.get("optimizer"), "optimizer", "train.optimizer"))
    growth = train.get("batch_growth")
    batch_growth = None if growth is None else checks.attempt(lambda: methods.method(growth, "batch-size", "train.batch_growth"))
    checks.refuse()
    assert skeleton is not None
    assert problem is not None
    assert optimizer is not None
    section = skeleton.train
    return Experiment(skeleton.name, skeleton.seed, problem, optimizer, batch_growth, section.steps, section.schedule)
