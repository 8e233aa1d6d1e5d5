"""The workflow file: everything wrong is said at once, with paths and nearest names; overrides reach every value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tests.workflow.conftest import WORKFLOW, write_workflow

from diptych.core.errors import ConfigError, ResourceError
from diptych.workflow import identity, spec, yaml
from diptych.workflow.project import Project

ROOT = Path(__file__).parents[2]


def check(**changes: Any) -> spec.Workflow:
    return spec.check({**copy.deepcopy(WORKFLOW), **changes}, Path("small.yaml"))


def test_a_workflow_with_five_mistakes_names_all_five() -> None:
    with pytest.raises(ConfigError) as caught:
        check(
            prune=[{"method": "semantic-dedup", "epsilon": 7}, {"method": "concept-prunning", "keep": 0.5}],
            train={**WORKFLOW["train"], "batch_sise": 12, "batch_size": "many", "model": "vit-nano-46"},
            curat=[],
        )
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) >= {"prune.0.epsilon", "prune.1.method", "train.batch_sise", "train.batch_size", "train.model", "curat"}
    assert found["prune.1.method"].fix == "did you mean 'concept-pruning'?"
    assert found["train.batch_sise"].fix == "did you mean 'batch_size'?"
    assert found["train.model"].fix == "did you mean 'vit-nano-64'?"
    assert found["curat"].fix == "did you mean 'curate'?"
    assert "less than" in found["prune.0.epsilon"].expected


def test_a_method_of_another_phase_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match="belongs to the phase 'curate'"):
        check(prune=[{"method": "metaclip"}])


def test_an_unknown_key_of_the_data_may_be_one_of_the_ingest() -> None:
    with pytest.raises(ConfigError) as caught:
        check(data={"source": "folder", "path": "photos", "max_bad_shre": 0.5, "tabel": "a.csv"})
    found = {problem.where: problem for problem in caught.value.problems}
    assert found["data.max_bad_shre"].fix == "did you mean 'max_bad_share'?"
    assert found["data.tabel"].fix == "did you mean 'table'?"
    assert found["data.tabel"].expected.startswith("one of the keys source, path, table, ")


def test_a_missing_phase_is_refused_since_dvc_locks_every_key() -> None:
    raw = copy.deepcopy(WORKFLOW)
    del raw["compress"]
    with pytest.raises(ConfigError) as caught:
        spec.check(raw, Path("small.yaml"))
    assert [(problem.where, problem.fix) for problem in caught.value.problems] == [("compress", "add `compress: []`")]


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "workflows").glob("*.yaml")) + sorted((ROOT / "workflows" / "examples").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_what_is_shipped_is_in_order(path: Path) -> None:
    assert spec.load(path).name == path.stem


def test_batches_that_do_not_divide_and_too_many_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        check(train={**WORKFLOW["train"], "workers": 3})
    with pytest.raises(ResourceError, match="More workers than cores"):
        spec.check_resources(check(train={**WORKFLOW["train"], "workers": 4}), cores=2)
    spec.check_resources(check(), cores=1)


def test_elastic_workers_need_a_batch_that_divides_by_every_number_of_them() -> None:
    train = {**WORKFLOW["train"], "batch_size": 24}
    elastic = check(train={**train, "workers": 4, "min_workers": 2})
    assert elastic.train.least_workers == 2
    spec.check_resources(elastic, cores=2)
    with pytest.raises(ResourceError, match="More workers than cores"):
        spec.check_resources(elastic, cores=1)
    with pytest.raises(ConfigError, match="elastic training may come to: 2 to 5 workers"):
        check(train={**train, "workers": 5, "min_workers": 2})
    with pytest.raises(ConfigError, match="min_workers 3 is more than workers 2"):
        check(train={**train, "workers": 2, "min_workers": 3})


def test_overrides_reach_mappings_lists_by_index_and_methods_by_name(tmp_path: Path) -> None:
    path = write_workflow(tmp_path, WORKFLOW)
    workflow = spec.load(
        path,
        ["train.optimizer.lr=3e-4", "prune.1.keep=0.5", "prune.semantic-dedup.epsilon=0.2", "evaluate.benchmarks.zero-shot.topk=[1, 3]"],
    )
    assert workflow.optimizer.plain()["lr"] == 3e-4
    assert workflow.prune[1].plain()["keep"] == 0.5
    assert workflow.prune[0].plain()["epsilon"] == 0.2
    assert workflow.benchmarks[0].plain()["topk"] == [1, 3]
    assert spec.load(path).digest != workflow.digest


def test_wrong_overrides_are_all_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = write_workflow(tmp_path, WORKFLOW)
    with pytest.raises(ConfigError) as caught:
        spec.load(path, ["train.optimizer.lr", "prune.semantic-dedupe.epsilon=1", "seed.x=1"])
    assert len(caught.value.problems) == 3
    assert "did you mean 'semantic-dedup'?" in str(caught.value)


def test_a_sweep_is_checked_by_trying_its_axes() -> None:
    sweep = {"space": {"train.optimizer.lrr": [1e-3]}, "metric": "digits/zero-shot/acc1"}
    with pytest.raises(ConfigError, match="lrr"):
        check(evaluate={**WORKFLOW["evaluate"], "sweep": sweep})
    with pytest.raises(ConfigError, match="a grid needs lists"):
        check(evaluate={**WORKFLOW["evaluate"], "sweep": {"space": {"train.optimizer.lr": {"min": 1e-4, "max": 1e-2}}, "metric": "x"}})


def test_yaml_is_1_2_and_refuses_a_key_twice() -> None:
    data = yaml.parse("{a: 3e-4, b: no, e: 2026-01-01}", "x")
    assert data == {"a": 3e-4, "b": "no", "e": "2026-01-01"}
    with pytest.raises(ConfigError, match="stands twice"):
        yaml.parse("a: 1\na: 2\n", "w.yaml")
    with pytest.raises(ConfigError, match=r"w\.yaml:3"):
        yaml.parse("a: 1\nb: [1, 2\nc: 3\n", "w.yaml")


def test_a_file_that_is_not_there_names_its_neighbours(tmp_path: Path) -> None:
    write_workflow(tmp_path, WORKFLOW)
    with pytest.raises(ConfigError, match=r"small\.yaml"):
        spec.load(tmp_path / "smal.yaml")


def test_dvc_yaml_lists_the_same_keys_rooms_and_inputs_as_the_code() -> None:
    stages = yaml.read(ROOT / "dvc.yaml")["stages"]
    assert tuple(stages) == spec.PHASES
    for phase, stage in stages.items():
        work = stage["do"]
        assert work["cmd"] == f"diptych phase {phase} workflows/${{item}}.yaml"
        assert tuple(next(iter(work["params"][0].values()))) == spec.KEYS[phase]
        rooms = [f"platform/diptych/{room}" for room in identity.ROOMS[phase]]
        inputs = [f"runs/${{item}}/{name}" for name in identity.INPUTS[phase]]
        assert work["deps"] == rooms + inputs
        assert work["outs"] == [f"runs/${{item}}/{phase}"]


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_workflow_is_valid_and_listed(path: Path) -> None:
    workflow = spec.load(path)
    assert workflow.name == path.stem
    listed = yaml.read(ROOT / "dvc.yaml")["vars"][0]["workflows"]
    assert path.stem in listed


@pytest.mark.parametrize("path", sorted((ROOT / "workflows" / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_valid_and_found_by_its_name(path: Path) -> None:
    assert spec.load(path).name == path.stem
    assert Project(ROOT).workflow_path(path.stem) == path


def test_a_growing_batch_is_checked_and_counts_for_the_identity() -> None:
    growth = {"method": "adadagrad", "max_batch_size": 64}
    found = check(train={**WORKFLOW["train"], "batch_growth": growth})
    assert found.params("train")["train"]["batch_growth"]["eta"] == 0.5  # defaults are filled in
    assert found.digest != check().digest
    for changes, where in (
        ({"batch_growth": {**growth, "max_batch_size": 31}}, "train.batch_growth.max_batch_size"),
        ({"batch_growth": growth, "optimizer": {"method": "sophiag"}}, "train.batch_growth"),
        ({"batch_growth": growth, "optimizer": {"method": "adalora"}}, "train.batch_growth"),
        ({"batch_growth": {"method": "adamw"}}, "train.batch_growth.method"),
        ({"batch_growth": {**growth, "eta": -1.0}}, "train.batch_growth.eta"),
    ):
        with pytest.raises(ConfigError) as caught:
            check(train={**WORKFLOW["train"], **changes})
        assert [problem.where for problem in caught.value.problems] == [where]


def test_an_adapter_needs_a_start_and_no_averaged_weights() -> None:
    optimizer = {"method": "adalora", "adapter": "peft", "projections": False}
    with pytest.raises(ConfigError) as caught:
        check(train={**WORKFLOW["train"], "optimizer": optimizer, "ema": 0.9})
    assert [problem.where for problem in caught.value.problems] == ["train.init", "train.ema"]
    with pytest.raises(ConfigError, match="projections: false"):
        check(train={**WORKFLOW["train"], "init": "models/a", "optimizer": {"method": "adalora", "adapter": "peft"}})
    check(train={**WORKFLOW["train"], "init": "models/a", "optimizer": optimizer})


def test_the_frontier_of_guided_captioning_is_a_sweep() -> None:
    sweep = {
        "space": {"evaluate.benchmarks.captioning.guidance": [1.0, 1.5, 2.0, 3.0]},
        "metric": "small/captioning/cider",
        "pareto": {"small/captioning/clip_score": "max", "small/captioning/cider": "max"},
    }
    evaluate = {"benchmarks": [{"method": "captioning"}], "sweep": sweep}
    train = {**WORKFLOW["train"], "model": "coca-digits-16", "objective": {"method": "coca", "drop": 0.5}}
    assert check(train=train, evaluate=evaluate).sweep is not None
    with pytest.raises(ConfigError, match=r"evaluate\.sweep\.space\.evaluate\.benchmarks\.captioning\.guidanc"):
        check(train=train, evaluate={**evaluate, "sweep": {**sweep, "space": {"evaluate.benchmarks.captioning.guidanc": [1.0]}}})


def test_the_captioner_of_the_caption_phase_counts_for_its_identity(tmp_path: Path) -> None:
    model = tmp_path / "captioner"
    model.mkdir()
    (model / "open_clip_config.json").write_text("{}")
    workflow = check(caption=[{"method": "cfg-captioning", "model": str(model)}])
    before = workflow.models("caption")
    assert list(before) == [str(model)]
    (model / "open_clip_model.safetensors").write_text("weights")
    assert workflow.models("caption") != before
