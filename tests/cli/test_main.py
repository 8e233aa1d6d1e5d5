"""The command line: every verb explains itself and fails kindly."""

from __future__ import annotations

from pathlib import Path

import pytest

from diptych.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "verb",
    [
        "run",
        "plan",
        "evaluate",
        "claim",
        "compare",
        "trace",
        "methods",
        "data",
        "submit",
        "ui",
        "doctor",
        "completion",
        "data ingest",
        "data diff",
    ],
)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: diptych {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "quickstrat"], 2, ["did you mean 'quickstart.yaml'?"]),
        (["run", "tiny", "train.optimizer.lrr=1"], 2, ["train.optimizer.lrr", "did you mean 'lr'?"]),
        (["run", "tiny", "--until", "trian"], 2, ["did you mean 'train'?"]),
        (["run", "tiny", "train.workers=999", "train.batch_size=999"], 4, ["More workers than cores"]),
        (["methods", "metaclp"], 2, ["did you mean 'metaclip'?"]),
        (["claim", "metacip"], 2, ["did you mean 'metaclip'?"]),
        (["compare", "one"], 2, ["two runs"]),
        (["compare", "nothing", "here"], 2, ["There is no evaluated run"]),
        (["trace", "no-such-thing"], 2, ["Nothing of that name"]),
        (["data", "show", "no-such-set"], 2, ["There is no such pair dataset"]),
        (["data", "ingest", "parqet", "out"], 2, ["did you mean 'parquet'?"]),
        (["data", "ingest", "parquet", "out"], 2, ["path", "required"]),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    arguments: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert "Traceback" not in error


def test_values_may_stand_behind_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", "--until", "caption", "train.optimizer.lrr=1"]) == 2
    assert "train.optimizer.lrr" in capsys.readouterr().err
    for arguments, said in (
        (["run", "tiny", "--until", "caption", "seed=1", "--bogus"], "unrecognized arguments: --bogus"),
        (["data", "show", "a", "b=c"], "unrecognized arguments: b=c"),
        (["plan"], "required: workflow\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(said if said.endswith("\n") else f"{said}\n")


def test_a_folder_of_the_workflows_name_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "photos.yaml").write_text("nmae: photos\n")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "photos"]) == 2
    assert "did you mean 'name'?" in capsys.readouterr().err


def test_outside_a_project_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "quickstart"]) == 2
    assert "This is not a Diptych project" in capsys.readouterr().err


def test_a_project_without_runs_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "workflows").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    for verb in (["data", "ls"], ["compare"]):
        assert main(verb) == 0
        assert "diptych run" in capsys.readouterr().out


def test_methods_show_parameters_defaults_and_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "metaclip"]) == 0
    out = capsys.readouterr().out
    assert "Demystifying CLIP Data" in out
    assert "threshold" in out
    assert "default" in out


def test_methods_show_the_keys_of_mappings_and_what_every_source_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "cfg-captioning"]) == 0
    out = capsys.readouterr().out
    assert "  endpoint: mapping | None, default None\n" in out
    assert "  endpoint.base_url: str, required\n" in out
    assert "Config" not in out
    assert main(["methods", "sources"]) == 0
    out = capsys.readouterr().out
    assert "  sources.NAME.card.licence: str" in out
    assert "  max_bad_share: float" in out
    assert main(["methods"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    starts = {len(line) - len(line[2:].partition(" ")[2].lstrip()) for line in lines}
    assert len(starts) == 1, "all in one column"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "diptych" in capsys.readouterr().out


def test_data_verbs_go_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "ingest", "digits", str(tmp_path / "a"), "pool=plain", "train=50"]) == 0
    assert main(["data", "show", str(tmp_path / "a"), "--verify"]) == 0
    assert "all checksums are right" in capsys.readouterr().out
    assert main(["data", "export", str(tmp_path / "a"), str(tmp_path / "tars"), "--to", "webdataset"]) == 0
    assert main(["data", "ingest", "webdataset", str(tmp_path / "b"), f"path={tmp_path}/tars/*.tar"]) == 0
    capsys.readouterr()
    assert main(["data", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "647 pairs -> 647 pairs" in capsys.readouterr().out
    assert main(["data", "browse", str(tmp_path / "a"), "--out", str(tmp_path / "a.html"), "--limit", "5"]) == 0
    assert "data:image" in (tmp_path / "a.html").read_text()
