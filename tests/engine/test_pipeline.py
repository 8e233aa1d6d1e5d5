"""The DVC calls that the adapter rests on: pinned here, so that an upgrade says what broke."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diptych.core.errors import ConfigError, ResourceError
from diptych.engine.pipeline import Pipeline

PHASES = ("first", "second")
TEXT = """
stages:
  first:
    foreach: [w]
    do:
      cmd: mkdir -p runs/${item}/first && cp code/a.txt runs/${item}/first/x
      deps: [code]
      params: [{"workflows/${item}.yaml": [seed]}]
      outs: ["runs/${item}/first"]
  second:
    foreach: [w]
    do:
      cmd: mkdir -p runs/${item}/second && cp runs/${item}/first/x runs/${item}/second/y
      deps: ["runs/${item}/first"]
      params: [{"workflows/${item}.yaml": [train]}]
      outs: ["runs/${item}/second"]
"""


def dvc(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dvc(tmp_path, "init", "--no-scm", "-q")
    (tmp_path / "dvc.yaml").write_text(TEXT)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.txt").write_text("one")
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "w.yaml").write_text("seed: 0\ntrain: {lr: 0.1}\n")
    return tmp_path


def work(folder: Path, pipeline: Pipeline, phase: str) -> None:
    out = folder / "runs/w" / phase
    out.mkdir(parents=True, exist_ok=True)
    source, name = (folder / "code/a.txt", "x") if phase == "first" else (folder / "runs/w/first/x", "y")
    (out / name).write_text(source.read_text())
    pipeline.save(phase)


def test_our_lock_is_the_lock_that_repro_leaves(folder: Path) -> None:
    pipeline = Pipeline(folder, "w", PHASES)
    with pipeline.locked():
        for phase in PHASES:
            assert pipeline.state(phase).changed
            work(folder, pipeline, phase)
            assert not pipeline.state(phase).changed
    ours = (folder / "dvc.lock").read_text()
    assert "up to date" in dvc(folder, "status")
    assert "didn't change" in dvc(folder, "repro")
    (folder / "dvc.lock").unlink()
    dvc(folder, "repro", "--force")
    assert (folder / "dvc.lock").read_text() == ours


def test_a_stage_that_never_ran_says_so(folder: Path) -> None:
    pipeline = Pipeline(folder, "w", PHASES)
    with pipeline.locked():
        assert pipeline.state("first").reasons == ("never ran",)
        work(folder, pipeline, "first")
        assert pipeline.state("first").reasons == ()
        assert pipeline.state("second").reasons == ("never ran",)


def test_code_that_is_not_there_is_refused_before_the_work(folder: Path) -> None:
    (folder / "code").rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match="not in this project") as refused:
        Pipeline(folder, "w", PHASES)
    (problem,) = refused.value.problems
    assert problem.got == "'no code'"
    assert problem.fix.startswith("ln -s ")


def test_reasons_name_the_parameter_and_the_folder(folder: Path) -> None:
    dvc(folder, "repro")
    (folder / "workflows/w.yaml").write_text("seed: 0\ntrain: {lr: 0.2}\n")
    pipeline = Pipeline(folder, "w", PHASES)
    with pipeline.locked():
        assert pipeline.state("first").reasons == ()
        assert any("workflows/w.yaml: train" in reason for reason in pipeline.state("second").reasons)
    (folder / "code/a.txt").write_text("two")
    pipeline = Pipeline(folder, "w", PHASES)
    with pipeline.locked():
        assert "code modified" in pipeline.state("first").reasons


def test_a_lost_output_is_checked_out_of_the_cache(folder: Path) -> None:
    dvc(folder, "repro")
    (folder / "runs/w/first/x").unlink()
    (folder / "runs/w/first").rmdir()
    pipeline = Pipeline(folder, "w", PHASES)
    with pipeline.locked():
        state = pipeline.state("first")
        assert all(reason.startswith("output ") for reason in state.reasons)
        assert pipeline.restore("first")
        assert (folder / "runs/w/first/x").read_text() == "one"


def test_a_workflow_that_is_not_listed_and_a_broken_file_are_config_errors(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"add .other. to .workflows. at the top of dvc\.yaml"):
        Pipeline(folder, "other", PHASES)
    with pytest.raises(ConfigError, match="lacks stages"):
        Pipeline(folder, "w", ("first", "third", "second"))
    (folder / "dvc.yaml").write_text("stages: {a: {cmdd: x}}\n")
    with pytest.raises(ConfigError, match="DVC cannot read"):
        Pipeline(folder, "w", PHASES)


def test_a_second_run_in_the_same_folder_is_refused(folder: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from diptych.engine.pipeline import Pipeline\n"
        f"p = Pipeline(Path({str(folder)!r}), 'w', {PHASES!r})\n"
        "with p.locked():\n    print('held', flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match="Another run"), Pipeline(folder, "w", PHASES).locked():
            pass
        other.stdin.write("\n")
        other.stdin.close()
        other.wait(timeout=20)
