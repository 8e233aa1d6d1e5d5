"""A worker that dies under a run costs what it had in flight, and changes nothing of what comes out."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from tests.integration import commands
from tests.integration.commands import Command, Results
from tests.integration.conftest import Diptych

pytestmark = pytest.mark.timeout(900)


def kill_one(command: Command, name: str, ready: object) -> None:
    """`kill -9` of the first process of that name that is seen at work once `ready` is true."""
    victims: list[psutil.Process] = []

    def seen() -> bool:
        if callable(ready) and ready():
            victims.extend(command.family(name))
        return bool(victims)

    command.until(seen, f"a process {name}")
    victims[0].kill()


@pytest.mark.faults
def test_a_run_that_loses_workers_of_ray_data_and_ray_train_goes_on_by_itself(fresh: Path, diptych: Diptych, expected: Results) -> None:
    project = fresh
    command = diptych(project, "run", "pool")
    kill_one(command, "ray::MapBatches", lambda: commands.pieces(project, "features-*.arrow"))
    assert not (project / "runs/pool/prune").exists(), "it was in the middle of the pass"
    kill_one(command, "ray::RayTrainWorker", lambda: commands.steps_logged(project) > 35)
    assert not (project / "runs/pool/train").exists(), "it was in the middle of training"
    command.done().leaves_nobody()
    assert Results.of(project / "runs/pool") == expected
    resumed = re.search(r"pictures seen, .* from step (\d+) on", command.text)
    assert resumed, command.text
    assert int(resumed[1]) >= 30
    assert commands.parent_statuses(project) == ["FINISHED"]
