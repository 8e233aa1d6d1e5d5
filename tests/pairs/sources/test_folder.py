"""A folder of pictures with a table: nothing outside the folder is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from diptych.core.errors import DataError
from diptych.pairs.ingest import IngestConfig, ingest_all
from diptych.pairs.sources import folder
from diptych.pairs.sources.folder import Config

from ..conftest import picture

LENIENT = IngestConfig(max_bad_share=1.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    (place / "sub").mkdir(parents=True)
    (place / "a.png").write_bytes(picture((1, 0, 0)))
    (place / "sub" / "b.png").write_bytes(picture((2, 0, 0)))
    (tmp_path / "secret.png").write_bytes(picture((3, 0, 0)))
    (place / "link.png").symlink_to(tmp_path / "secret.png")
    return place


def test_csv(root: Path, tmp_path: Path) -> None:
    (root / "captions.csv").write_text('file,caption,label\na.png,"one, with comma",4\nsub/b.png,two,5\n')
    dataset = ingest_all(pickle.loads(pickle.dumps(Config(path=str(root)).build())), tmp_path / "out")
    assert dataset.read()["key"].to_list() == ["a.png", "sub/b.png"]
    assert dataset.read()["captions"][0][0]["text"] == "one, with comma"
    assert dataset.read()["label"].to_list() == [4, 5]
    assert dataset.reader().read_column(dataset.read()["image"]) == [picture((1, 0, 0)), picture((2, 0, 0))]


def test_columns_of_numbers_in_a_csv_are_numbers(root: Path, tmp_path: Path) -> None:
    head = "file,caption,punsafe,label,year,id,photo,note\n"
    (root / "captions.csv").write_text(f"{head}a.png,12,0.25,0,,007,12345678901234567890,x\nsub/b.png,two,1,3,-1999,12,1,2\n")
    row = ingest_all(Config(path=str(root)).build(), tmp_path / "out").read()
    assert row["captions"][0][0]["text"] == "12"
    assert row["meta.punsafe"].to_list() == [0.25, 1.0]
    assert row["label"].to_list() == [0, 3]
    assert row["meta.year"].to_list() == [None, -1999]
    assert row["meta.id"].to_list() == ["007", "12"]
    assert row["meta.photo"].to_list() == ["12345678901234567890", "1"]
    assert row["meta.note"].to_list() == ["x", "2"]


def test_jsonl_and_tsv(root: Path, tmp_path: Path) -> None:
    rows = [{"file": "a.png", "id": 9, "short": "one", "long": ["uno", "eins"], "label": 3, "split": "test"}]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = ingest_all(Config(path=str(root), table="t.jsonl", key="id", captions=("short", "long")).build(), tmp_path / "out")
    assert dataset.read(["key", "split", "label"]).rows() == [("9", "test", 3)]
    assert [caption["text"] for caption in dataset.read()["captions"][0]] == ["one", "uno", "eins"]
    (root / "t.tsv").write_text("file\tcaption\na.png\tone\n")
    assert len(ingest_all(Config(path=str(root), table="t.tsv").build(), tmp_path / "tsv")) == 1


def test_paths_that_leave_the_folder(root: Path, tmp_path: Path) -> None:
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "sub/../../secret.png", "none.png", "sub", "a.png/x", ""]
    lines = [json.dumps({"file": name, "caption": "t"}) for name in [*names, "nul\0.png"]]
    (root / "t.jsonl").write_text("\n".join(lines))
    dataset = ingest_all(Config(path=str(root), table="t.jsonl").build(), tmp_path / "out", config=LENIENT)
    assert len(dataset) == 0
    assert dataset.rejects()["reason"].to_list() == [
        *["path leaves the folder"] * 4, "missing image file", "image file cannot be read", "missing image file", "image file cannot be read", "image file cannot be read"
    ]  # fmt: skip


def test_broken_rows(root: Path, tmp_path: Path) -> None:
    (root / "t.jsonl").write_bytes(
        b'{"file": "a.png", "caption": "caf\xe9"}\n{"file": \n[1]\n{"caption": "t"}\n{"file": "sub/b.png", "caption": null}\n'
    )
    dataset = ingest_all(Config(path=str(root), table="t.jsonl").build(), tmp_path / "out", config=LENIENT)
    assert dataset.rejects()["reason"].to_list() == [
        "caption is not valid UTF-8", "row is not JSON", "row is not a JSON object", "no image", "null caption"
    ]  # fmt: skip
    (root / "captions.csv").write_bytes(b"file,caption\na.png,one,more\nsub/b.png\n" + b"a.png," + b"x" * 1_000_000 + b"\n")
    dataset = ingest_all(Config(path=str(root)).build(), tmp_path / "csv", config=LENIENT)
    assert dataset.rejects()["reason"].to_list() == ["row has too many columns", "null caption", "caption too long"]


def test_parts_are_runs_of_rows(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PART_ROWS", 2)
    rows = [{"file": "a.png", "caption": "t", "id": str(index)} for index in range(5)]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Config(path=str(root), table="t.jsonl", key="id").build()
    assert list(source.parts()) == ["00000", "00001", "00002"]
    assert ingest_all(source, tmp_path / "out").read()["key"].to_list() == list("01234")


def test_wrong_tables(root: Path) -> None:
    (root / "t.csv").write_text("picture,words\na.png,one\n")
    (root / "open.csv").write_text('file,caption\na.png,"never closed\n')
    (root / "t.xls").touch()
    (root / "head.csv").write_text("file,caption\n")
    (root / "semicolons.csv").write_text("file;caption\na.png;one\n")
    (root / "folder.csv").mkdir()
    for table, message in (
        ("none.csv", "is not there(.|\n)*the folder holds folder.csv, head.csv, open.csv, semicolons.csv, t.csv"),
        ("folder.csv", "cannot be read(.|\n)*Is a directory"),
        ("head.csv", "names no picture"),
        ("t.csv", "lacks columns(.|\n)*set `file` and `captions`"),
        ("semicolons.csv", "lacks columns(.|\n)*another separator"),
        ("t.xls", "unknown kind"),
        ("open.csv", "not valid CSV"),
    ):
        with pytest.raises(DataError, match=message):
            Config(path=str(root), table=table).build().parts()
    with pytest.raises(DataError, match="There is no folder of pictures here"):
        Config(path=str(root / "gone")).build().parts()
