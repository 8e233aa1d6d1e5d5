"""What outputs say of themselves: the figures of a phase whose record is not here, because its output came through DVC.

A record lies beside the outputs and stays on the machine that made them. Counts, ledgers, metrics and sweeps are told by the outputs;
seconds, memory, curves and what compressors found are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diptych.engine import evaluation
from diptych.pairs.dataset import PairDataset
from diptych.workflow import identity
from diptych.workflow.phases import ledger, pair_figures
from diptych.workflow.results import SWEEP_SUMMARY, Result
from diptych.workflow.spec import PAIR_PHASES

Figures = dict[str, Any]


def figures(phase: str, folder: Path) -> Figures:
    """The figures of a phase, from its output in `folder`. Raises DataError if a dataset there is damaged."""
    return _READ[phase](folder)


def _train(folder: Path) -> Figures:
    lineage = json.loads((folder / "lineage.json").read_text())
    told = {name: lineage[name] for name in ("steps", "samples_seen") if name in lineage}
    return {**told, "digest": identity.of_output(folder)}


def _compress(folder: Path) -> Figures:
    methods = [str(config["method"]) for config in json.loads((folder / "lineage.json").read_text()).get("compress", [])]
    return {**({"report": {method: {} for method in methods}} if methods else {}), "digest": identity.of_output(folder)}


def _evaluate(folder: Path) -> Figures:
    summary = folder / SWEEP_SUMMARY
    metrics = evaluation.figures(Result(folder.parent.name, folder.parent).metrics())
    return {"metrics": metrics, "sweep": json.loads(summary.read_text()) if summary.exists() else None}


_READ: Mapping[str, Callable[[Path], Figures]] = {
    "ingest": lambda folder: ledger(PairDataset.open(folder)),
    **dict.fromkeys(PAIR_PHASES, lambda folder: pair_figures(PairDataset.open(folder))),
    "train": _train,
    "compress": _compress,
    "evaluate": _evaluate,
}
