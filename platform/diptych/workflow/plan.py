"""`diptych plan`: what would run and why, what is cached, and what it will cost, from a measured probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diptych.core import digest
from diptych.engine.pipeline import StageState
from diptych.engine.progress import duration
from diptych.workflow import costs, identity
from diptych.workflow.project import Project
from diptych.workflow.spec import PHASES, Workflow
from diptych.workflow.store import Store, open_store


@dataclass(frozen=True)
class Line:
    """A phase of the plan."""

    phase: str
    state: StageState
    cost: costs.Cost


def plan(workflow: Workflow) -> tuple[Store, list[Line]]:
    """The plan of a workflow. Phases behind a changed one run as well; costs come from probes on the newest pairs at hand."""
    project = Project.find(workflow.path.parent)
    store = open_store(project, workflow)
    lines: list[Line] = []
    changed: list[str] = []
    started = False
    for phase in PHASES:
        behind = [name for name in identity.INPUTS[phase] if name in changed]
        state = StageState(phase, tuple(f"{name} runs again" for name in behind)) if behind else store.state(phase)
        if not state.changed:
            lines.append(Line(phase, state, costs.Cost(seconds=0.0)))
            continue
        changed.append(phase)
        lines.append(Line(phase, state, costs.predict(phase, store, starts_ray=not started)))
        started = started or phase in costs.ON_RAY
    return store, lines


def text(store: Store, lines: Sequence[Line]) -> str:
    """The plan as a table."""
    out = [
        f"plan of {store.name} ({digest.short(store.workflow.digest)})",
        "",
        f"  {'phase':<9} {'':<7} {'rows':>9} {'steps':>7} {'time':>12} {'memory':>10} {'writes':>10}  why",
    ]
    for line in lines:
        c = line.cost
        word = "runs" if line.state.changed else "cached"
        time = duration(c.seconds) if c.seconds is not None and line.state.changed else ""
        numbers = f"{_count(c.rows):>9} {_count(c.steps):>7} {time:>12} {_size(c.memory_bytes):>10} {_size(c.written_bytes):>10}"
        out.append(f"  {line.phase:<9} {word:<7} {numbers}  {'; '.join(line.state.reasons[:4])}".rstrip())
    total = sum(line.cost.seconds or 0.0 for line in lines)
    unknown: dict[str, list[str]] = {}
    for line in lines:
        if line.state.changed and line.cost.seconds is None:
            unknown.setdefault(line.cost.unmeasured or "nothing to measure on yet", []).append(line.phase)
    without = "".join(f"; without {', '.join(phases)}: {why}" for why, phases in unknown.items())
    out += ["", f"  {duration(total)} expected{without}"]
    return "\n".join(out)


def _count(value: int | None) -> str:
    return f"{value:,}" if value is not None else ""


def _size(value: int | None) -> str:
    return f"{value / 2**20:,.0f} MiB" if value and value >= 2**20 else "< 1 MiB" if value else ""
