"""The index of a tar agrees with the standard library's, and no crafted tar gets past it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from diptych.pairs.tar import Member, index_tar


def add(tar: tarfile.TarFile, name: str, data: bytes = b"data", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    tar.addfile(info, io.BytesIO(data))


def build(path: Path, *names: str, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for index, name in enumerate(names):
            add(tar, name, bytes([index]) * (index * 300 + 1))
    return path


NAMES = ["000.jpg", "000.txt", "deep/" * 30 + "x.jpg", "n" * 180 + ".jpg", "schön/катя.png", "./dot.jpg"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_agrees_with_tarfile(tmp_path: Path, format: int) -> None:
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or len(name) < 150]
    path = build(tmp_path / "x.tar", *names, format=format)
    with tarfile.open(path) as tar:
        expected = [Member(member.name.removeprefix("./"), member.offset_data, member.size) for member in tar.getmembers()]
    assert list(index_tar(path)) == expected


def test_folders_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "folder", kind=tarfile.DIRTYPE)
        add(tar, "folder/a.jpg")
    assert [member.name for member in index_tar(tmp_path / "x.tar")] == ["folder/a.jpg"]


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("/etc/passwd", tarfile.REGTYPE, "tar member name is absolute"),
        ("a/../../b.jpg", tarfile.REGTYPE, "tar member name leaves the tar"),
        ("..", tarfile.REGTYPE, "tar member name leaves the tar"),
        ("a.jpg", tarfile.SYMTYPE, "tar member is a symbolic link"),
        ("a.jpg", tarfile.LNKTYPE, "tar member is a hard link"),
        ("a.jpg", tarfile.CHRTYPE, "tar member is a device"),
        ("a.jpg", tarfile.BLKTYPE, "tar member is a device"),
        ("a.jpg", tarfile.FIFOTYPE, "tar member is a named pipe"),
    ],
)
def test_dangerous_members_are_faults(tmp_path: Path, name: str, kind: bytes, reason: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "good.jpg")
        add(tar, name, kind=kind, link="/etc/passwd")
        add(tar, "also.jpg")
    members = list(index_tar(tmp_path / "x.tar"))
    assert [member.fault for member in members] == [None, reason, None]


def test_truncated_in_a_member(tmp_path: Path) -> None:
    path = build(tmp_path / "x.tar", "a.jpg", "b.jpg", "c.jpg")
    path.write_bytes(path.read_bytes()[: 512 * 5 + 100])
    *good, last = index_tar(path)
    assert [member.name for member in good] == ["a.jpg", "b.jpg"]
    assert (last.name, last.fault) == ("c.jpg", "truncated tar")


@pytest.mark.parametrize("size", [0, 100, 512 * 2, 512 * 4])
def test_truncated_between_members(tmp_path: Path, size: int) -> None:
    path = build(tmp_path / "x.tar", "a.jpg", "b.jpg")
    path.write_bytes(path.read_bytes()[:size])
    assert list(index_tar(path))[-1].fault == "truncated tar"


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"PK\x03\x04" * 1000)
    assert [member.fault for member in index_tar(tmp_path / "x.tar")] == ["corrupt tar header"]


def test_damaged_header_in_the_middle(tmp_path: Path) -> None:
    path = build(tmp_path / "x.tar", "a.jpg", "b.jpg")
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 0xFF
    path.write_bytes(content)
    assert [member.fault for member in index_tar(path)] == [None, "corrupt tar header"]


def test_huge_claimed_size_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"few")
    assert [(member.name, member.fault) for member in index_tar(tmp_path / "x.tar")] == [("a.jpg", "truncated tar")]
