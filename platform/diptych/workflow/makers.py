"""The records behind a run: its own, and for a phase that it took over, those of the run that made the output.

A variation records only the phases that it ran. A record's key is a digest over the outputs that the phase read, so the maker of a
missing input is the run whose recorded output gives that key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from typing import Any

from diptych.core import digest
from diptych.workflow.identity import INPUTS
from diptych.workflow.project import Project
from diptych.workflow.results import Result
from diptych.workflow.spec import PHASES

Record = dict[str, Any]


def records(project: Project, result: Result) -> dict[str, Record]:
    """The record of every phase behind a run, by phase in the order of the corridor; a phase whose maker is gone is missing."""
    found = {"evaluate": result.record("evaluate")}
    for phase in reversed(PHASES):
        if reader := found.get(phase):
            own = {name: record for name in INPUTS[phase] if (record := result.record(name))}
            known = {name: [found[name]] if name in found else _candidates(project, name, own) for name in INPUTS[phase]}
            found |= _read_by(reader, phase, known) or {**own, **found}
    return {phase: found[phase] for phase in PHASES if found.get(phase)}


def _candidates(project: Project, phase: str, own: Mapping[str, Record]) -> list[Record]:
    """The run's own record first, then every run's, one an output."""
    others = [json.loads(path.read_text()) for path in sorted(project.runs.glob(f"**/.records/{phase}.json"))]
    first = [own[phase]] if phase in own else []
    return [*first, *{record.get("output"): record for record in others}.values()]


def _read_by(reader: Record, phase: str, known: Mapping[str, list[Record]]) -> dict[str, Record]:
    """The records whose outputs `phase` read, by the key of its own record; empty where none fits."""
    for chosen in product(*known.values()):
        outputs = {name: record.get("output") for name, record in zip(known, chosen, strict=True)}
        if digest.of_plain([phase, reader.get("params"), reader.get("code"), outputs]) == reader.get("key"):
            return dict(zip(known, chosen, strict=True))
    return {}
