"""Stop it anywhere: Ctrl-C, SIGTERM, a killed driver. The same command goes on, and what comes out is the same to the bit."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from tests.integration import commands
from tests.integration.commands import Results
from tests.integration.conftest import Diptych, copied, forget

from diptych.workflow.spec import PHASES

pytestmark = pytest.mark.timeout(900)


def test_a_killed_training_in_process_goes_on_from_its_checkpoint(before_training: Path, diptych: Diptych, expected: Results) -> None:
    project = before_training
    command = diptych(project, "run", "pool", "--in-process")
    command.until(lambda: commands.steps_logged(project) > 45, "step 45").kill()
    command = diptych(project, "run", "pool", "--in-process").done()
    found = re.search(r"training continues from the checkpoint of step (\d+)", command.text)
    assert found, command.text
    assert 40 <= int(found[1]) < 150
    assert f"from step {found[1]} on" in command.text
    assert Results.of(project / "runs/pool") == expected
    assert not list((project / "runs/.scratch").glob("pool/*")), "nothing is kept of a training that is done"
    assert commands.parent_statuses(project)[-2:] == ["KILLED", "FINISHED"]


@pytest.mark.faults
def test_a_training_on_ray_that_is_stopped_in_three_ways_is_the_uninterrupted_one(
    before_training: Path, diptych: Diptych, tmp_path: Path
) -> None:
    project = before_training
    # Long enough that it cannot end by itself while it is being stopped.
    variation = ("run", "pool", "train.steps=4000", "train.checkpoint_every_steps=100", "--until", "train")
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        step = commands.steps_logged(project) + 150  # past a checkpoint, and more than the run before had done
        command = diptych(project, *variation)
        command.until(lambda step=step: commands.steps_logged(project) > step, f"step {step}")
        if how == signal.SIGKILL:
            command.kill()
        else:
            command.stop(how)
        assert len(commands.checkpoints(project)) in (1, 2)
        assert not list(project.glob("runs/pool+*/.records/train.json"))
    command = diptych(project, *variation).done()
    assert "training continues from the checkpoint of step" in command.text
    command.leaves_nobody()
    assert commands.parent_statuses(project)[-4:] == ["KILLED", "KILLED", "KILLED", "FINISHED"]
    (resumed,) = (project / "runs").glob(f"pool+*/{commands.WEIGHTS}")
    model = resumed.read_bytes()
    resumed.parent.rename(tmp_path / "resumed")
    assert "continues" not in diptych(project, *variation, "--in-process").done().text
    assert resumed.read_bytes() == model


@pytest.mark.faults
def test_two_training_workers_whose_driver_is_killed_make_the_same_model(before_training: Path, diptych: Diptych, tmp_path: Path) -> None:
    project = before_training
    variation = ("run", "pool", "train.workers=2", "train.steps=60", "--until", "train")
    command = diptych(project, *variation)
    command.until(lambda: commands.steps_logged(project) > 25, "step 25").kill()
    diptych(project, *variation).done().leaves_nobody()
    (resumed,) = (project / "runs").glob(f"pool+*/{commands.WEIGHTS}")
    model = resumed.read_bytes()
    resumed.parent.rename(tmp_path / "resumed")
    command = diptych(project, *variation).done()
    assert "continues" not in command.text
    assert resumed.read_bytes() == model


@pytest.mark.faults
def test_passes_that_are_stopped_in_three_ways_give_the_uninterrupted_pairs(fresh: Path, diptych: Diptych, expected: Results) -> None:
    project = fresh
    runs = project / "runs/pool"
    command = diptych(project, "run", "pool", "--until", "caption")
    command.until(lambda: list(runs.glob("ingest.partial*/shards/*.tar")), "the first shard").stop(signal.SIGINT)
    assert not (runs / "ingest").exists()
    assert not commands.unfinished(project), "a run that is stopped leaves nothing half done"
    assert commands.parent_statuses(project) == ["KILLED"]

    command = diptych(project, "run", "pool", "--until", "caption")
    command.until(lambda: commands.pieces(project, "features-*.arrow"), "the first table of features").kill()
    assert not (runs / "prune").exists()
    finished = commands.pieces(project, "features-*.arrow")
    command = diptych(project, "run", "pool", "--until", "caption")
    command.until(lambda: commands.pieces(project, "decided-*.arrow"), "the first verdict").stop(signal.SIGTERM)
    assert finished
    assert "prune continues from" in command.text
    assert not (runs / "prune").exists()
    assert not commands.unfinished(project)

    command = diptych(project, "run", "pool", "--until", "caption").done()
    assert "prune continues from" in command.text
    command.leaves_nobody()
    assert commands.pairs_of(runs) == expected.datasets
    assert not list((project / "runs/.scratch").glob("pool/*")), "pieces are kept only until their dataset is whole"
    assert commands.parent_statuses(project) == ["KILLED", "KILLED", "KILLED", "FINISHED"]


def test_what_a_killed_writer_left_is_tidied_and_a_lost_output_is_back(reference: Path, tmp_path: Path, diptych: Diptych) -> None:
    project = copied(reference, tmp_path / "project")
    runs = project / "runs/pool"
    forget(project, "ingest")
    command = diptych(project, "run", "pool", "--in-process")
    command.until(lambda: list(runs.glob("ingest.partial*/shards/*.tar")), "the first shard").kill()
    (partial,) = runs.glob("ingest.partial*")
    # What is left by a death between the two renames that replace an output: of a pair dataset, and of a model.
    (runs / "caption").rename(runs / "caption.old-77-0a1b2c3d")
    (runs / "train").rename(runs / ".train.x1y2.replaced")
    command = diptych(project, "run", "pool", "--in-process").done()
    for name in (partial.name, "caption.old-77-0a1b2c3d", ".train.x1y2.replaced"):
        assert f"tidied {name}" in command.text
    assert re.findall(r"^(\w+) +starting", command.text, re.M) == ["ingest"], "its pairs are the same, so all else is still good"
    assert {path.name for path in runs.iterdir() if path.is_dir()} == {".records", *PHASES}
    assert Results.of(runs) == Results.of(reference / "runs/pool")
