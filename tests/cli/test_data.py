"""How the data verbs find a dataset, and what they print of it."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest

from diptych.cli.main import main
from diptych.pairs.manifest import PhaseRecord
from diptych.pairs.shards import ShardWriter
from diptych.pairs.write import DatasetWriter

from ..pairs.conftest import picture, rows


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dataset(folder: Path, keys: list[str]) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with DatasetWriter(folder, PhaseRecord(phase="ingest", seed=0), pairs_in=len(keys)) as writer:
        shards = ShardWriter(writer.shards_folder, "images")
        places = [shards.add(key, "png", picture((index, 1, 2))) for index, key in enumerate(keys)]
        writer.add_shards(shards.done())
        writer.add(rows(places, keys), None)
        writer.finish()
    return folder


@pytest.mark.parametrize("name", ["album/ingest", "runs/album/ingest", "runs/album/ingest/"])
def test_a_run_that_is_a_variation_is_found_by_the_name_of_its_workflow(
    project: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = dataset(project / "runs/album+222222/ingest", ["a", "b"])
    for other in ("album+111111", "albums+333333"):
        older = dataset(project / f"runs/{other}/ingest", ["a"]) / "manifest.json"
        os.utime(older, ns=(0, (newest / "manifest.json").stat().st_mtime_ns - 10**9))
    assert main(["data", "show", name]) == 0
    said = capsys.readouterr()
    assert "2 in, 2 kept" in said.out
    assert said.err == "album/ingest: taken from album+222222/ingest, the newest run of that workflow\n"
    dataset(project / "runs/album/ingest", ["a", "b", "c"])
    assert main(["data", "show", name]) == 0
    said = capsys.readouterr()
    assert "3 in, 3 kept" in said.out
    assert not said.err


def test_a_project_without_datasets_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "album/ingest"]) == 2
    assert "manifest.json; this project has none yet" in capsys.readouterr().err


def test_an_ingest_replaces_a_dataset_and_nothing_else(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("photos", "other"):
        (project / folder).mkdir()
        (project / folder / "a.png").write_bytes(picture((1, 2, 3)))
        (project / folder / "captions.csv").write_text("file,caption\na.png,one\n")
    assert main(["data", "ingest", "folder", "photos", "path=photos"]) == 2
    assert "would replace what the source reads" in capsys.readouterr().err
    assert main(["data", "ingest", "folder", "other", "path=photos"]) == 2
    assert "Something lies where the output goes" in capsys.readouterr().err
    for folder in ("photos", "other"):
        assert sorted(path.name for path in (project / folder).iterdir()) == ["a.png", "captions.csv"]
    for _ in range(2):
        assert main(["data", "ingest", "folder", "set", "path=photos"]) == 0
    capsys.readouterr()
    assert main(["data", "export", "set", "tars"]) == 0
    assert main(["data", "ingest", "webdataset", "tars", "path=tars/*.tar"]) == 2
    assert main(["data", "ingest", "sources", "tars", "sources={a: {data: {source: webdataset, path: 'tars/*.tar'}}}"]) == 2
    assert capsys.readouterr().err.count("would replace what the source reads") == 2
    assert [path.name for path in (project / "tars").iterdir()] == ["train-00000.tar"]


def test_a_difference_names_the_method(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diptych.pairs.dataset import PairDataset

    a = PairDataset.open(dataset(project / "a", ["x", "y", "z"]))
    record = PhaseRecord(phase="prune", methods=({"method": "one"}, {"method": "two"}))
    with DatasetWriter(project / "b", record, [a.digest], a.manifest.shards, pairs_in=3, shards_root=a.root) as writer:
        table = a.table(0)
        gone = table.filter(pl.col("key") != "x").select(
            "key", "image", "captions", phase=pl.lit("prune"), method=pl.Series(["one", "two"]), reason=pl.lit("not drawn"),
            score=pl.lit(None, pl.Float32), twin=pl.lit(None, pl.String),
        )  # fmt: skip
        writer.add(table.filter(pl.col("key") == "x"), gone)
        writer.finish()
    assert main(["data", "diff", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(maxsplit=1)[1] for line in lines[1:]) == ["left: not drawn (one)", "left: not drawn (two)"]
