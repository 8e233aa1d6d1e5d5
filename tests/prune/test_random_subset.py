from __future__ import annotations

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.prune.random_subset import Config


def table(rows: int) -> pl.DataFrame:
    return pl.DataFrame({"key": [f"p{index}" for index in range(rows)], "captions": [[]] * rows})


@pytest.mark.parametrize("values", [{"keep": 0.3}, {"count": 137}])
def test_the_same_pairs_stay_however_the_pool_is_cut(run_pass, cut, values: dict[str, float]) -> None:
    method = Config(**values).build(1)
    expected = run_pass(method, [table(1000)])
    for sizes, seed in [([500], None), ([1, 0, 700], 1), ([10] * 80, 2)]:
        assert run_pass(method, cut(table(1000), sizes, seed)).kept == expected.kept
    assert run_pass(Config(**values).build(2), [table(1000)]).kept != expected.kept


def test_keep_is_a_share() -> None:
    verdict = Config(keep=0.3).build(0).apply(table(20_000), None)
    assert verdict.kept.height == pytest.approx(6000, abs=4 * (20_000 * 0.3 * 0.7) ** 0.5)
    assert verdict.rejected["score"].min() >= 0.3
    assert set(verdict.rejected["reason"]) == {"not drawn"}
    assert Config(keep=1).build(0).apply(table(100), None).kept.height == 100


@pytest.mark.parametrize("count", [1, 137, 1000])
def test_count_is_exact(run_pass, cut, count: int) -> None:
    outcome = run_pass(Config(count=count).build(0), cut(table(1000), [300, 5, 300], 3))
    assert len(outcome.kept) == count
    assert outcome.rejected.height == 1000 - count


def test_a_smaller_subset_lies_inside_a_larger_one(run_pass) -> None:
    small, large = (set(run_pass(Config(count=count).build(0), [table(500)]).kept) for count in (50, 200))
    share = set(run_pass(Config(keep=0.9).build(0), [table(500)]).kept)
    assert small < large < share


def test_more_than_there_are_is_an_error(run_pass) -> None:
    with pytest.raises(DataError, match="at most 10"):
        run_pass(Config(count=11).build(0), [table(10)])


@pytest.mark.parametrize("values", [{}, {"keep": 0.5, "count": 5}, {"keep": 0}, {"keep": 1.1}, {"count": 0}])
def test_wrong_configurations(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config.parse(values)


def test_state_and_report(run_pass, cut) -> None:
    method = Config(count=20).build(0)
    fold = method.folds()[0]
    first, second = (fold.map(batch, None) for batch in cut(table(100), [50]))
    assert len(fold.merge(first, second).smallest_S) == 20
    assert method.state_bytes(10**9, 0) == 320
    state = run_pass(method, [table(100)]).state
    assert method.report(state) == {"count": 20, "threshold": state}
    assert Config(keep=0.5).build(0).report(None) == {"keep": 0.5}
    assert Config(keep=0.5).build(0).state_bytes(10**9, 0) == 0
    assert method.needs == {"captions"}
