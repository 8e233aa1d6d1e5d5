"""What cannot go well is refused in a sentence, with its exit code, before anything is started."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
from tests.integration import commands
from tests.integration.conftest import Diptych, copied
from tests.projects import WORKFLOW, make_project, write_workflow

MISTAKEN = {
    **WORKFLOW,
    "name": "mistaken",
    "sede": 1,
    "prune": [{"method": "semantic-dedupe", "epsilon": 0.01}],
    "curate": [{"method": "metaclip", "threshold": "many"}],
    "train": {**WORKFLOW["train"], "model": "digits-61", "optimizer": {"method": "adamw", "learning_rate": 1}},
}

pytestmark = pytest.mark.timeout(900)


def test_five_mistakes_are_refused_together_and_nothing_is_started(tmp_path: Path, diptych: Diptych) -> None:
    project = make_project(tmp_path / "project", WORKFLOW)
    write_workflow(project / "workflows", MISTAKEN)
    command = diptych(project, "run", "mistaken").done(2)
    for mistake in ("sede", "semantic-dedupe", "curate.0.threshold", "digits-61", "learning_rate"):
        assert mistake in command.text, command.text
    assert "did you mean 'semantic-dedup'?" in command.text
    assert "did you mean 'digits-16'?" in command.text
    assert not (project / "runs").exists()
    assert not (project / "mlflow.db").exists()
    command.leaves_nobody()


def test_more_workers_than_cores_are_refused_and_nothing_hangs(tmp_path: Path, diptych: Diptych) -> None:
    project = make_project(tmp_path / "project", WORKFLOW)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = diptych(project, "run", "small", "train.workers=4096", "train.batch_size=4096").done(4)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "More workers than cores" in command.text
    assert "train.workers" in command.text
    assert not (project / "runs").exists()
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 5, "seconds of the processor"


def shortened(table: Path) -> None:
    table.write_bytes(table.read_bytes()[:-1])


def changed(table: Path) -> None:
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)


def off(table: Path) -> None:
    """The table is as it was; the manifest says otherwise."""
    path = table.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tables"][0]["sha256"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [shortened, changed, off])
def test_an_input_that_is_not_what_its_manifest_says_is_refused_with_its_file(
    reference: Path, tmp_path: Path, diptych: Diptych, damage: object
) -> None:
    project = copied(reference, tmp_path / "project")
    table = project / "runs/pool/curate/pairs-00000.parquet"
    assert callable(damage)
    damage(table)
    command = diptych(project, "phase", "prune", "workflows/pool.yaml").done(3)
    assert str(table) in command.text, command.text
    assert "as the manifest says" in command.text
    assert not commands.unfinished(project)
    command.leaves_nobody()


def test_a_damaged_output_is_found_and_made_whole_again(reference: Path, tmp_path: Path, diptych: Diptych) -> None:
    project = copied(reference, tmp_path / "project")
    changed(project / "runs/pool/prune/pairs-00000.parquet")
    diptych(project, "run", "pool", "--in-process").done()
    assert commands.pairs_of(project / "runs/pool") == commands.pairs_of(reference / "runs/pool")


def test_a_second_run_in_the_same_place_is_refused_while_the_first_is_at_work(before_training: Path, diptych: Diptych) -> None:
    project = before_training
    shutil.rmtree(project / "runs/.cache", ignore_errors=True)
    first = diptych(project, "run", "pool", "train.steps=100000", "--in-process")
    first.until(lambda: commands.steps_logged(project) > 1, "the first steps")
    second = diptych(project, "run", "pool", "train.steps=100000", "--in-process").done(4)
    assert "Another run is at work on the same outputs" in second.text
    assert f"process {first.process.pid} on" in second.text
    first.kill()
