from __future__ import annotations

import json

from tests.workflow.evaluated import empty_project, figures, record, write_run

from diptych.workflow import makers
from diptych.workflow.results import find
from diptych.workflow.spec import PHASES


def corridor(**params):
    """A record a phase; `params` gives the parameters of some."""
    found = {}
    for phase in PHASES:
        found[phase] = record(phase, {"seed": 0, phase: params.get(phase, {})}, found)
    return found


def test_the_record_of_a_phase_taken_over_is_that_of_the_run_that_made_it(tmp_path):
    project = empty_project(tmp_path)
    low, high = corridor(train={"lr": 1}), corridor(train={"lr": 2})
    again = record("evaluate", {"seed": 0, "evaluate": {"benchmarks": []}}, high)
    write_run(project, "w", figures(1, 0), low)
    write_run(project, "w+high", figures(2, 0), {phase: high[phase] for phase in ("train", "compress", "evaluate")})
    write_run(project, "w+again", figures(2, 0), {"evaluate": again})
    found = makers.records(project, find(project, "w+again"))
    assert list(found) == list(PHASES)
    assert found == {**high, "evaluate": again}
    assert found["train"]["params"]["train"] == {"lr": 2}
    assert found["ingest"] == low["ingest"]


def test_a_maker_that_is_gone_is_missing_and_not_made_up(tmp_path):
    project = empty_project(tmp_path)
    write_run(project, "w", figures(1, 0), corridor(train={"lr": 1}))
    write_run(project, "orphan", figures(1, 0), {"evaluate": corridor(train={"lr": 2})["evaluate"]})
    assert list(makers.records(project, find(project, "orphan"))) == ["evaluate"]


def test_where_no_key_fits_a_run_speaks_for_itself(tmp_path):
    project = empty_project(tmp_path)
    old = {phase: {**entry, "key": "of an older version"} for phase, entry in corridor(train={"lr": 3}).items()}
    write_run(project, "w", figures(1, 0), old)
    write_run(project, "other", figures(1, 0), corridor())
    assert makers.records(project, find(project, "w")) == json.loads(json.dumps(old))
