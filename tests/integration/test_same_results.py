"""Where a run takes place changes nothing of what comes out; and DVC and `diptych run` are two names for the same work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration import commands
from tests.integration.commands import Results
from tests.integration.conftest import Diptych, copied
from tests.projects import WORKFLOW, make_project

LIGHT = {**WORKFLOW, "name": "light", "curate": [], "prune": [{"method": "random-subset", "keep": 0.9}], "caption": []}


pytestmark = pytest.mark.timeout(900)


def repro(project: Path, target: str) -> str:
    """`dvc repro`, as a user types it with the project's environment active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    arguments = [sys.executable, "-m", "dvc", "repro", target]
    done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=commands.PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset gives a process fewer cores")
def test_one_core_with_ray_gives_what_one_process_gives(fresh: Path, diptych: Diptych, expected: Results) -> None:
    diptych(fresh, "run", "pool", "--until", "caption", core=0).done().leaves_nobody()
    assert commands.pairs_of(fresh / "runs/pool") == expected.datasets


def test_dvc_has_nothing_to_do_after_a_run(reference: Path, tmp_path: Path) -> None:
    project = copied(reference, tmp_path / "project")
    before = (project / "dvc.lock").read_bytes()
    printed = repro(project, "evaluate@pool")
    assert "Running stage" not in printed
    assert printed.count("didn't change, skipping") == 7, printed
    assert (project / "dvc.lock").read_bytes() == before


@pytest.mark.faults
def test_a_run_has_nothing_to_do_after_dvc_and_both_leave_the_same_lock(tmp_path: Path, diptych: Diptych) -> None:
    by_dvc, by_run = make_project(tmp_path / "dvc", LIGHT), make_project(tmp_path / "run", LIGHT)
    assert repro(by_dvc, "evaluate@light").count("Running stage") == 7
    lock = (by_dvc / "dvc.lock").read_bytes()
    assert "everything cached" in diptych(by_dvc, "run", "light").done().text
    assert (by_dvc / "dvc.lock").read_bytes() == lock
    diptych(by_run, "run", "light", "--in-process").done()
    assert (by_run / "dvc.lock").read_bytes() == lock
