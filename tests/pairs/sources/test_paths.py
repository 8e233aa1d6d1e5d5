"""Patterns, names of files and columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from diptych.core.errors import DataError
from diptych.pairs.sources.paths import captions_of, expand, extra_name, scalars, short_names


def test_patterns(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "02.tar", "sub/03.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns: str) -> list[str]:
        return [Path(file).relative_to(tmp_path).as_posix() for file in expand([str(tmp_path / pattern) for pattern in patterns])]

    assert names("{00..01}.tar") == ["00.tar", "01.tar"]
    assert names("*.tar", "01.tar") == ["00.tar", "01.tar", "02.tar"]
    assert names("**/*.tar") == ["00.tar", "01.tar", "02.tar", "sub/03.tar"]
    assert names("{0..0}{1..2}.tar") == ["01.tar", "02.tar"]
    with pytest.raises(DataError, match="No file"):
        names("{00..07}.tar")
    with pytest.raises(DataError, match="No file"):
        names("*.tar", "none.tar")


def test_missing_number_of_a_range_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(DataError, match=r"1\.tar"):
        expand([str(tmp_path / "{0..1}.tar")])


def test_short_names_tell_files_apart() -> None:
    assert short_names(["/x/a/0.tar", "/x/a/1.tar"]) == {"/x/a/0.tar": "0", "/x/a/1.tar": "1"}
    assert short_names(["/x/a/0.tar", "s3://b/c/0.tar"]) == {"/x/a/0.tar": "a/0", "s3://b/c/0.tar": "c/0"}
    assert short_names(["/a/0.tar", "/a/0.parquet"]) == {"/a/0.tar": "/a/0.tar", "/a/0.parquet": "/a/0.parquet"}


def test_captions_and_columns() -> None:
    assert captions_of(["a", None, {"text": "b", "source": b"human"}], "alt") == [("a", "alt"), (None, "alt"), ("b", "human")]
    assert [extra_name(name) for name in ("label", "meta.x", "year")] == ["label", "meta.x", "meta.year"]
    assert scalars({"a": 1, "b": [1], "c": b"x\xe9", "d": None, "e": "t"}, ["e"]) == {"meta.a": 1, "meta.c": "x\ufffd"}
