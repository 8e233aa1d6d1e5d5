from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.curate import concepts


def test_the_shipped_list() -> None:
    shipped = concepts.load("builtin")
    assert len(shipped.entries) == 270_014
    assert shipped.left_out == 0
    texts = ["a photo of a golden retriever", "IMG_4894.JPG", "Spaghetti carbonara on a dinner plate"]
    indptr, ids = shipped.matcher.match(texts)
    assert {"photo", "golden", "golden retriever", "photo of"} <= {shipped.entries[index] for index in ids[: indptr[1]]}
    assert indptr[2] == indptr[1]
    assert concepts.load("builtin") is shipped, "a process reads a list once"


def test_a_list_is_cleaned_as_the_paper_builds_its_own() -> None:
    listed = concepts.load(("dog", "", "!", "cat", "dog", "東", "3"))
    assert listed.entries == ("dog", "cat", "東", "3")
    assert listed.left_out == 3


def test_files(tmp_path: Path) -> None:
    text, table = tmp_path / "list.txt", tmp_path / "list.parquet"
    text.write_bytes("\ufeffdog\r\nhot dog \r\n\r\nline\u2028separator\n".encode())
    assert concepts.load(str(text)).entries == ("dog", "hot dog", "line\u2028separator")
    pl.DataFrame({"entry": ["a", None, "b"], "kind": [1, 2, 3]}).write_parquet(table)
    assert concepts.load(str(table)).entries == ("a", "b")


def test_a_changed_file_is_another_list(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("dog")
    before = concepts.load(str(path))
    path.write_text("cat")
    assert (before.entries, concepts.load(str(path)).entries) == (("dog",), ("cat",))


def test_bad_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not there"):
        concepts.load(str(tmp_path / "missing.txt"))
    binary, wrong = tmp_path / "binary.txt", tmp_path / "wrong.parquet"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not text"):
        concepts.load(str(binary))
    pl.DataFrame({"entry": [1, 2]}).write_parquet(wrong)
    with pytest.raises(DataError, match="string column `entry`"):
        concepts.load(str(wrong))
    with pytest.raises(DataError, match="empty"):
        concepts.load(("", "!"))
