"""Claims: arms as workflows, references between them, and when an effect counts as shown."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tests.workflow.conftest import WORKFLOW

from diptych.core.errors import ConfigError
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.workflow import claim, yaml
from diptych.workflow.project import Project

CLAIMS = Path(__file__).parents[2] / "workflows" / "claims"


def file_of(**changes: Any) -> dict[str, Any]:
    base = copy.deepcopy({**WORKFLOW, "name": "claim-small", "caption": []})
    whole = {
        "claim": "small",
        "about": "A test.",
        "seeds": [0, 1, 2],
        "base": base,
        "arms": {
            "pruned": {"data.seed": "@seed"},
            "random": {"data.seed": "@seed", "prune": [{"method": "random-subset", "count": "@rows:pruned"}]},
            "tuned": {"data.seed": "@seed", "train.init": "@model:pruned", "train.steps": 2},
        },
        "demands": [{"better": "pruned", "worse": "random", "metric": "digits/zero-shot/acc1", "least": 0.5}],
    }
    return {**whole, **changes}


def written(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "workflows" / "claims" / "small.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.dump(data))
    return path


@pytest.mark.parametrize("path", sorted(CLAIMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_claim_of_ours_is_sound(path: Path) -> None:
    found = claim.load(path)
    assert found.claim == path.stem
    assert len(found.seeds) >= 3


def test_all_mistakes_of_a_claim_are_told_at_once(tmp_path: Path) -> None:
    data = file_of()
    data["arms"]["random"]["prune"][0]["count"] = "@rows:prunned"
    data["arms"]["tuned"]["train.optimizer.lrr"] = 1.0
    data["demands"][0]["worse"] = "rondom"
    with pytest.raises(ConfigError) as caught:
        claim.load(written(tmp_path, data))
    text = str(caught.value)
    assert "did you mean 'pruned'?" in text
    assert "did you mean 'random'?" in text
    assert "arms.tuned: train.optimizer.lrr" in text


def test_arms_refer_to_each_other() -> None:
    found = claim.ClaimFile.parse(file_of())
    assert claim.references(found, "pruned") == []
    assert claim.references(found, "random") == [("@rows:pruned", "pruned")]
    assert claim.references(found, "tuned") == [("@model:pruned", "pruned")]
    workflow = claim.arm_workflow(found, "random", 7, Path("claim.yaml"), {"@rows:pruned": 30})
    assert (workflow.seed, workflow.raw["data"]["seed"]) == (7, 7)
    assert workflow.prune[0].plain()["count"] == 30


@pytest.mark.slow
def test_a_claim_runs_its_arms_at_equal_size_and_from_each_others_models(project: Path) -> None:
    path = written(project, file_of())
    with Session(in_process=True) as session:
        result = claim.run(path, Project(project), session, Progress(quiet=True))
    by_arm = {arm: frame for (arm,), frame in result.table.partition_by("arm", as_dict=True).items()}
    assert by_arm["pruned"]["rows"].to_list() == by_arm["random"]["rows"].to_list()
    lineage = yaml.read(project / "runs/claims/small/tuned-s1/train/lineage.json")
    assert lineage["init"] == str((project / "runs/claims/small/pruned-s1/compress").resolve())
    assert {"train/loss", "train/mean_loss", "train/end_loss"} <= set(result.table.columns)
    assert not result.shown
    assert "NOT shown" in claim.text(result)


def finding(least: float, better: list[float], worse: list[float], direction: str = "higher") -> claim.Finding:
    demand = claim.Demand.parse({"better": "a", "worse": "b", "metric": "set/task/acc1", "least": least, "direction": direction})
    rows = [
        {"setting": {"arm": arm, "seed": seed}, "metrics": {"set/task/acc1": value}}
        for arm, values in (("a", better), ("b", worse))
        for seed, value in enumerate(values)
    ]
    return claim._judge(demand, rows)


@pytest.mark.parametrize(
    ("least", "better", "worse", "direction", "shown"),
    [
        (0.05, [0.60, 0.61, 0.62], [0.50, 0.50, 0.52], "higher", True),
        (0.20, [0.60, 0.61, 0.62], [0.50, 0.50, 0.52], "higher", False),  # too small
        (0.05, [0.60, 0.90, 0.40], [0.50, 0.50, 0.52], "higher", False),  # the interval holds zero
        (0.05, [0.50, 0.50, 0.52], [0.60, 0.61, 0.62], "lower", True),
        (-0.02, [0.50, 0.51, 0.50], [0.50, 0.51, 0.51], "higher", True),  # nothing lost
        (-0.02, [0.50, 0.40, 0.50], [0.50, 0.51, 0.51], "higher", False),
        (0.0, [0.50, 0.51], [0.50, 0.51], "higher", True),
    ],
)
def test_when_an_effect_is_shown(least: float, better: list[float], worse: list[float], direction: str, shown: bool) -> None:
    assert finding(least, better, worse, direction).shown == shown


def test_a_figure_against_another_of_the_same_arm() -> None:
    demand = claim.Demand.parse({"better": "a", "worse": "a", "metric": "s/gda/acc1", "against": "s/zero-shot/acc1", "least": 0.1})
    rows = [
        {"setting": {"arm": "a", "seed": seed}, "metrics": {"s/gda/acc1": 0.6, "s/zero-shot/acc1": 0.4 + seed / 100}} for seed in range(3)
    ]
    assert claim._judge(demand, rows).shown
    assert demand.title == "s/gda/acc1 - s/zero-shot/acc1"
    with pytest.raises(ConfigError, match="not measured"):
        claim._judge(demand.model_copy(update={"against": "s/zeroshot/acc1"}), rows)


def test_a_figure_judged_by_itself_a_multiple_and_every_seed() -> None:
    rows = [
        {"setting": {"arm": arm, "seed": seed}, "metrics": {"train/used": value + seed / 100}}
        for arm, value in (("a", 0.60), ("b", 0.40))
        for seed in range(3)
    ]

    def shown(**demand: Any) -> bool:
        return claim._judge(claim.Demand.parse({"better": "a", "metric": "train/used", **demand}), rows).shown

    assert shown(least=0.60)
    assert not shown(least=0.62)
    assert shown(least=0.01, worse="b", factor=1.4)
    assert not shown(least=0.01, worse="b", factor=1.5)
    assert shown(least=0.605)
    assert not shown(least=0.605, every_seed=True)
    assert shown(least=-0.65, direction="lower", every_seed=True)
    with pytest.raises(ConfigError, match="name its arm"):
        claim.Demand.parse({"better": "a", "metric": "train/used", "factor": 2.0, "least": 0.0})


def test_changes_since_a_third_arm() -> None:
    rows = [
        {"setting": {"arm": arm, "seed": seed}, "metrics": {"train/loss": value + seed}}
        for arm, value in (("pruned", 2.0), ("few", 1.2), ("all", 1.0))
        for seed in range(3)
    ]

    def shown(factor: float) -> bool:
        demand = {"better": "few", "worse": "all", "since": "pruned", "factor": factor, "metric": "train/loss", "direction": "lower"}
        return claim._judge(claim.Demand.parse({**demand, "least": 0.0, "every_seed": True}), rows).shown

    assert shown(0.79)  # 0.8 of 1.0 is recovered
    assert not shown(0.81)
    demand = claim.Demand.parse({"better": "a", "worse": "b", "since": "c", "metric": "x", "least": 0.0})
    assert demand.title == "x, change since c: a - b"
    with pytest.raises(ConfigError, match="name its arm"):
        claim.Demand.parse({"better": "a", "since": "c", "metric": "x", "least": 0.0})


def test_a_figure_that_is_no_number_has_no_summary() -> None:
    table = pl.DataFrame({"arm": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "x": [math.nan, math.nan, 1.0, 2.0]})
    file = claim.load(next((Path(__file__).parents[2] / "workflows" / "claims").glob("clip.yaml")))
    result = claim.ClaimResult(file, (), table)
    assert result.summary("a", "x") is None
    summary = result.summary("b", "x")
    assert summary is not None
    assert summary.mean == 1.5


def test_figures_of_compressors() -> None:
    report = {"overall": 0.5, "yes": True, "text": "no", "kept_share": {"image": 0.8}, "matrices": {str(i): 0.1 for i in range(9)}}
    assert claim.of_reports({"compress": {"report": {"flap": report}}}) == {
        "compress/flap/overall": 0.5,
        "compress/flap/kept_share/image": 0.8,
    }


def test_the_words_of_a_demand() -> None:
    demand = claim.Demand.parse({"better": "a", "worse": "b", "metric": "train/used", "factor": 1.3, "least": 0.0, "every_seed": True})
    assert demand.title == "train/used: a - 1.3 x b"
    assert demand.text == "an interval above +0.000, every seed too"
    assert claim.Demand.parse({"better": "a", "metric": "train/used", "least": 0.5}).title == "train/used of a"


def test_figures_of_training(tmp_path: Path) -> None:
    assert claim.of_training({"loss": 0.5, "steps": 3, "finished": True, "advice": "none"}) == {"train/loss": 0.5, "train/steps": 3.0}
    log = tmp_path / "steps.jsonl"
    log.write_text("".join(json.dumps({"loss": float(step), **({"rare": 1.0} if step == 3 else {})}) + "\n" for step in range(20)))
    assert claim.of_steps(log) == {"train/mean_loss": 9.5, "train/mean_rare": 1.0, "train/end_loss": 18.5}
