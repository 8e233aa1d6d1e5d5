"""Many checkpoints on many sets: pictures decoded once, towers run once, results where other verbs and other programs find them."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import mlflow
import polars as pl
import pytest
from tests.evaluation_sets import write_set

from diptych.cli.main import main
from diptych.core.errors import ConfigError, DataError
from diptych.engine.features import View
from diptych.models import clip
from diptych.workflow import matrix, matrix_page, yaml
from diptych.workflow.project import Project

NAMES = ["cat", "dog", "owl", "hen", "fox", "bee"]
RETRIEVAL = {"method": "retrieval", "ks": [1, 5]}


@pytest.fixture
def raw(project: Path) -> dict[str, Any]:
    """Two checkpoints of one size and one of another, on a classification and a retrieval set."""
    for name, architecture, seed in (("a", "digits-16", 1), ("b", "digits-16", 2), ("c", "vit-micro-40", 3)):
        clip.save(clip.create(architecture, seed), project / "models" / name, {})
    write_set(project / "pets", labels=[number % 6 for number in range(30)], names=NAMES, shards=2)
    write_set(project / "flickr", captions=[f"picture {number}\nscene {number}" for number in range(8)], seed=7)
    return {
        "name": "zoo",
        "models": {name: str(project / "models" / name) for name in "abc"},
        "sets": {
            "pets": {"data": {"source": "clip-benchmark", "path": str(project / "pets")}},
            "flickr": {"data": {"source": "clip-benchmark", "path": str(project / "flickr")}, "benchmarks": [RETRIEVAL]},
        },
        "benchmarks": [{"method": "zero-shot", "templates": "set"}],
    }


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Pictures decoded, pictures encoded, texts encoded."""
    counts = {"decoded": 0, "images": 0, "texts": 0}
    originals = View.of, clip.DualEncoder.encode_image, clip.DualEncoder.encode_text

    def decode(*arguments: Any) -> Any:
        counts["decoded"] += 1
        return originals[0](*arguments)

    def image(model: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        counts["images"] += len(batch)
        return originals[1](model, batch, *arguments, **options)

    def text(model: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        counts["texts"] += len(batch)
        return originals[2](model, batch, *arguments, **options)

    monkeypatch.setattr(View, "of", decode)
    monkeypatch.setattr(clip.DualEncoder, "encode_image", image)
    monkeypatch.setattr(clip.DualEncoder, "encode_text", text)
    return counts


def go(project: Path, raw: dict[str, Any], **changes: Any) -> matrix.Outcome:
    return matrix.run(matrix.check({**copy.deepcopy(raw), **changes}), Project(project), quiet=True)


def test_pictures_are_decoded_once_a_size_and_a_second_run_with_one_more_metric_runs_no_tower(
    project: Path, raw: dict[str, Any], work: dict[str, int]
) -> None:
    first = go(project, raw)
    assert work == {"decoded": 2 * (30 + 8), "images": 3 * (30 + 8), "texts": 3 * (6 * 2 + 8 * 2)}
    work.update(decoded=0, images=0, texts=0)
    more = {"method": "zero-shot", "templates": "set", "topk": [1, 3], "task": "zero-shot-3"}
    second = go(project, raw, benchmarks=[*raw["benchmarks"], more])
    assert work == {"decoded": 0, "images": 0, "texts": 0}
    assert ("a", "pets") in second.cells
    assert [m.value for m in first.cells["a", "pets"].metrics] == [
        m.value for m in second.cells["a", "pets"].metrics if m.task == "zero-shot"
    ]
    other_words = go(project, raw, benchmarks=[{"method": "zero-shot", "templates": ["an animal: {}"]}])
    assert work == {"decoded": 0, "images": 0, "texts": 3 * 6}
    settings = [found.cells["a", "pets"].metrics[0].settings["templates"] for found in (first, other_words)]
    assert settings[0] != settings[1]


def test_a_cell_is_what_the_checkpoint_gives_alone(project: Path, raw: dict[str, Any]) -> None:
    together = go(project, raw)
    for path in (project / "runs" / ".cache").rglob("*.npy"):
        path.unlink()
    alone = go(project, raw, models={"b": raw["models"]["b"]}, together=1)
    for name in ("pets", "flickr"):
        assert alone.cells["b", name].rows.drop("notes").equals(together.cells["b", name].rows.drop("notes"))


def test_results_lie_where_compare_mlflow_and_clip_benchmarks_tools_look(
    project: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = go(project, raw)
    rows = pl.read_parquet(project / "runs/zoo/rows.parquet")
    assert set(rows["checkpoint"]) == {"a", "b", "c"}
    assert set(rows["set"]) == {"pets", "flickr"}
    monkeypatch.chdir(project)
    assert main(["compare", "zoo/a", "zoo/b"]) == 0
    compared = capsys.readouterr().out
    assert "pets/zero-shot/acc1" in compared
    assert "flickr/retrieval/text_to_image_r1" in compared
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("diptych").experiment_id])}
    assert set(runs) == {"zoo/a", "zoo/b", "zoo/c"}
    value = rows.filter(pl.col("checkpoint") == "b", pl.col("set") == "pets", pl.col("metric") == "acc1")["value"].item()
    assert runs["zoo/b"].data.metrics["eval/pets/zero-shot/acc1"] == value
    assert {entry.dataset.name for entry in runs["zoo/b"].inputs.dataset_inputs} == {"pets", "flickr"}
    with (project / "runs/zoo/clip_benchmark/benchmark.csv").open() as file:
        table = {(row["dataset"], row["model"]): row for row in csv.DictReader(file)}
    assert float(table["pets", "b"]["acc1"]) == value
    assert table["flickr", "c"]["task"] == "zeroshot_retrieval"
    assert len(list((project / "runs/zoo/clip_benchmark").glob("*.json"))) == 6
    page = (project / "runs/zoo/matrix.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert f"{value:.4f}" in page
    text = matrix.text(outcome)
    assert "diptych compare zoo/a zoo/b" in text
    (line,) = [line for line in text.splitlines() if line.startswith("b ")]
    assert f"{value:.3f} ±" in line
    assert not list((project / "runs").glob("**/*.partial*"))


def test_every_mistake_of_a_matrix_file_is_named(project: Path, raw: dict[str, Any]) -> None:
    wrong = {
        **raw, "benchmarcs": [], "precision": "quarter", "training": "nowhere", "benchmarks": [{"method": "zero-shot", "topk": [5, 1]}],
        "models": {"A": raw["models"]["a"], "b": str(project / "pets"), "d": "digits-17"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        matrix.check(wrong)
    assert {problem.where for problem in caught.value.problems} >= {"benchmarcs", "precision", "benchmarks.0.topk"}
    with pytest.raises(ConfigError) as caught:
        matrix.check({**raw, "training": "nowhere", "models": wrong["models"], "sets": {**raw["sets"], "x": {"data": {"source": "emojy"}}}})
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) == {"training", "models.A", "models.b", "models.d", "sets.x.data.source"}
    assert found["models.d"].fix == "did you mean 'digits-16'?"


def test_a_bad_set_is_refused_before_anything_is_measured(project: Path, raw: dict[str, Any], work: dict[str, int]) -> None:
    write_set(project / "bad", labels=[0, 9], names=["cat", "dog"])
    raw["sets"]["bad"] = {"data": {"source": "clip-benchmark", "path": str(project / "bad")}}
    with pytest.raises(DataError, match="do not fit") as caught:
        go(project, raw)
    assert caught.value.problems[0].where == "set bad: test/0/s0000001"
    assert work == {"decoded": 0, "images": 0, "texts": 0}
    assert not (project / "runs" / "zoo").exists()


def test_an_architecture_with_random_weights_and_a_pair_dataset_are_fine_too(project: Path, raw: dict[str, Any]) -> None:
    go(project, raw, models={"a": raw["models"]["a"]})
    (folder,) = (project / "runs/.cache/sets").glob("pets-*")
    changes = {"models": {"fresh": "digits-16"}, "sets": {"again": {"data": str(folder)}}, "name": "other"}
    one, other = (go(project, raw, **changes, seed=seed) for seed in (1, 2))
    values = [found.cells["fresh", "again"].metrics[-1].value for found in (one, other, go(project, raw, **changes, seed=1))]
    assert values[0] == values[2] != values[1]


def test_the_verb(project: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project)
    (project / "zoo.yaml").write_text(yaml.dump(raw))
    assert main(["evaluate", "zoo.yaml", "precision=half", "--quiet"]) == 0
    assert "zoo/matrix.html" in capsys.readouterr().out
    assert main(["evaluate", "zoo.yaml", "precision=quarter"]) == 2
    assert "precision" in capsys.readouterr().err


def test_the_tables_headline_is_the_figure_one_looks_for_first() -> None:
    metrics = [("s", "zero-shot", "acc5"), ("s", "zero-shot", "acc1"), ("s", "other", "score"), ("t", "retrieval", "text_to_image_r1")]
    rows = pl.DataFrame(
        [
            {"checkpoint": model, "set": s, "task": t, "metric": m, "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "seed": None}
            for model in ("a", "long-name")
            for s, t, m in metrics
            if not (model == "a" and s == "t")
        ],
        schema_overrides={"seed": pl.Int64},
    )
    assert matrix_page.headlines(rows) == [("s", "zero-shot", "acc1"), ("s", "other", "score"), ("t", "retrieval", "text_to_image_r1")]
    lines = matrix_page.text(rows, {"s": ["odd"]}).splitlines()
    assert lines[3].split() == ["a", "0.500", "±", "0.100", "0.500", "±", "0.100"]
    assert lines[-1] == "  s: odd"
