"""A small project of its own, for tests that run workflows: dvc.yaml, the package's code, one workflow on handwritten digits."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych.workflow import yaml

ROOT = Path(__file__).parents[1]

WORKFLOW: dict[str, Any] = {
    "name": "small",
    "seed": 0,
    "data": {"source": "digits", "train": 120},
    "curate": [{"method": "metaclip", "threshold": 20}],
    "prune": [{"method": "semantic-dedup", "epsilon": 0.01, "clusters": 4}, {"method": "concept-pruning", "keep": 0.9, "clusters": 4}],
    "caption": [{"method": "laclip", "rewriter": "lexicon", "copies": 2}],
    "train": {
        "model": "digits-16",
        "objective": {"method": "clip"},
        "optimizer": {"method": "adamw", "lr": 1.0e-3},
        "steps": 6,
        "batch_size": 16,
        "log_every": 1,
        "workers": 1,
    },
    "compress": [],
    "evaluate": {"benchmarks": [{"method": "zero-shot"}, {"method": "retrieval", "captions": "first", "pool": 50}], "sweep": None},
}


def write_workflow(folder: Path, data: Mapping[str, Any]) -> Path:
    """Writes a workflow's file."""
    path = folder / f"{data['name']}.yaml"
    path.write_text(yaml.dump(dict(data)))
    return path


def make_project(folder: Path, *workflows: Mapping[str, Any]) -> Path:
    """A DVC project with these workflows in an empty folder."""
    (folder / "workflows").mkdir(parents=True)
    for workflow in workflows:
        write_workflow(folder / "workflows", workflow)
    (folder / "platform").symlink_to(ROOT / "platform")
    text = (ROOT / "dvc.yaml").read_text()
    line = next(line for line in text.splitlines() if "workflows: [" in line)
    names = ", ".join(str(workflow["name"]) for workflow in workflows)
    (folder / "dvc.yaml").write_text(text.replace(line, f"  - workflows: [{names}]"))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(ROOT / ".dvcignore", folder / ".dvcignore")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder
