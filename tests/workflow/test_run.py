"""A whole run in process: outputs, cache, lock, variations, records, comparison and trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import polars as pl
import pytest
import torch
from tests.workflow.conftest import WORKFLOW, write_workflow

from diptych.adapt.interpolation import WiseFTConfig
from diptych.compress.gblm import Config as Pruning
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip
from diptych.pairs.dataset import PairDataset
from diptych.workflow import compare, phases, plan, run, spec, trace
from diptych.workflow.project import Project

OPTIONS = run.Options(in_process=True, quiet=True)


def go(project: Path, *overrides: str) -> run.Outcome:
    return run.run(spec.load(project / "workflows" / "small.yaml", overrides), OPTIONS)


@pytest.fixture
def done(project: Path) -> run.Outcome:
    return go(project)


def test_a_line_names_the_most_frequent_reasons_and_counts_the_rest() -> None:
    left = [{"reason": reason, "count": count} for reason, count in (("d", 2), ("c", 3), ("a", 9), ("e", 1), ("b", 5))]
    figures = {"pairs_in": 100, "kept": 80, "left": left}
    assert run.summary("curate", figures) == "80 of 100 pairs kept; left: a 9, b 5, c 3, other reasons 3"
    assert run.summary("curate", {**figures, "kept": 91, "left": left[2:3]}) == "91 of 100 pairs kept; left: a 9"
    assert run.summary("prune", {"pairs_in": 7, "kept": 7}) == "7 of 7 pairs kept"


def test_a_reason_that_two_methods_give_is_told_with_the_method() -> None:
    left = [
        {"method": name, "reason": reason, "count": count}
        for name, reason, count in (("a", "not drawn", 3), ("b", "dark", 2), ("c", "not drawn", 1))
    ]
    said = run.summary("prune", {"pairs_in": 9, "kept": 3, "left": left})
    assert said == "3 of 9 pairs kept; left: not drawn (a) 3, dark 2, not drawn (c) 1"


def test_a_line_says_how_many_captions_could_not_be_made() -> None:
    figures = {"pairs_in": 7, "kept": 7, "captions_per_pair": 1.25, "report": {"0-a": {"captioned": 5, "captions_failed": 2}, "1-b": {}}}
    assert run.summary("caption", figures) == "7 of 7 pairs kept, 1.2 captions a pair; 2 more could not be made"
    figures["report"] = {"0-a": {"captions_failed": 0, "captions_long": 3}}
    assert run.summary("caption", figures) == "7 of 7 pairs kept, 1.2 captions a pair"


def test_a_run_leaves_outputs_ledgers_lock_report_and_mlflow_runs(project: Path, done: run.Outcome) -> None:
    assert done.ran == list(spec.PHASES)
    for phase in ("ingest", "curate", "prune", "caption"):
        dataset = PairDataset.open(project / "runs" / "small" / phase, verify=True)
        ledger = dataset.manifest.ledger
        assert ledger.pairs_in == ledger.kept + sum(entry.count for entry in ledger.left)
    test = PairDataset.open(project / "runs/small/caption").scan().filter(pl.col("split") == "test").collect()
    assert test.height == 597, "what a model is measured on is never curated"
    assert "digits/zero-shot/acc1" in done.figures["evaluate"]["metrics"]
    page = (project / "runs/small/report.html").read_text()
    assert "The ledger" in page
    assert "http://" not in page
    assert "https://" not in page
    assert not list((project / "runs").glob("**/*.partial*"))
    status = subprocess.run([sys.executable, "-m", "dvc", "status"], cwd=project, capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout, status.stdout
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("diptych").experiment_id])
    names = {found.info.run_name for found in runs}
    assert names == {"small", *(f"small/{phase}" for phase in spec.PHASES)}
    parent = next(found for found in runs if found.info.run_name == "small")
    assert parent.data.metrics["eval/digits/zero-shot/acc1"] == pytest.approx(
        done.figures["evaluate"]["metrics"]["digits/zero-shot/acc1"]["value"]
    )
    assert parent.data.params["train.optimizer.lr"] == "0.001"
    assert all(found.info.status == "FINISHED" for found in runs)


def test_a_second_run_is_cached_and_a_lost_output_comes_back_from_dvc(project: Path, done: run.Outcome) -> None:
    del done
    assert go(project).cached
    shutil.rmtree(project / "runs/small/train")
    again = go(project)
    assert again.cached
    assert (project / "runs/small/train/open_clip_model.safetensors").exists()


UNTOLD = {"wall_s", "driver_cpu_s", "peak_memory_bytes", "predicted_s"}


def test_a_run_made_elsewhere_tells_its_figures_once_dvc_has_fetched_it(project: Path) -> None:
    sweep = {"space": {"evaluate.benchmarks.0.logit_scale": [10.0, 50.0]}, "metric": "digits/zero-shot/acc1", "choose_on": "train"}
    write_workflow(project / "workflows", {**WORKFLOW, "evaluate": {"benchmarks": [{"method": "zero-shot"}], "sweep": sweep}})
    made = go(project)
    shutil.rmtree(project / "runs")
    fetched = go(project)
    assert fetched.cached
    for phase in ("ingest", "curate", "prune", "caption", "compress", "evaluate"):
        assert fetched.figures[phase] == {key: value for key, value in made.figures[phase].items() if key not in UNTOLD}, phase
    assert fetched.figures["train"]["samples_seen"] == made.figures["train"]["samples_seen"]
    page = (project / "runs/small/report.html").read_text()
    assert f"{made.figures['ingest']['pairs_in']:,}" in page
    assert "The winner as reported" in page
    assert f"{made.figures['train']['samples_seen']:,} pictures seen" in run.table(fetched)
    assert go(project, "train.optimizer.lr=0.002").ran == ["train", "compress", "evaluate"]


def test_a_plan_of_a_changed_file_says_what_runs_and_what_it_takes(project: Path, done: run.Outcome) -> None:
    rows = done.figures["ingest"]["pairs_in"]
    write_workflow(project / "workflows", {**WORKFLOW, "data": {**WORKFLOW["data"], "seed": 5}})
    store, lines = plan.plan(spec.load(project / "workflows/small.yaml"))
    assert all(line.state.changed for line in lines)
    ingest, train = lines[0].cost, lines[4].cost
    assert ingest.rows == pytest.approx(rows, rel=0.2)
    assert train.steps == WORKFLOW["train"]["steps"]
    assert train.seconds
    assert train.memory_bytes
    assert train.written_bytes
    assert "nothing to measure" not in plan.text(store, lines)


def test_a_changed_training_parameter_runs_training_and_evaluation_alone(project: Path, done: run.Outcome) -> None:
    lock = (project / "dvc.lock").read_bytes()
    workflow = spec.load(project / "workflows/small.yaml", ["train.optimizer.lr=3e-3"])
    store, lines = plan.plan(workflow)
    assert [line.phase for line in lines if line.state.changed] == ["train", "compress", "evaluate"]
    assert next(line for line in lines if line.phase == "train").state.reasons == ("train.optimizer.lr: 0.001 -> 0.003",)
    assert "train.optimizer.lr: 0.001 -> 0.003" in plan.text(store, lines)
    changed = go(project, "train.optimizer.lr=3e-3")
    assert changed.ran == ["train", "compress", "evaluate"]
    assert (project / "dvc.lock").read_bytes() == lock, "a variation leaves the workflow's lock alone"
    assert go(project, "train.optimizer.lr=3e-3").cached
    found = compare.compare(Project(project), done.name, changed.name)
    assert found.changed == {"train.optimizer.lr": (0.001, 0.003)}
    assert any(row.key == "digits/zero-shot/acc1" for row in found.rows)


def test_runs_measured_differently_are_not_compared(project: Path, done: run.Outcome) -> None:
    other = go(project, "evaluate.benchmarks.zero-shot.templates=['a drawing of {}']")
    assert other.ran == ["evaluate"]
    with pytest.raises(DataError, match="not measured the same way"):
        compare.compare(Project(project), done.name, other.name)
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        compare.compare(Project(project), "smal", other.name)


def test_a_figure_and_a_pair_are_traced(project: Path, done: run.Outcome) -> None:
    del done
    steps = trace.trace(Project(project), "eval/digits/zero-shot/acc1")
    words = [step.what.split()[0] for step in steps]
    assert words == ["figure", "evaluated", "model", "pairs", "pairs", "pairs", "pairs"]
    rejected = PairDataset.open(project / "runs/small/prune").rejects().row(0, named=True)
    fate = trace.trace(Project(project), rejected["key"])
    assert [step.what for step in fate] == ["ingest: kept", "curate: kept", "prune: left"]
    assert f"reason {rejected['reason']}" in fate[-1].facts


def test_a_sweep_is_chosen_on_one_split_and_reported_on_another(project: Path) -> None:
    sweep = {
        "space": {"evaluate.benchmarks.0.templates": [["{}"], ["the number {}"]], "evaluate.benchmarks.0.logit_scale": [10.0, 50.0]},
        "metric": "digits/zero-shot/log_loss",
        "mode": "min",
        "choose_on": "train",
    }
    write_workflow(project / "workflows", {**WORKFLOW, "evaluate": {"benchmarks": [{"method": "zero-shot"}], "sweep": sweep}})
    found = go(project).figures["evaluate"]["sweep"]
    table = pl.read_parquet(project / "runs/small/evaluate/sweep.parquet")
    scores = table.filter(pl.col("metric") == "digits/zero-shot/log_loss")
    assert scores.height == found["tried"] == 4
    assert found["winner_value"] == pytest.approx(scores["value"].min())
    assert found["winner_metrics"]["digits/zero-shot/acc1"]["n"] == 597


def test_a_training_axis_trains_each_setting_and_optuna_proposes(project: Path) -> None:
    sweep = {
        "space": {"train.optimizer.lr": {"min": 1e-4, "max": 1e-2, "log": True}},
        "metric": "digits/zero-shot/acc1",
        "search": "optuna",
        "trials": 2,
        "choose_on": "train",
    }
    write_workflow(project / "workflows", {**WORKFLOW, "evaluate": {"benchmarks": [{"method": "zero-shot"}], "sweep": sweep}})
    found = go(project).figures["evaluate"]["sweep"]
    assert found["tried"] == 2
    trained = [
        json.loads(path.read_text())["params"]["train"]["optimizer"]["lr"]
        for path in (project / "runs").glob("small+*/.records/train.json")
    ]
    assert found["winner"]["train.optimizer.lr"] in trained
    assert len(set(trained)) == 2


def test_an_axis_of_any_phase_makes_its_settings_anew(project: Path) -> None:
    sweep = {
        "space": {"compress.magnitude.sparsity": [0.0, 0.9], "prune.concept-pruning.keep": [0.5, 0.9]},
        "metric": "digits/zero-shot/log_loss",
        "mode": "min",
        "choose_on": "train",
        "pareto": {"compress.magnitude.sparsity": "max", "digits/zero-shot/acc1": "max"},
    }
    changed = {**WORKFLOW, "compress": [{"method": "magnitude"}], "evaluate": {"benchmarks": [{"method": "zero-shot"}], "sweep": sweep}}
    write_workflow(project / "workflows", changed)
    outcome = go(project)
    table = pl.read_parquet(project / "runs/small/evaluate/sweep.parquet").filter(pl.col("metric") == "digits/zero-shot/log_loss")
    assert table["value"].n_unique() == 4
    assert (table["low"] < table["value"]).all()
    assert (table["value"] < table["high"]).all()
    zeros = {
        record["params"]["compress"][0]["sparsity"]: record["figures"]["report"]["magnitude"]["overall"]
        for record in map(json.loads, (path.read_text() for path in (project / "runs").glob("small+*/.records/compress.json")))
    }
    assert zeros[0.9] == pytest.approx(0.9, abs=0.01)
    assert zeros[0.0] < 0.1
    assert "Pareto front" in (project / "runs/small/report.html").read_text()
    assert outcome.figures["evaluate"]["sweep"]["tried"] == 4


def test_a_changed_source_file_runs_ingest_again(project: Path) -> None:
    pytest.importorskip("PIL")
    from diptych.cli.main import main

    assert main(["data", "ingest", "digits", str(project / "pairs"), "train=80"]) == 0
    assert main(["data", "export", str(project / "pairs"), str(project / "tars")]) == 0
    data = {"source": "webdataset", "path": str(project / "tars" / "train-*.tar")}
    write_workflow(project / "workflows", {**WORKFLOW, "data": data, "evaluate": {"benchmarks": [], "sweep": None}})
    until = run.Options(in_process=True, quiet=True, until="ingest")

    def ingest() -> run.Outcome:
        return run.run(spec.load(project / "workflows/small.yaml"), until)

    assert ingest().ran == ["ingest"]
    assert ingest().cached
    assert main(["data", "ingest", "digits", str(project / "pairs"), "train=70"]) == 0
    shutil.rmtree(project / "tars")
    assert main(["data", "export", str(project / "pairs"), str(project / "tars")]) == 0
    again = ingest()
    assert again.ran == ["ingest"]
    assert again.reasons["ingest"] == ("the source's files changed",)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asha_stops_poor_settings_early_and_finishes_good_ones(project: Path) -> None:
    sweep = {
        "space": {"train.optimizer.lr": [1e-7, 3e-3, 1e-6, 2e-3]},
        "metric": "digits/zero-shot/acc1",
        "search": "random",
        "scheduler": "asha",
        "trials": 4,
        "choose_on": "train",
    }
    train = {**WORKFLOW["train"], "steps": 40, "batch_size": 32}
    write_workflow(
        project / "workflows", {**WORKFLOW, "train": train, "evaluate": {"benchmarks": [{"method": "zero-shot"}], "sweep": sweep}}
    )
    outcome = run.run(spec.load(project / "workflows/small.yaml"), run.Options(quiet=True))
    found = outcome.figures["evaluate"]["sweep"]
    table = pl.read_parquet(project / "runs/small/evaluate/sweep.parquet").filter(pl.col("metric") == "digits/zero-shot/acc1")
    assert set(table["status"]) <= {"done", "stopped"}
    finished = table.filter(pl.col("status") == "done")
    assert finished.height >= 1
    assert found["winner_value"] == pytest.approx(finished["value"].max()), "only a finished training can win"
    trained = [
        json.loads(path.read_text())["params"]["train"]["optimizer"]["lr"]
        for path in (project / "runs").glob("small+*/.records/train.json")
    ]
    assert found["winner"]["train.optimizer.lr"] in trained
    assert not [path for path in (project / "runs" / ".scratch").glob("small+*") if path.is_dir()], "only lock files stay"


def test_compressors_see_as_many_pairs_as_they_ask_for_and_their_model_is_measured(project: Path, done: run.Outcome) -> None:
    dataset, encoder = PairDataset.open(project / "runs/small/caption"), clip.load(project / "runs/small/train")
    wanted = Pruning(calibration_pairs=50, calibration_batch=20)
    calibration = phases.Calibration.of(wanted, dataset, encoder)
    first, again = list(calibration), list(calibration)
    assert [len(batch["image_NCHW"]) for batch in first] == [20, 20, 10] == [len(batch["text_NL"]) for batch in first]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(first, again, strict=True) for name in one)
    assert phases.Calibration.of(WiseFTConfig(origin="x"), dataset, encoder).pairs == 256
    methods = (
        "[{method: gblm, calibration_pairs: 40, calibration_batch: 20},"
        " {method: perp, rank: 2, steps: 3, calibration_pairs: 40, calibration_batch: 20},"
        " {method: flap, calibration_pairs: 40, calibration_batch: 20}]"
    )
    changed = go(project, f"compress={methods}")
    report = changed.figures["compress"]["report"]
    said = run.summary("compress", changed.figures["compress"])
    assert f"{report['gblm']['overall']:.1%} of {report['gblm']['weights']:,} weights are zero" in said
    assert f"{report['flap']['before']['parameters']:,} to {report['flap']['after']['parameters']:,} parameters" in said
    assert report["gblm"]["overall"] > 0.4
    assert report["perp"]["trained_share"] < 0.1
    assert report["flap"]["after"]["parameters"] < report["flap"]["before"]["parameters"]
    small = next((project / "runs").glob("small+*/compress"))
    assert sum(p.numel() for p in clip.load(small).parameters()) == report["flap"]["after"]["parameters"]
    assert changed.figures["evaluate"]["metrics"] != done.figures["evaluate"]["metrics"]


def test_a_folder_of_a_workflows_name_is_not_taken_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "mine.yaml").write_text("")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Project(tmp_path).workflow_path("mine") == tmp_path / "workflows" / "mine.yaml"
