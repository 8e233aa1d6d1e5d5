"""A sweep's pictures: which is drawn when, what they say, and the Pareto front against brute force."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.workflow import sweep
from diptych.workflow.sweep_charts import Sweep, pareto_front


def read(folder: Path, settings: list[dict[str, Any]], **figures: Any) -> Sweep:
    rows = [
        {"id": f"{i:064d}", "status": "done", "setting": setting, "metrics": {"s/z/acc1": i / 10, "s/z/loss": (i - 3) ** 2}, "error": ""}
        for i, setting in enumerate(settings)
    ]
    path = folder / "sweep.parquet"
    for row in rows:
        row["id"] = str(row["id"])[::-1]  # `short` keeps the beginning
    sweep.table(rows).write_parquet(path)
    return Sweep.read(path, {"metric": "s/z/acc1", "mode": "max", **figures})


def test_two_axes_that_span_a_grid_are_a_heat_map_with_its_winner(tmp_path: Path) -> None:
    grid = [{"templates": t, "scale": s} for t, s in itertools.product([["{}"], ["a {}"]], [1.0, 10.0, 100.0])]
    found = read(tmp_path, grid)
    assert found.best(1)[0][1]["scale"] == 100.0
    picture = ET.fromstring(found.chart())
    cells = picture.findall("rect")
    assert len(cells) == 6
    assert [cell.get("stroke") is not None for cell in cells].count(True) == 1
    text = "".join(picture.itertext())
    assert '["a {}"]' in text
    assert "0.5" in text


@pytest.mark.parametrize("count", [2, 7])
def test_more_axes_are_parallel_coordinates_a_line_a_setting(tmp_path: Path, count: int) -> None:
    settings = [{"lr": 10.0 ** -(i % 4), "width": i, "name": f"<{i}>"} for i in range(count)]
    picture = ET.fromstring(read(tmp_path, settings).chart())
    assert len(picture.findall("polyline")) == count
    assert len(picture.findall("path")) == 4


def test_one_setting_is_no_picture(tmp_path: Path) -> None:
    assert read(tmp_path, [{"lr": 1.0}]).chart() == ""


def test_the_front_is_drawn_where_two_figures_are_named(tmp_path: Path) -> None:
    settings = [{"sparsity": 0.1 * i} for i in range(7)]
    found = read(tmp_path, settings, pareto={"sparsity": "max", "s/z/loss": "min"})
    assert "Pareto front" in found.pareto_chart()
    assert "<path" not in found.pareto_chart()
    assert read(tmp_path, settings).pareto_chart() == ""


def test_points_on_the_front_say_what_they_are_and_names_of_figures_are_whole(tmp_path: Path) -> None:
    settings = [{"compress.0.method": "wanda", "compress.0.sparsity": 0.1 * i} for i in range(1, 4)]
    picture = read(tmp_path, settings, pareto={"compress.0.sparsity": "max", "s/z/loss": "min"}).pareto_chart()
    assert "compress.0.sparsity (0.1 to 0.3), maximal is better" in picture.replace("0.30000000000000004", "0.3")
    assert ">wanda</text>" in picture


def test_numbers_in_dark_cells_are_light(tmp_path: Path) -> None:
    found = read(tmp_path, [{"a": a, "b": b} for a in (1, 2) for b in (1, 2)])
    texts = [text for text in ET.fromstring(found.chart()).findall("text") if "." in (text[0].tail or "")]
    light = [float(text[0].tail or "nan") for text in texts if "#fff" in text.get("style", "")]
    dark = [float(text[0].tail or "nan") for text in texts if "#fff" not in text.get("style", "")]
    assert light
    assert dark
    assert min(light) > max(dark)


def test_intervals_are_drawn_through_the_points_and_fit_into_the_picture(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"{i}" + "0" * 63, "status": "done", "setting": {"compress.magnitude.sparsity": 0.2 * i}, "error": "",
            "metrics": {"s/z/acc1": 0.9 - 0.1 * i, "s/z/acc1/low": 0.8 - 0.1 * i, "s/z/acc1/high": 0.95 - 0.1 * i},
        }
        for i in range(4)
    ]  # fmt: skip
    sweep.table(rows).write_parquet(tmp_path / "sweep.parquet")
    assert set(sweep.table(rows)["metric"]) == {"s/z/acc1"}
    figures = {"metric": "s/z/acc1", "mode": "max", "pareto": {"compress.magnitude.sparsity": "max", "s/z/acc1": "max"}}
    picture = ET.fromstring(
        Sweep.read(tmp_path / "sweep.parquet", figures).pareto_chart().removeprefix("<h3>What no other setting beats in both</h3>")
    )
    lines = [path.get("d") for path in picture.findall("path")]
    assert len(lines) == 4
    ends = [float(number) for line in lines for number in line.replace("M", "").replace("L", " ").split()[1::2]]
    assert min(ends) >= 26
    assert max(ends) <= 220


@pytest.mark.parametrize("sides", itertools.product(["max", "min"], repeat=2))
def test_the_front_is_what_no_other_beats(sides: tuple[str, str]) -> None:
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).integers(0, 6, (40, 2))]

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        gains = [(x - y) * (1 if side == "max" else -1) for x, y, side in zip(a, b, sides, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    assert pareto_front(points, *sides) == [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
