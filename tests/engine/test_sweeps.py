"""The table of a sweep: written as results come, gone on with, errors tried again and then told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diptych.core.errors import DataError
from diptych.engine import sweeps
from diptych.engine.session import Session

GRID = [{"x": x} for x in range(6)]


@dataclass(frozen=True)
class Square:
    """Gives x squared; the files beside say how often each setting was tried, and which fail how often."""

    folder: Path
    failing: tuple[tuple[int, int], ...] = ()

    def __call__(self, setting: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
        x = int(setting["x"])
        with (self.folder / f"tried-{x}").open("a") as file:
            file.write("x")
        if self.tries(x) <= dict(self.failing).get(x, 0):
            raise DataError.at("Broken", "x", x, "another")
        yield {"loss": float(x * x)}

    def tries(self, x: int) -> int:
        path = self.folder / f"tried-{x}"
        return len(path.read_text()) if path.exists() else 0


def run(evaluate: Square, table: sweeps.Table, session: Session, settings: list[dict[str, int]] | None = GRID, **options: Any) -> list[Any]:
    values = {"search": "grid", "scheduler": "none", "trials": 6, "metric": "loss", "mode": "min", "seed": 0, **options}
    return sweeps.run(evaluate, settings, {"x": [0, 1, 2]}, table, session, scratch=evaluate.folder / "tune", **values)  # type: ignore[arg-type]


@pytest.fixture
def table(tmp_path: Path) -> sweeps.Table:
    return sweeps.Table(tmp_path / "results.jsonl")


def test_a_grid_is_measured_once_and_gone_on_with(tmp_path: Path, table: sweeps.Table) -> None:
    square = Square(tmp_path)
    table.append({"x": 4}, "done", {"loss": 16.0})
    with table.path.open("a") as file:
        file.write('{"id": "torn')  # killed while it wrote
    with Session(in_process=True) as session:
        rows = run(square, table, session)
        assert [row["metrics"]["loss"] for row in sorted(rows, key=lambda row: row["setting"]["x"])] == [0, 1, 4, 9, 16, 25]
        assert square.tries(4) == 0
        run(square, table, session)
    assert [square.tries(x) for x in range(6)] == [1, 1, 1, 1, 0, 1]


def test_a_setting_that_fails_is_tried_again_and_then_told_without_stopping_the_others(tmp_path: Path, table: sweeps.Table) -> None:
    square = Square(tmp_path, failing=((1, 1), (3, 2)))
    with Session(in_process=True) as session:
        rows = {row["setting"]["x"]: row for row in run(square, table, session)}
    assert {x: row["status"] for x, row in rows.items()} == {0: "done", 1: "done", 2: "done", 3: "error", 4: "done", 5: "done"}
    assert "Broken" in rows[3]["error"]
    assert (square.tries(1), square.tries(3)) == (2, 2)
    with Session(in_process=True) as session:
        again = {row["setting"]["x"]: row for row in run(square, table, session)}
    assert again[3]["status"] == "done", "an errored setting is tried again by the next run"


@pytest.mark.slow
@pytest.mark.ray
def test_a_grid_on_ray_writes_rows_as_they_come(tmp_path: Path, table: sweeps.Table) -> None:
    square = Square(tmp_path, failing=((2, 5),))
    with Session(cores=2) as session:
        rows = {row["setting"]["x"]: row for row in run(square, table, session)}
    assert {x: row["status"] for x, row in rows.items()} == {0: "done", 1: "done", 2: "error", 3: "done", 4: "done", 5: "done"}
    assert len(table.path.read_text().splitlines()) == 6
    assert square.tries(2) == 2


def test_a_search_goes_around_failures(tmp_path: Path, table: sweeps.Table) -> None:
    square = Square(tmp_path, failing=((1, 99),))
    with Session(in_process=True) as session:
        rows = run(square, table, session, None, search="random", trials=8)
    assert {row["setting"]["x"] for row in rows if row["status"] == "done"} <= {0, 2}
    assert all(row["setting"]["x"] == 1 for row in rows if row["status"] == "error")


def test_slices_share_out_the_settings_and_the_arms() -> None:
    settings = [{"arm": arm, "seed": seed} for seed in range(3) for arm in ("base", "method")]
    for slices in (1, 2, 4, 6):
        parts = [sweeps.dealt(settings, number, slices) for number in range(slices)]
        assert sorted(str(setting) for part in parts for setting in part) == sorted(map(str, settings))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert {setting["arm"] for setting in sweeps.dealt(settings, 0, 2)} == {"base", "method"}
