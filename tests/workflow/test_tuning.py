"""Arms that choose their own values: axes, the choice, and a claim that runs with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.workflow.conftest import WORKFLOW

from diptych.core.errors import ConfigError, DataError
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.workflow import claim, claim_page, problems, reproductions, spec, tuning, yaml
from diptych.workflow.project import Project
from diptych.workflow.tuning import Tuning

ARMS: dict[str, dict[str, Any]] = {
    "slow": {},
    "best": {"train.optimizer.lr": {"tune": [0.001, 0.5, 0.01]}, "train.optimizer.momentum": {"tune": [0.0]}},
}


def claim_file(**changes: Any) -> dict[str, Any]:
    return {
        "claim": "tuned",
        "about": "A test of <axes>.",
        "seeds": [0, 1, 2],
        "tuning": {"metric": "problem/loss", "mode": "min", "seed": 9},
        "base": {
            "name": "claim-tuned",
            "seed": 0,
            "problem": {"method": "quadratic", "curvature_from": 0.5, "curvature_to": 1.0},
            "train": {"optimizer": {"method": "sgdp", "lr": 0.001, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}, "steps": 20},
        },
        "arms": ARMS,
        "demands": [{"better": "best", "worse": "slow", "metric": "problem/log_loss", "direction": "lower", "least": 0.5}],
        **changes,
    }


def written(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "workflows" / "claims" / "tuned.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.dump(data))
    return path


def test_axes_and_their_grid() -> None:
    assert tuning.points(ARMS["slow"]) == []
    assert tuning.points({"a": {"tune": [1, 2]}, "b": 0, "c": {"tune": [3, 4]}, "d": {"tune": 1, "e": 2}}) == [
        {"a": 1, "c": 3}, {"a": 1, "c": 4}, {"a": 2, "c": 3}, {"a": 2, "c": 4},
    ]  # fmt: skip
    assert tuning.settled({"a": {"tune": [1, 2]}, "b": 0}) == {"a": 1, "b": 0}
    assert tuning.settled({"a": {"tune": [1, 2]}, "b": 0}, {"a": 2}) == {"a": 2, "b": 0}


def row(value: float, figure: float | None) -> dict[str, Any]:
    metrics = {} if figure is None else {"m": figure}
    return {
        "setting": {"arm": "x", "values": {"lr": value}},
        "status": "error" if figure is None else "done",
        "metrics": metrics,
        "error": "it broke",
    }


def test_the_best_is_chosen_and_a_failure_is_not() -> None:
    arms = {"x": {"lr": {"tune": [0.1, 0.2, 0.3]}}, "y": {}}
    rows = [row(0.3, None), row(0.1, 0.4), row(0.2, 0.7)]
    found = tuning.choose(arms, rows, Tuning(metric="m"))
    assert set(found) == {"x"}
    assert found["x"].chosen == {"lr": 0.2}
    assert found["x"].tried == [({"lr": 0.1}, 0.4), ({"lr": 0.2}, 0.7), ({"lr": 0.3}, None)]
    assert found["x"].at_edge == []
    lower = tuning.choose(arms, rows, Tuning(metric="m", mode="min"))["x"]
    assert (lower.chosen, lower.at_edge) == ({"lr": 0.1}, ["lr"])
    with pytest.raises(DataError, match="it broke"):
        tuning.choose(arms, [row(each, None) for each in (0.1, 0.2, 0.3)], Tuning(metric="m"))


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        claim.load(written(tmp_path, claim_file(tuning=None)))
    with pytest.raises(ConfigError, match="belong together"):
        claim.load(written(tmp_path, claim_file(arms={"slow": {}, "best": {}})))
    arms = {**ARMS, "best": {"train.optimizer.lr": {"tune": [0.1, -1.0]}}}  # the second point, too, is checked
    with pytest.raises(ConfigError, match=r"arms.best: train.optimizer.lr"):
        claim.load(written(tmp_path, claim_file(arms=arms)))
    data = claim_file()
    data["base"]["train"]["stepps"] = 3
    data["base"]["problem"]["noise"] = -1
    with pytest.raises(ConfigError) as caught:
        claim.load(written(tmp_path, data))
    assert "did you mean 'steps'?" in str(caught.value)
    assert "problem.noise" in str(caught.value)
    assert problems.is_problem(data["base"])


def test_a_trial_looks_at_the_split_of_the_tuning_and_nowhere_else() -> None:
    base = {**WORKFLOW, "name": "claim-tuned", "caption": []}
    arms = {"a": {"train.optimizer.lr": {"tune": [0.1, 0.2]}}, "b": {"train.init": "@model:a"}}
    demands = [{"better": "a", "worse": "b", "metric": "digits/zero-shot/acc1", "least": 0.0}]
    whole = claim_file(base=base, arms=arms, demands=demands, tuning={"metric": "digits/zero-shot/acc1"})
    found = claim.ClaimFile.parse(whole)
    trial = claim.arm_experiment(found, "a", 3, Path("c.yaml"), {}, {"train.optimizer.lr": 0.2}, split="val")
    final = claim.arm_workflow(found, "a", 3, Path("c.yaml"), {}, {"train.optimizer.lr": 0.2})
    assert isinstance(trial, spec.Workflow)
    assert [config.plain()["split"] for config in trial.benchmarks] == ["val", "val"]
    assert [config.plain()["split"] for config in final.benchmarks] == ["test", "test"]
    assert trial.optimizer.plain()["lr"] == final.optimizer.plain()["lr"] == 0.2


def test_two_arms_are_not_tuned_at_once(tmp_path: Path) -> None:
    base = {**WORKFLOW, "name": "claim-tuned", "caption": []}
    axis = {"train.optimizer.lr": {"tune": [0.1, 0.2]}}
    demands = [{"better": "a", "worse": "b", "metric": "digits/zero-shot/acc1", "least": 0.0}]
    arms = {"a": axis, "b": {"train.init": "@model:a", **axis}}
    with pytest.raises(ConfigError, match="both would be tuned at once"):
        claim.load(written(tmp_path, claim_file(base=base, arms=arms, demands=demands, tuning={"metric": "digits/zero-shot/acc1"})))


def test_a_claim_tunes_then_runs_and_leaves_a_page(project: Path) -> None:
    path = written(project, claim_file())
    with Session(in_process=True) as session:
        result = claim.run(path, Project(project), session, Progress(quiet=True))
    assert result.tuned["best"].chosen == {"train.optimizer.lr": 0.5, "train.optimizer.momentum": 0.0}
    assert result.shown
    assert set(result.table["seed"]) == {0, 1, 2}  # the trials' seed is none of the arms'
    assert "best chose train.optimizer.lr = 0.5" in claim.text(result)
    page = claim_page.page(result, Project(project))
    assert "&lt;axes&gt;" in page
    assert "<script" not in page
    assert page.count("loss of ") == 2  # a panel an arm
    assert "at the edge" in page
    plain = reproductions._plain(result)
    entry = reproductions._entry(json.loads(json.dumps(plain)), result.file)
    assert "| best | train.optimizer.lr = 0.5 (edge), train.optimizer.momentum = 0.0 |" in entry


def test_a_long_result_is_cut_into_tags_and_put_together() -> None:
    text = "x" * 9_001
    tags = reproductions._in_tags(text)
    assert [len(part) for part in tags.values()] == [4_000, 4_000, 1_001]
    assert "".join(tags.get(name, "") for name in reproductions.RESULT) == text


def test_figures_keep_their_digits() -> None:
    assert [claim.number(value, "+") for value in (0.0, 0.4671, 0.0016, -1.5e-6, 123456.7)] == [
        "+0.000",
        "+0.467",
        "+0.0016",
        "-1.5e-06",
        "+123,457",
    ]
