"""Sets beside a workflow's own data: checked with key paths, brought in once, refused or flagged when they are registered."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tests.evaluation_sets import write_set
from tests.workflow.conftest import WORKFLOW, write_workflow

from diptych.core.errors import ConfigError, DataError
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources.clip_benchmark import Config as ClipBenchmark
from diptych.workflow import run, sets, spec

ZERO_SHOT = {"method": "zero-shot", "templates": "set"}
NAMES = ["cat", "dog", "owl"]


def one(folder: Path, *benchmarks: dict[str, Any], **source: Any) -> sets.EvaluationSet:
    checks = sets.Checks()
    data = {"source": "clip-benchmark", "path": str(folder), "max_bad_share": 1.0, **source}
    (found,) = sets.check({"pets": {"data": data, "benchmarks": list(benchmarks) or [ZERO_SHOT]}}, (), "sets", checks)
    checks.refuse()
    return found


def check(found: Any) -> spec.Workflow:
    return spec.check({**copy.deepcopy(WORKFLOW), "evaluate": {**WORKFLOW["evaluate"], "sets": found}}, Path("small.yaml"))


def test_every_mistake_of_a_set_is_named_with_its_key_path() -> None:
    with pytest.raises(ConfigError) as caught:
        check(
            {
                "Pets": {"data": {"source": "clip-benchmark", "path": "x"}},
                "pets": {"data": {"source": "clip-benchmrk", "path": "x"}},
                "cars": {"data": {"source": "clip-benchmark", "pth": "x"}, "benchmarks": [{"method": "zero-shott"}]},
                "food": {"data": "nowhere"},
                "sun": {"dat": {}},
                "dtd": {"data": {"source": "clip-benchmark", "path": "x", "max_bad_share": 3.0}},
            }
        )
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) == {
        "evaluate.sets.Pets", "evaluate.sets.pets.data.source", "evaluate.sets.cars.data.pth", "evaluate.sets.cars.data.path",
        "evaluate.sets.cars.benchmarks.0.method", "evaluate.sets.food.data", "evaluate.sets.sun.dat", "evaluate.sets.sun.data",
        "evaluate.sets.dtd.data.max_bad_share",
    }  # fmt: skip
    assert found["evaluate.sets.pets.data.source"].fix == "did you mean 'clip-benchmark'?"
    assert found["evaluate.sets.sun.dat"].fix == "did you mean 'data'?"
    with pytest.raises(ConfigError, match=r"evaluate\.sets"):
        check(["pets"])


def test_a_set_without_a_list_of_its_own_takes_the_files(tmp_path: Path) -> None:
    data = {"source": "clip-benchmark", "path": str(tmp_path)}
    workflow = check({"a": {"data": data}, "b": {"data": data, "benchmarks": [{"method": "retrieval"}]}})
    assert [one.benchmarks == workflow.benchmarks for one in workflow.sets] == [True, False]
    assert "sets" in workflow.params("evaluate")["evaluate"]
    assert "sets" not in check(None).params("evaluate")["evaluate"]
    raw = {**copy.deepcopy(WORKFLOW), "evaluate": {"benchmarks": [], "sets": {"a": {"data": data}}}}
    with pytest.raises(ConfigError, match="at least one benchmark"):
        spec.check(raw, Path("small.yaml"))


def test_a_set_is_brought_in_once_and_again_when_its_files_or_parameters_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "pets", labels=[0, 1, 2, 0, 1, 2], names=NAMES)
    first = sets.register(one(folder), tmp_path / "cache")
    assert first.flags == ()
    assert len(first.dataset) == 6
    with monkeypatch.context() as patch:
        patch.setattr(sets, "ingest_all", lambda *_, **__: pytest.fail("brought in again"))
        assert sets.register(one(folder), tmp_path / "cache").dataset.digest == first.dataset.digest
    assert sets.register(one(folder, duplicate_names=True), tmp_path / "cache").dataset.root != first.dataset.root
    (folder / "classnames.txt").write_text("hen\ndog\nowl\n")
    renamed = sets.register(one(folder), tmp_path / "cache")
    assert renamed.dataset.read()["label_name"][0] == "hen"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": [0, 1, 2, 3]}, "do not fit"),
        ({"labels": [0, 1, 2, 3], "names": ["cat"]}, "do not fit"),
        ({"names": ["cat", "dog", "cat"]}, "share a name"),
        ({"names": ["cat", "", "owl"]}, "has no name"),
        ({"templates": ["a {c}", "an animal"]}, "does not render"),
        ({"templates": ["a {c}", "a {c}"]}, "cannot be used"),
    ],
)
def test_a_set_that_cannot_give_right_figures_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write_set(tmp_path / "pets", **{"labels": [0, 1, 2, 0, 1, 2], "names": NAMES, **changes})
    with pytest.raises(DataError, match=words) as caught:
        sets.register(one(folder), tmp_path / "cache")
    assert caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": [0, 0, 2, 2]}, "1 of 3 classes have no example in the split test (dog)"),
        ({"labels": [0, 0, 1, 1, 2]}, "1 of 3 classes have a single example in the split test (owl)"),
        ({"labels": [0, 0, 1, 1, 2, 2, "x"]}, "1 of 7 examples could not be used (class is not a number), e.g. test/0/s0000006"),
    ],
)
def test_what_a_reader_must_know_is_flagged(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write_set(tmp_path / "pets", **{"labels": [0, 1, 2, 0, 1, 2], "names": NAMES, **changes})
    (flag,) = sets.register(one(folder), tmp_path / "cache").flags
    assert flag.startswith(words)


def test_pictures_that_training_has_seen_are_counted_once_for_all_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "pets", labels=[0, 1, 2, 0, 1, 2], names=NAMES)
    write_set(tmp_path / "seen", labels=[0, 1, 2, 0], names=NAMES, split="test")
    (tmp_path / "seen" / "test").rename(tmp_path / "seen" / "train")
    training = ingest_all(ClipBenchmark(path=str(tmp_path / "seen"), splits=("train",)).build(), tmp_path / "training")
    (flag,) = sets.register(one(folder), tmp_path / "cache", training).flags
    assert flag.startswith("4 of 6 pictures (66.7%) have a near copy among the training pairs")
    monkeypatch.setattr("diptych.engine.features.pictures", lambda *_: pytest.fail("a picture was read"))
    assert sets.register(one(folder), tmp_path / "cache", training).flags == (flag,)
    assert sets.register(dataclasses.replace(one(folder), overlap=False), tmp_path / "cache", training).flags == ()
    other = ingest_all(ClipBenchmark(path=str(folder)).build(), tmp_path / "no-training")
    assert sets.register(one(folder), tmp_path / "cache", other).flags == ()


def test_a_workflow_measures_its_sets_and_says_what_is_odd_about_them(project: Path) -> None:
    folder = write_set(project / "pets", labels=[0, 1, 2, 0, 1], names=NAMES)
    flickr = write_set(project / "flickr", captions=["a cat\nthe cat", "a dog", "an owl"], seed=3)
    found = {
        "pets": {"data": {"source": "clip-benchmark", "path": str(folder)}, "benchmarks": [ZERO_SHOT]},
        "flickr": {"data": {"source": "clip-benchmark", "path": str(flickr)}, "benchmarks": [{"method": "retrieval", "ks": [1]}]},
    }
    write_workflow(project / "workflows", {**WORKFLOW, "evaluate": {**WORKFLOW["evaluate"], "sets": found}})
    outcome = run.run(spec.load(project / "workflows" / "small.yaml"), run.Options(in_process=True, quiet=True))
    metrics = outcome.figures["evaluate"]["metrics"]
    assert {"digits/zero-shot/acc1", "pets/zero-shot/acc1", "flickr/retrieval/text_to_image_r1"} <= set(metrics)
    assert metrics["flickr/retrieval/text_to_image_r1"]["n"] == 4
    rows = pl.read_parquet(project / "runs/small/evaluate/rows.parquet")
    (notes,) = rows.filter(pl.col("set") == "pets")["notes"].unique()
    assert any("single example in the split test (owl)" in note for note in json.loads(notes))
    assert run.run(spec.load(project / "workflows" / "small.yaml"), run.Options(in_process=True, quiet=True)).cached
    (folder / "classnames.txt").write_text("cat\ndog\nhen\n")
    again = run.run(spec.load(project / "workflows" / "small.yaml"), run.Options(in_process=True, quiet=True))
    assert again.ran == ["evaluate"]
    assert again.reasons["evaluate"] == ("an evaluation set's files changed",)
