"""A small project of its own: dvc.yaml, the package's code, one workflow on handwritten digits."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.projects import WORKFLOW, make_project, write_workflow

__all__ = ["WORKFLOW", "write_workflow"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with the workflow `small`."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_project(tmp_path, WORKFLOW)
