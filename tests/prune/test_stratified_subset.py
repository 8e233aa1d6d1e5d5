from __future__ import annotations

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.prune.stratified_subset import Config


def pool() -> pl.DataFrame:
    labels = [0] * 100 + [1] * 30 + [2] * 5 + [None] * 4
    return pl.DataFrame({"key": [f"p{row}" for row in range(139)], "label": labels})


def counts(outcome, table: pl.DataFrame) -> dict[int | None, int]:
    return dict(table.filter(pl.col("key").is_in(outcome.kept))["label"].value_counts().iter_rows())


def test_quotas_are_exact_and_do_not_depend_on_the_cut(run_pass, cut) -> None:
    table = pool()
    method = Config(column="label", count=20).build(0)
    outcome = run_pass(method, [table])
    assert counts(outcome, table) == {0: 20, 1: 20, 2: 5}
    assert dict(outcome.rejected["reason"].value_counts().iter_rows()) == {"not drawn": 90, "no stratum": 4}
    for sizes, seed in [([5, 100], 1), ([1] * 40, 2)]:
        assert run_pass(method, cut(table, sizes, seed)).kept == outcome.kept
    assert run_pass(Config(column="label", count=20).build(1), [table]).kept != outcome.kept


def test_a_smaller_quota_lies_inside_a_larger_one(run_pass) -> None:
    small, large = (set(run_pass(Config(column="label", count=count).build(0), [pool()]).kept) for count in (3, 25))
    assert small < large


def test_single_quotas_overrule(run_pass) -> None:
    outcome = run_pass(Config(column="label", count=2, quotas={"0": 50, "1": 0}).build(0), [pool()])
    assert counts(outcome, pool()) == {0: 50, 2: 2}


def test_refusals(run_pass) -> None:
    with pytest.raises(DataError, match="label = 2"):
        run_pass(Config(column="label", count=6, short="refuse").build(0), [pool()])
    with pytest.raises(DataError, match=r"quotas\.7"):
        run_pass(Config(column="label", count=6, quotas={"7": 1}).build(0), [pool()])
    with pytest.raises(DataError, match="no such column"):
        run_pass(Config(column="class", count=6).build(0), [pool()])
    with pytest.raises(DataError, match="one value a pair"):
        run_pass(Config(column="label", count=6).build(0), [pool().with_columns(label=pl.concat_list("label"))])
    for wrong in ({"count": 3}, {"column": "x"}, {"column": "x", "count": -1}, {"column": "x", "count": 1, "short": "drop"}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)


def test_report(run_pass) -> None:
    method = Config(column="label", count=20).build(0)
    state = run_pass(method, [pool()]).state
    assert method.report(state) == {"strata": 3, "fewest": 5, "most": 20, "short": 1, "short_first": ["2"]}
    assert method.report(None) == {}
