from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from diptych.core.errors import ConfigError
from diptych.workflow import lines_page, reproductions
from diptych.workflow.project import Project

POINTS = {
    "web": [(0.3, 0.2), (0.5, 0.35), (0.8, 0.6)],
    "<album>": [(0.4, 0.4), (0.6, 0.6), (0.7, 0.72)],
    "both": [(0.5, 0.45), (0.6, 0.5), (0.8, 0.7)],
}


def rows() -> pl.DataFrame:
    """One run's rows, as the benchmark writes them."""
    found: list[dict[str, Any]] = []

    def add(metric: str, value: float, **settings: Any) -> None:
        shared = {"space": "probit", "ensembles": ["both"], **settings}
        found.append(
            {
                "set": "pool",
                "task": "lines",
                "metric": metric,
                "value": value,
                "low": value - 0.1,
                "high": value + 0.1,
                "n": 500,
                "settings": json.dumps(shared),
            }
        )

    for name, points in POINTS.items():
        for index, (known, moved) in enumerate(points):
            add(f"point.{index}", known, source=name, model=index)
            add(f"point.{index}.moved", moved, source=name, model=index, split="moved", known=known)
        for metric, value in (("at50", points[1][1]), ("slope", 1.0), ("r2", 0.9), ("effective_robustness", 0.0)):
            add(f"{metric}.x.moved", value, source=name, split="moved", range=[0.3, 0.8])
    add("acc1", 0.5)
    return pl.DataFrame(found)


def test_points_and_figures_are_read_back() -> None:
    (shift,) = lines_page.shifts(rows())
    assert {name: [(x, y) for x, y, _ in points] for name, points in shift.points.items()} == POINTS
    assert shift.figures["web", "at50"] == [(0.35, pytest.approx(0.25), pytest.approx(0.45))]
    assert shift.ensembles == {"both"}


def test_page(tmp_path: Path) -> None:
    path = lines_page.write(rows(), "title", "about", tmp_path / "deep" / "page.html")
    page = path.read_text()
    assert "&lt;album&gt;" in page
    assert "<album>" not in page
    assert page.count("<polyline") == 3
    assert page.count("stroke-dasharray='7 4'") == 1, "the ensemble's line is dashed"
    assert "6 models" in page
    assert "0.350 (0.250 to 0.450)" in page
    assert list(path.parent.iterdir()) == [path]


def test_points_lie_where_their_line_is() -> None:
    """A perfectly robust source in probit space lies on the diagonal of equal axes."""
    frame = rows().filter(pl.col("settings").str.contains("<album>"))
    chart = lines_page.chart(lines_page.shifts(frame)[0])
    places = [tuple(map(float, found)) for found in re.findall(r"translate\(([\d.]+) ([\d.]+)\)'><title>", chart)]
    xs, ys = zip(*places, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    ends = re.search(r"<polyline points='([\d.]+),([\d.]+) ([\d.]+),([\d.]+)'", chart)
    assert ends is not None
    assert float(ends[1]) == pytest.approx(xs[0], abs=0.2)
    assert float(ends[3]) == pytest.approx(xs[-1], abs=0.2)


def test_several_runs_share_a_chart() -> None:
    (shift,) = lines_page.shifts(pl.concat([rows(), rows()]))
    assert len(shift.points["web"]) == 6
    assert len(shift.figures["web", "slope"]) == 2


def test_without_lines_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No lines"):
        lines_page.write(rows().filter(pl.col("metric") == "acc1"), "t", "a", tmp_path / "p.html")
    assert not list(tmp_path.iterdir())


def test_a_claims_runs_are_drawn_together(tmp_path: Path) -> None:
    home = tmp_path / "runs" / "claims" / "mine"
    for name, frame in (("mixed-s0", rows()), ("mixed-s1", rows()), ("clean-s0", rows().filter(pl.col("metric") == "acc1"))):
        (home / name / "evaluate").mkdir(parents=True)
        frame.write_parquet(home / name / "evaluate" / "rows.parquet")
    result = SimpleNamespace(file=SimpleNamespace(claim="mine", about="of mine"))
    reproductions._draw_lines(Project(tmp_path), result)  # type: ignore[arg-type]
    page = (home / "lines.html").read_text()
    assert "12 models" in page
    assert "(runs 0.350 to 0.350)" in page
    result.file.claim = "other"
    reproductions._draw_lines(Project(tmp_path), result)  # type: ignore[arg-type]
    assert not (tmp_path / "runs" / "claims" / "other").exists()
