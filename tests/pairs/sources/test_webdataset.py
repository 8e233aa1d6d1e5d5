"""Tars are used where they lie; what is wrong in them leaves with a reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from diptych.core.errors import DataError
from diptych.pairs.image import ImageLimits
from diptych.pairs.ingest import IngestConfig, ingest_all
from diptych.pairs.sources.webdataset import Config

from ..conftest import picture
from ..test_image import noise

LENIENT = IngestConfig(max_bad_share=1.0)


def tar(path: Path, *members: tuple[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(info)
    return path


def test_pictures_are_not_copied(tmp_path: Path) -> None:
    image = picture()
    tar(
        tmp_path / "00000.tar",
        ("a.jpg", image),
        ("a.txt", "ein Bär".encode()),
        ("a.cls", b"4\n"),
        ("b.b/x.png", image),
        ("b.b/x.txt", b"two"),
    )
    tar(tmp_path / "00001.tar", ("c.JPG", image), ("c.json", json.dumps({"captions": ["one", "two"], "url": "u", "n": 3}).encode()))
    config = Config(path=str(tmp_path / "{00000..00001}.tar"), json_captions=("captions",), json_columns=("url",), split="test")
    dataset = ingest_all(config.build(), tmp_path / "out")
    frame = dataset.read()
    assert frame["key"].to_list() == ["a", "b.b/x", "c"]
    assert [[caption["text"] for caption in captions] for captions in frame["captions"]] == [["ein Bär"], ["two"], ["one", "two"]]
    assert dataset.reader().read_column(frame["image"]) == [image] * 3
    assert frame["label"].to_list() == [4, None, None]
    assert frame["meta.url"].to_list() == [None, None, "u"]
    assert dataset.manifest.shards["00000"].uri == "../00000.tar"
    assert list((dataset.root / "shards").iterdir()) == []


@pytest.mark.parametrize("check", ["decode", "header"])
def test_faults(tmp_path: Path, check: str) -> None:
    image = picture()
    path = tar(
        tmp_path / "x.tar",
        ("good.png", image), ("good.txt", b"fine"),
        ("alone.png", image),
        ("blind.txt", b"no picture"),
        ("../up.png", image),
        ("/abs.png", image),
        ("empty.png", b""), ("empty.txt", b"t"),
        ("latin.png", image), ("latin.txt", b"caf\xe9"),
        ("class.png", image), ("class.txt", b"t"), ("class.cls", b"four"),
        ("json.png", image), ("json.json", b"{"),
        ("list.png", image), ("list.json", b"[]"),
        ("twice.png", image), ("twice.png", image),
        ("page.jpg", b"<html>"), ("page.txt", b"t"),
        ("tiff.tif", noise("TIFF")), ("tiff.txt", b"t"),
        ("big.png", image), ("big.txt", b"x" * (2 << 20)),
        link="link.png",
    )  # fmt: skip
    config = IngestConfig(max_bad_share=1.0, check=check)  # type: ignore[arg-type]
    dataset = ingest_all(Config(path=str(path), json_captions=("c",)).build(), tmp_path / "out", config=config)
    assert dataset.read()["key"].to_list() == ["good"]
    assert dict(dataset.rejects().select("key", "reason").iter_rows()) == {
        "alone": "no caption",
        "blind": "no image",
        "../up": "tar member name leaves the tar",
        "/abs": "tar member name is absolute",
        "empty": "empty image",
        "latin": "caption is not valid UTF-8",
        "class": "class is not a number",
        "json": "sidecar is not JSON",
        "list": "sidecar is not a JSON object",
        "twice": "two members of one name",
        "page": "not an image",
        "tiff": "TIFF cannot be used in place",
        "big": "sidecar too large",
        "link": "tar member is a symbolic link",
    }


def test_truncated_tar_gives_what_is_whole(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", ("a.png", picture()), ("a.txt", b"t"), ("b.png", noise("PNG")), ("b.txt", b"t"))
    path.write_bytes(path.read_bytes()[:3000])
    dataset = ingest_all(Config(path=str(path)).build(), tmp_path / "out", config=LENIENT)
    assert dataset.read()["key"].to_list() == ["a"]
    assert dataset.rejects().select("key", "reason").rows() == [("b", "truncated tar")]


def test_names_that_repeat(tmp_path: Path) -> None:
    for index in range(2):
        tar(tmp_path / f"{index}.tar", ("0.png", picture((index, 0, 0))), ("0.txt", b"t"))
    path = str(tmp_path / "*.tar")
    plain = ingest_all(Config(path=path).build(), tmp_path / "plain")
    assert plain.read()["key"].to_list() == ["0"]
    assert plain.rejects()["reason"].to_list() == ["duplicate key"]
    assert ingest_all(Config(path=path, keys="shard/name").build(), tmp_path / "long").read()["key"].to_list() == ["0/0", "1/0"]


def test_tars_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for index, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "0.tar", (f"{folder}.png", picture((index, 0, 0))), (f"{folder}.txt", b"t"))
    dataset = ingest_all(Config(path=(str(tmp_path / "a/*.tar"), str(tmp_path / "b/*.tar"))).build(), tmp_path / "out")
    assert sorted(dataset.manifest.shards) == ["a/0", "b/0"]
    assert dataset.reader().read_column(dataset.read()["image"]) == [picture((0, 0, 0)), picture((1, 0, 0))]


def test_remote_tars(tmp_path: Path) -> None:
    import fsspec

    path = tar(tmp_path / "0.tar", ("a.png", picture()), ("a.txt", b"t"), ("b.png", noise("PNG")), ("b.txt", b"u"))
    fsspec.filesystem("memory").pipe("/tars/0.tar", path.read_bytes())
    dataset = ingest_all(Config(path="memory://tars/*.tar").build(), tmp_path / "out")
    assert dataset.reader().read_column(dataset.read()["image"]) == [picture(), noise("PNG")]
    assert dataset.manifest.shards["0"].uri.startswith("memory://")


def test_header_check_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.pairs.ranges import LocalFile

    image = noise("PNG", (600, 600))
    path = tar(tmp_path / "0.tar", *((f"{index}.{ending}", data) for index in range(4) for ending, data in (("png", image), ("txt", b"t"))))
    read, whole = [], LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda self, offset, size: read.append(size) or whole(self, offset, size))
    dataset = ingest_all(Config(path=str(path)).build(), tmp_path / "out", config=IngestConfig(check="header"))
    assert len(dataset) == 4
    assert sum(read) < len(image)


def test_checksum_and_limits(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", ("a.png", picture()), ("a.txt", b"t"))
    dataset = ingest_all(Config(path=str(path), checksum=True).build(), tmp_path / "out")
    dataset.verify_shards()
    assert str(dataset.manifest.shards["0"].sha256).startswith("sha256:")
    small = IngestConfig(limits=ImageLimits(max_bytes=10), max_bad_share=1)
    assert ingest_all(Config(path=str(path)).build(), tmp_path / "small", config=small).rejects()["reason"].to_list() == ["too many bytes"]


def test_no_such_file(tmp_path: Path) -> None:
    for pattern in ("none.tar", "*.tar", "{0..3}.tar"):
        with pytest.raises(DataError, match="No file of this name"):
            Config(path=str(tmp_path / pattern)).build().parts()
