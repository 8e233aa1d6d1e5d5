"""A dataset is written whole or not at all, and says so when what it is given does not add up."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from diptych.core.errors import DataError, ResourceError
from diptych.pairs import files
from diptych.pairs.dataset import PairDataset
from diptych.pairs.keys import KeyIndex
from diptych.pairs.manifest import PhaseRecord, ShardEntry
from diptych.pairs.schema import REJECTS
from diptych.pairs.shards import ShardWriter
from diptych.pairs.write import DatasetWriter, parquet_bytes

from .conftest import picture, rows

PHASE = PhaseRecord(phase="prune", methods=({"method": "random-subset"},), seed=3)
PLACE = {"shard": "s", "offset": 512, "size": 3}
SHARDS = {"s": ShardEntry(uri="s3://bucket/s.tar", size_bytes=10240)}


def writer(out: Path, pairs_in: int | None = 2) -> DatasetWriter:
    return DatasetWriter(out, PHASE, ["sha256:parent"], SHARDS, pairs_in=pairs_in)


def left(*keys: str, reason: str = "near copy") -> pl.DataFrame:
    return pl.DataFrame(
        {"key": keys, "phase": "prune", "method": "m", "reason": reason, "score": 0.5, "image": None, "captions": None, "twin": None},
        schema=REJECTS,
    )


def write(out: Path, *tables: tuple[pl.DataFrame, pl.DataFrame | None], pairs_in: int | None = None) -> PairDataset:
    with writer(out, pairs_in) as opened:
        for kept, rejected in tables:
            opened.add(kept, rejected)
        return opened.finish()


def fill(out: Path) -> None:
    with writer(out) as opened, ShardWriter(opened.shards_folder, "images") as shards:
        for index in range(64):
            shards.add(f"k{index}", "png", os.urandom(4096))
        shards.done()


def interrupt(out: Path) -> None:
    with writer(out) as opened:
        opened.add(rows([PLACE], ["new"]), None)
        raise KeyboardInterrupt


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with writer(tmp_path / "out", pairs_in=4) as out:
        out.add(rows([PLACE], ["a"], zeta=[1], label=[4]), left("x"))
        out.add(rows([PLACE], ["a"]).clear(), left("y", reason="blurred"))
        out.add(rows([PLACE], ["b"], label=[5]), None)
        dataset = out.finish()
    assert len(dataset) == 2
    assert dataset.read().columns == ["key", "image", "captions", "split", "label", "zeta"]
    assert dataset.read(["key", "label", "zeta"]).rows() == [("a", 4, 1), ("b", 5, None)]
    assert [path.name for path in dataset.tables()] == ["pairs-00000.parquet", "pairs-00001.parquet"]
    assert dataset.table(1)["key"].to_list() == ["b"]
    assert dataset.rejects()["reason"].to_list() == ["near copy", "blurred"]
    assert [(entry.reason, entry.count) for entry in dataset.manifest.ledger.left] == [("blurred", 1), ("near copy", 1)]
    assert PairDataset.open(dataset.root, verify=True).digest == dataset.digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_dataset(tmp_path: Path) -> None:
    with writer(tmp_path / "out", pairs_in=1) as out:
        out.add(rows([PLACE], ["a"]).clear(), left("a"))
        dataset = out.finish()
    assert len(dataset) == 0
    assert dataset.read().height == 0
    assert dataset.scan().collect().columns == ["key", "image", "captions", "split"]


def test_ledger_must_add_up(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lost or invented"):
        write(tmp_path / "out", (rows([PLACE], ["a"]), left("b")), pairs_in=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", [False, True])
def test_keys_are_unique(tmp_path: Path, split: bool) -> None:
    tables = [rows([PLACE], ["a"])] * 2 if split else [rows([PLACE] * 2, ["a", "a"])]
    with pytest.raises(DataError, match="Keys are not unique"):
        write(tmp_path / "out", *((table, None) for table in tables))


def test_rows_must_fit_the_schema(tmp_path: Path) -> None:
    good = rows([PLACE], ["a"])
    caption = pl.lit([{"text": "t", "source": "rumour", "score": None}], dtype=good.schema["captions"])
    bad = {
        "lacks columns": good.drop("split"),
        "wrong type": good.with_columns(image=pl.lit("here")),
        "without a value": good.with_columns(split=pl.lit(None, pl.String)),
        "too long": good.with_columns(key=pl.lit("k" * 513)),
        "no known kind": good.with_columns(captions=caption),
    }
    for message, frame in bad.items():
        with pytest.raises(DataError, match=message), writer(tmp_path / "out") as out:
            out.add(frame, None)


def test_tables_must_agree_about_types(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="disagree about a column"):
        write(tmp_path / "out", (rows([PLACE], ["a"], label=[1]), None), (rows([PLACE], ["b"], label=["one"]), None))


def test_null_column_takes_the_type_of_the_others(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as out:
        out.add(rows([PLACE], ["a"], label=[None]), None)
        out.add(rows([PLACE], ["b"], label=[7]), None)
        dataset = out.finish()
    assert dataset.read(["label"])["label"].to_list() == [None, 7]
    assert dataset.manifest.columns["label"] == "Int64"


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    frame = rows([PLACE] * 300, [f"k{index}" for index in range(300)])
    pieces = pl.concat([frame[:7], frame[7:250], frame[250:]], rechunk=False)
    assert pieces.n_chunks() == 3
    assert parquet_bytes(frame) == parquet_bytes(pieces)
    digests = []
    for name in ("a", "deep/er/b"):
        with writer(tmp_path / name, pairs_in=300) as out:
            out.add(frame, None)
            digests.append(out.finish().digest)
    assert digests[0] == digests[1]


def test_digest_follows_data_and_phase_but_not_the_report(tmp_path: Path) -> None:
    def digest(phase: PhaseRecord, key: str = "a") -> str:
        with DatasetWriter(tmp_path / "out", phase, [], SHARDS, pairs_in=1) as out:
            out.add(rows([PLACE], [key]), None)
            return out.finish().digest

    first = digest(PHASE)
    assert digest(PHASE.model_copy(update={"report": {"wall_s": 4.2}})) == first
    assert digest(PHASE.model_copy(update={"seed": 4})) != first
    assert digest(PHASE, "b") != first


def test_an_exception_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    with writer(tmp_path / "out", pairs_in=1) as out:
        out.add(rows([PLACE], ["old"]), None)
        out.finish()
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "out")
    assert PairDataset.open(tmp_path / "out").read()["key"].to_list() == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as out:
        out.add(rows([PLACE], ["a"]), None)
    assert list(tmp_path.iterdir()) == []


def test_a_new_dataset_replaces_the_old(tmp_path: Path) -> None:
    for key in ("old", "new"):
        with writer(tmp_path / "out", pairs_in=1) as out:
            out.add(rows([PLACE], [key]), None)
            out.finish()
    assert PairDataset.open(tmp_path / "out").read()["key"].to_list() == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_rename_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    (tmp_path / "partial").mkdir()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "partial":
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="input/output"):
        files.publish(tmp_path / "partial", tmp_path / "out")
    assert (tmp_path / "out" / "old").exists()


def test_killed_in_the_middle_leaves_no_dataset(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.pairs.test_write import *
with writer(Path({str(tmp_path)!r}) / "out") as out:
    out.add(rows([PLACE], ["a"]), None)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("out.partial-")
    with pytest.raises(DataError, match="no pair dataset"):
        PairDataset.open(partial)


def test_full_disk_while_writing_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"bytes free, [\d,]+ needed"), writer(tmp_path / "out") as out:
        out.add(rows([PLACE], ["a"]), None)
    assert list(tmp_path.iterdir()) == []


def test_other_write_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="io") as caught, files.guard_space(tmp_path / "x", 1):
        raise OSError(errno.EIO, "io")
    assert not isinstance(caught.value, ResourceError)


def test_file_size_limit_while_packing(tmp_path: Path) -> None:
    """A real refusal by the kernel, not an imitated one."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
        with pytest.raises(ResourceError, match="The disk is full"):
            fill(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs to mount a small file system")
def test_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ResourceError, match="The disk is full"):
            fill(disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_relative_shards_stay_right_when_datasets_lie_elsewhere(tmp_path: Path) -> None:
    data = picture()
    with DatasetWriter(tmp_path / "runs/one/ingest", PhaseRecord(phase="ingest"), pairs_in=None) as out:
        shards = ShardWriter(out.shards_folder, "images")
        place = shards.add("a", "png", data)
        out.add_shards(shards.done())
        out.add(rows([place], ["a"]), None)
        parent = out.finish()
    assert parent.manifest.shards["images-00000"].uri == "shards/images-00000.tar"
    with DatasetWriter(tmp_path / "b/prune", PHASE, [parent.digest], parent.manifest.shards, pairs_in=1, shards_root=parent.root) as out:
        out.add(parent.read(), None)
        child = out.finish()
    assert child.manifest.shards["images-00000"].uri == "../../runs/one/ingest/shards/images-00000.tar"
    assert child.reader().read_column(child.read()["image"]) == [data]
    (tmp_path / "moved").mkdir()
    for name in ("runs", "b"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = PairDataset.open(tmp_path / "moved/b/prune")
    assert moved.reader().read_column(moved.read()["image"]) == [data]
    with pytest.raises(DataError, match="what a shard's path is relative to"):
        DatasetWriter(tmp_path / "c", PHASE, [], parent.manifest.shards, pairs_in=1)


def test_two_shards_of_one_name(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as out, pytest.raises(DataError, match="one name"):
        out.add_shards({"s": ShardEntry(uri="s3://other/s.tar", size_bytes=10240)})


def test_manifest_is_plain_and_holds_no_machine_path(tmp_path: Path) -> None:
    with writer(tmp_path / "out", pairs_in=1) as out:
        out.add(rows([PLACE], ["a"]), None)
        dataset = out.finish()
    text = (dataset.root / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["ledger"] == {"pairs_in": 1, "kept": 1, "left": []}


def test_key_index_knows_what_was_added() -> None:
    index = KeyIndex()
    for start in range(0, 1000, 100):
        index.add(pl.Series([f"k{number}" for number in range(start, start + 100)]))
    assert len(index) == 1000
    assert len(index._runs) <= 4
    assert index.suspects(pl.Series(["k0", "k999", "k1000", "new"])).to_list() == [True, True, False, False]


def test_known_is_exact_where_hashes_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(tmp_path / "out") as out:
        out.add(rows([PLACE], ["a"]), None)
        monkeypatch.setattr(out.keys, "suspects", lambda keys: pl.Series([True] * len(keys)))
        assert out.known(pl.Series(["b", "a"])).to_list() == [False, True]
