"""What a phase's output depends on: its parameters, its inputs, and the code that ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diptych
from diptych.core import digest

ROOMS: Mapping[str, tuple[str, ...]] = {
    "ingest": ("core", "pairs"),
    "curate": ("core", "pairs", "curate"),
    "prune": ("core", "pairs", "prune"),
    "caption": ("core", "pairs", "models", "caption"),
    "train": ("core", "pairs", "models", "objectives", "optimizers", "train"),
    "compress": ("core", "pairs", "models", "compress", "adapt"),
    "evaluate": ("core", "pairs", "models", "evaluate", "adapt"),
}
"""The code folders of each phase (the same list stands in `dvc.yaml`, and a test compares them)."""

INPUTS: Mapping[str, tuple[str, ...]] = {
    "ingest": (),
    "curate": ("ingest",),
    "prune": ("curate",),
    "caption": ("prune",),
    "train": ("caption",),
    "compress": ("train", "caption"),
    "evaluate": ("compress", "ingest"),
}
"""The phases whose outputs each phase reads. Evaluation reads what came in, never what was curated."""


@cache
def code(phase: str) -> str:
    """The digest of a phase's code folders."""
    package = Path(diptych.__file__).parent
    return digest.of_plain([[room, digest.of_tree(package / room)] for room in ROOMS[phase]])


def of_output(folder: Path) -> str:
    """The digest of a phase's output: a pair dataset by its manifest, anything else by its files."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        return digest.of_file(manifest)
    return digest.of_tree(folder)


def key(phase: str, params: Mapping[str, Any], inputs: Mapping[str, Path]) -> str:
    """The identity of a phase's output before it exists."""
    return digest.of_plain([phase, json.loads(json.dumps(params)), code(phase), {name: of_output(path) for name, path in inputs.items()}])
