"""The verb `compare`: pages and tables where one expects them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.workflow.evaluated import empty_project, figures, write_run

from diptych.cli.main import main


@pytest.fixture(autouse=True)
def in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = empty_project(tmp_path)
    write_run(project, "base", figures(1, 0.0))
    write_run(project, "claims/good", figures(2, 2.5))
    write_run(project, "odd", [*figures(3, 0.1)[:1], *figures(3, 0.1, templates="others")[1:]])
    monkeypatch.chdir(tmp_path)


def test_without_names_the_runs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 0
    assert capsys.readouterr().out.split() == ["base", "claims/good", "odd"]


def test_a_page_is_written_beside_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "base", "claims/good"]) == 0
    out = capsys.readouterr().out
    page = tmp_path / "runs/.compare/base--claims.good.html"
    assert "better on 2 of 2 figures" in out
    assert str(page) in out
    assert "10,000 resamples" in page.read_text()
    assert main(["compare"]) == 0
    assert ".compare" not in capsys.readouterr().out


def test_tables_and_page_go_where_they_are_asked_for(tmp_path: Path) -> None:
    files = [tmp_path / "out" / name for name in ("page.html", "table.csv", "table.tex")]
    arguments = [word for option, file in zip(("--html", "--csv", "--latex"), files, strict=True) for word in (option, str(file))]
    assert main(["compare", "base", "claims/good", "--resamples", "500", *arguments]) == 0
    assert all(file.stat().st_size for file in files)
    assert not (tmp_path / "runs/.compare").exists()


def test_unequal_figures_are_refused_and_common_ones_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "base", "claims/good", "odd"]) == 3
    error = capsys.readouterr().err
    assert "odd: s/zero-shot/log_loss, s/retrieval/median_rank" in error
    assert "templates differs" in error
    assert "--common" in error
    assert not (tmp_path / "runs/.compare").exists()
    assert main(["compare", "base", "claims/good", "odd", "--common"]) == 0
    assert "left out, 2" in capsys.readouterr().out


def test_a_single_run_and_senseless_resamples_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "base"]) == 2
    assert "two runs" in capsys.readouterr().err
    assert main(["compare", "base", "odd", "--common", "--resamples", "5"]) == 2
