from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from diptych.engine import mapped


def frame(rows: int = 10, start: int = 0) -> pl.DataFrame:
    number = list(range(start, start + rows))
    return pl.DataFrame(
        {
            "key": [f"k{row}" for row in number],
            "image": [{"shard": "s", "offset": row, "size": None if row % 3 else row} for row in number],
            "captions": [[{"text": f"é {row}", "score": None}] * (row % 3) for row in number],
            "_feature.x": pl.Series([[row, -row] for row in number], dtype=pl.Array(pl.Float32, 2)),
            "kind": pl.Series([str(row % 2) for row in number], dtype=pl.Categorical),
            "bytes": [bytes([row % 256]) if row % 2 else None for row in number],
        },
        schema_overrides={"image": pl.Struct({"shard": pl.String, "offset": pl.Int64, "size": pl.Int64})},
    )


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    for rows in (0, 1, 10):
        assert mapped.read(mapped.write(frame(rows), tmp_path / f"t-{rows}.arrow")).equals(frame(rows))
    joined = pl.concat([frame(3), frame(4, 3)], rechunk=False)
    assert mapped.read(mapped.write(joined, tmp_path / "joined.arrow")).equals(joined)
    assert not list(tmp_path.glob("*.partial"))


def test_a_table_of_a_dataset_is_read_too(tmp_path: Path) -> None:
    frame().write_parquet(tmp_path / "t.parquet")
    assert mapped.read(tmp_path / "t.parquet").equals(frame())
    assert mapped.size_bytes(tmp_path / "t.parquet") == 10 * 208


def test_parts_are_gathered_over_files_in_order(tmp_path: Path) -> None:
    part_N = np.array([2, 0, 2, 0, 4, 2, 0, 0, 2, 4])
    paths = [mapped.write_parts(frame(10, 10 * at), part_N, 5, tmp_path / f"{at}.arrow") for at in range(3)]
    for part in (0, 2, 4):
        expected = pl.concat([frame(10, 10 * at).filter(part_N == part) for at in range(3)])
        found = mapped.read_part(paths, part)
        assert found is not None
        assert found.equals(expected)
    assert mapped.read_part(paths, 1) is None
    assert mapped.read_part(paths, 3) is None
    assert mapped.read_part([], 0) is None


def test_a_table_without_rows_has_empty_parts(tmp_path: Path) -> None:
    empty = mapped.write_parts(frame(0), np.empty(0, dtype=np.int64), 3, tmp_path / "e.arrow")
    full = mapped.write_parts(frame(2), np.array([1, 1]), 3, tmp_path / "f.arrow")
    assert mapped.read_part([empty], 1) is None
    found = mapped.read_part([empty, full], 1)
    assert found is not None
    assert found.equals(frame(2))


def test_a_part_beyond_the_last_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="beyond the last"):
        mapped.write_parts(frame(2), np.array([0, 3]), 3, tmp_path / "x.arrow")
    assert not list(tmp_path.iterdir())


def test_a_mapped_table_outlives_its_file(tmp_path: Path) -> None:
    path = mapped.write(frame(), tmp_path / "t.arrow")
    found = mapped.read(path)
    mapped.write(frame(5, 50), path)
    mapped.remove([path, tmp_path / "never.arrow"])
    assert found.equals(frame())
    assert not list(tmp_path.iterdir())


def test_size_counts_features_and_the_rest(tmp_path: Path) -> None:
    assert mapped.size_bytes(mapped.write(frame(7), tmp_path / "t.arrow")) == 7 * 208
    assert mapped.size_bytes(mapped.write(frame(0), tmp_path / "e.arrow")) == 0
