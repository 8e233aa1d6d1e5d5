"""What a killed writer leaves is mended, an output is replaced whole or not at all, and a full disk is called one."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from diptych.core.errors import DataError, ResourceError
from diptych.pairs import files


def interrupted(out: Path) -> None:
    with files.replacing(out) as partial:
        (partial / "file").write_text("newer")
        raise KeyboardInterrupt


Usage = namedtuple("Usage", "total used free")


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_sweep_deletes_what_is_unfinished_and_leaves_everything_else(tmp_path: Path) -> None:
    kept = ("ingest", ".records", "report.html.partially", "prune.older-1-a")
    for name in ("ingest.partial-12-0a1b2c3d", "evaluate.partial", ".train.x_1y2.partial", *kept):
        folder_with(tmp_path / name, name)
    (tmp_path / "table.partial").write_text("a file")
    assert set(files.sweep(tmp_path)) == {"ingest.partial-12-0a1b2c3d", "evaluate.partial", ".train.x_1y2.partial", "table.partial"}
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    assert files.sweep(tmp_path) == []


def test_sweep_puts_back_the_newest_of_what_was_moved_away(tmp_path: Path) -> None:
    for age, name in enumerate(("prune.old-9-00000002", "prune.old-5-00000001", ".train.ab_c.replaced")):
        folder_with(tmp_path / name, name)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"prune", "train"}
    assert (tmp_path / "prune/file").read_text() == "prune.old-9-00000002"


def test_sweep_drops_what_was_moved_away_once_its_successor_stands(tmp_path: Path) -> None:
    folder_with(tmp_path / "prune.old-9-0a1b2c3d", "old")
    folder_with(tmp_path / "prune", "new")
    assert files.sweep(tmp_path) == ["prune.old-9-0a1b2c3d"]
    assert [path.name for path in tmp_path.iterdir()] == ["prune"]
    assert (tmp_path / "prune/file").read_text() == "new"


def test_sweep_knows_the_names_that_publish_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death between the two renames of `publish`, and one before them."""
    out = folder_with(tmp_path / "out", "old")
    partial = folder_with(files.partial_of(out), "new")
    rename = Path.rename

    class DeathError(BaseException):
        pass

    def dies(path: Path, target: Path) -> Path:
        if path == partial or target == out:
            raise DeathError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(DeathError):
        files.publish(partial, out)
    monkeypatch.undo()
    assert not out.exists()
    assert len(files.sweep(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "old"


def test_nothing_to_sweep_where_there_is_no_folder(tmp_path: Path) -> None:
    assert files.sweep(tmp_path / "none") == []


def test_replacing_shows_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    out = folder_with(tmp_path / "out", "old")
    with files.replacing(out) as partial:
        (partial / "file").write_text("new")
        assert (out / "file").read_text() == "old"
    assert (out / "file").read_text() == "new"
    with pytest.raises(KeyboardInterrupt):
        interrupted(out)
    assert (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def wrapped(error: Exception) -> Exception:
    outer = ValueError("a library's own words")
    outer.__cause__ = error
    return outer


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error", [FULL, wrapped(FULL), RuntimeError("I/O error: No space left on device (os error 28)"), OSError(errno.EDQUOT, "over quota")]
)
def test_a_full_disk_is_known_whoever_met_it(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ResourceError, match="The disk is full") as caught, files.full_disk_explained(tmp_path / "runs"):
        raise error
    assert caught.value.__cause__ is error
    assert "bytes free" in str(caught.value)


def test_a_write_that_only_failed_is_a_full_disk_where_nothing_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    with pytest.raises(RuntimeError, match="file write failed"), files.full_disk_explained(tmp_path):
        raise silent
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    with pytest.raises(ResourceError, match="The disk is full"), files.full_disk_explained(tmp_path):
        raise silent


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    refused = DataError.at("A table is damaged", tmp_path, "No space left on device", "a table")
    with pytest.raises(DataError), files.full_disk_explained(tmp_path):
        raise refused
    with pytest.raises(PermissionError), files.full_disk_explained(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(KeyboardInterrupt), files.full_disk_explained(tmp_path):
        raise KeyboardInterrupt
