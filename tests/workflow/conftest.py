"""A small project of its own: dvc.yaml, the package's code, one workflow on handwritten digits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diptych.workflow import yaml

ROOT = Path(__file__).parents[2]

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


def write_workflow(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / f"{data['name']}.yaml"
    path.write_text(yaml.dump(data))
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with the workflow `small`."""
    (tmp_path / "workflows").mkdir()
    write_workflow(tmp_path / "workflows", WORKFLOW)
    (tmp_path / "platform").symlink_to(ROOT / "platform")
    text = (ROOT / "dvc.yaml").read_text()
    line = next(line for line in text.splitlines() if "workflows: [" in line)
    (tmp_path / "dvc.yaml").write_text(text.replace(line, "  - workflows: [small]"))
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(ROOT / ".dvcignore", tmp_path / ".dvcignore")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path
