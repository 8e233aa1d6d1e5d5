from __future__ import annotations

from functools import reduce

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.curate.mixture import Config, quotas


def pool(**sizes: int) -> pl.DataFrame:
    names = [name for name, size in sizes.items() for _ in range(size)]
    return pl.DataFrame({"key": [f"{name}/{row}" for row, name in enumerate(names)], "meta.source": names})


def run(config: Config, batches: list[pl.DataFrame], seed: int = 0) -> tuple[dict[str, int], pl.DataFrame, set[str]]:
    """Pairs kept by source, the rejected, and the kept keys."""
    method, state = config.build(seed), None
    for fold in method.folds():
        state = fold.finish(reduce(fold.merge, [fold.map(batch, state) for batch in batches]), state)
    verdicts = [method.apply(batch, state) for batch in batches]
    kept, rejected = pl.concat([v.kept for v in verdicts]), pl.concat([v.rejected for v in verdicts])
    assert sorted([*kept["key"], *rejected["key"]]) == sorted(key for batch in batches for key in batch["key"])
    return dict(kept["meta.source"].value_counts().iter_rows()), rejected, set(kept["key"])


def test_largest_remainders_add_up() -> None:
    assert quotas({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    assert quotas({"a": 0.6, "b": 0.4}, 5) == {"a": 3, "b": 2}
    assert quotas({"a": 0.005, "b": 0.995}, 101) == {"a": 1, "b": 100}, "0.505 rounds up before 100.495 does"


def test_counts_are_exact_and_do_not_depend_on_the_cut() -> None:
    table = pool(web=500, album=300, books=50)
    config = Config(shares={"web": 0.75, "album": 0.25}, total=101)
    counts, rejected, keys = run(config, [table])
    assert counts == {"web": 76, "album": 25}
    assert dict(rejected["reason"].value_counts().iter_rows()) == {"not drawn": 699, "source not in the mixture": 50}
    shuffled = table.sample(fraction=1, shuffle=True, seed=3)
    for batches in ([shuffled.slice(0, 7), shuffled.slice(7, 600), shuffled.slice(607)], [table.reverse(), table.clear()]):
        assert run(config, batches)[2] == keys
    assert run(config, [table], seed=1)[2] != keys


def test_a_smaller_total_lies_inside_a_larger_one() -> None:
    table = pool(web=200, album=200)
    small, large = (run(Config(shares={"web": 1, "album": 1}, total=total), [table])[2] for total in (40, 120))
    assert small < large


def test_without_a_total_the_scarcest_source_decides() -> None:
    counts, _, _ = run(Config(shares={"web": 2, "album": 1}), [pool(web=100, album=20)])
    assert counts == {"web": 40, "album": 20}
    counts, _, _ = run(Config(shares={"a": 1, "b": 1, "c": 1.01}), [pool(a=10, b=10, c=10)])
    assert max(counts.values()) == 10
    assert sum(counts.values()) >= 28


def test_sources_without_a_name_leave() -> None:
    table = pool(web=5).with_columns(pl.when(pl.col("key") == "web/2").then(None).otherwise("meta.source").alias("meta.source"))
    counts, rejected, _ = run(Config(shares={"web": 1}), [table])
    assert counts == {"web": 4}
    assert rejected["key"].to_list() == ["web/2"]


def test_too_few_pairs_are_an_error_that_says_how_many_there_can_be() -> None:
    with pytest.raises(DataError, match="lower total to 40"):
        run(Config(shares={"web": 1, "album": 1}, total=50), [pool(web=100, album=20)])
    with pytest.raises(DataError, match=r"shares\.books"):
        run(Config(shares={"books": 1}), [pool(web=100)])
    with pytest.raises(DataError, match="no such column"):
        run(Config(shares={"books": 1}), [pool(web=3).drop("meta.source")])


@pytest.mark.parametrize(
    "values", [{}, {"shares": {}}, {"shares": {"a": 0.0}}, {"shares": {"a": 1, "b": 1}, "total": 1}, {"shares": {"a": 1}, "total": 0}]
)
def test_wrong_configurations(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config.parse(values)


def test_report() -> None:
    method = Config(shares={"web": 1}, total=3).build(0)
    state = None
    for fold in method.folds():
        state = fold.finish(fold.map(pool(web=5, album=2), state), state)
    assert method.report(state) == {"pairs": {"web": 5, "album": 2}, "taken": {"web": 3}}
    assert method.report(None) == {}
