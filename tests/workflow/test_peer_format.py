"""CLIP_benchmark's result files: its field names, its values where it has others than ours."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from diptych.workflow.peer_format import write


def frame(task: str, values: dict[str, float], classes: int = 10, seed: int | None = None) -> pl.DataFrame:
    rows = [
        {"checkpoint": "mine", "set": "cars", "task": task, "metric": metric, "value": value, "seed": seed,
         "settings": json.dumps({"classes": classes})} for metric, value in values.items()
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"seed": pl.Int64})


def written(folder: Path, rows: pl.DataFrame, model: str = "models/mine") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in write(rows, {"mine": model}, folder)]


def test_classification_has_their_names(tmp_path: Path) -> None:
    rows = frame("zero-shot", {"acc1": 0.25, "acc5": 0.75, "mean_per_class": 0.5, "log_loss": 1.0})
    (entry,) = written(tmp_path, rows, "open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert entry == {
        "dataset": "cars", "model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "task": "zeroshot_classification",
        "metrics": {"acc1": 0.25, "acc5": 0.75, "mean_per_class_recall": 0.5}, "language": "en",
    }  # fmt: skip
    (row,) = csv.DictReader((tmp_path / "benchmark.csv").read_text().splitlines())
    assert row["model_fullname"] == "ViT-B-32 laion2b_s34b_b79k"
    assert row["acc1"] == "0.25"
    assert (tmp_path / "cars_laion2b_s34b_b79k_ViT-B-32_en_zeroshot_classification.json").exists()


@pytest.mark.parametrize(("classes", "expected"), [(5, 1.0), (4, math.nan)])
def test_the_top_five_of_few_classes(tmp_path: Path, classes: int, expected: float) -> None:
    (entry,) = written(tmp_path, frame("zero-shot", {"acc1": 0.25, "mean_per_class": 0.5}, classes))
    assert entry["metrics"]["acc5"] == pytest.approx(expected, nan_ok=True)


def test_retrieval_is_named_by_what_is_retrieved(tmp_path: Path) -> None:
    values = {
        "text_to_image_r1": 0.1,
        "text_to_image_r5": 0.2,
        "image_to_text_r5": 0.3,
        "image_to_text_mrr": 0.4,
        "text_to_image_median_rank": 3.0,
    }
    (entry,) = written(tmp_path, frame("retrieval", values))
    assert entry["task"] == "zeroshot_retrieval"
    assert entry["metrics"] == {"image_retrieval_recall@1": 0.1, "image_retrieval_recall@5": 0.2, "text_retrieval_recall@5": 0.3}
    assert (entry["model"], entry["pretrained"]) == ("mine", "models/mine")


def test_what_they_have_no_name_for_and_single_draws_are_left_out(tmp_path: Path) -> None:
    rows = pl.concat([frame("clip-score", {"mean": 0.3}), frame("zero-shot", {"acc1": 0.1, "mean_per_class": 0.1}, seed=3)])
    assert written(tmp_path, rows) == []
    assert (tmp_path / "benchmark.csv").read_text().strip() == ""
