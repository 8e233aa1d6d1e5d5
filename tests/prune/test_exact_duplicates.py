from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest
from tests.prune.pictures import encoded, picture, table

from diptych.core.errors import ConfigError
from diptych.prune.exact_duplicates import COLUMN, Config


def run(config: Config, batches: list[pl.DataFrame], run_pass: Callable[..., object]) -> object:
    """Both steps, as the engine chains them."""
    mark, compare = (step.build(0) for step in config.steps())
    return run_pass(compare, [mark.apply(batch, None).kept.drop("pixels") for batch in batches])


@pytest.fixture
def pool() -> pl.DataFrame:
    """Three pictures; the first three times (once in another file format), the second twice."""
    first, second, third = (picture(seed) for seed in range(3))
    files = {
        "e": encoded(first),
        "c": encoded(first),
        "d": encoded(first, "WEBP", lossless=True),
        "a": encoded(second),
        "b": encoded(second),
    }
    return table(files | {"f": encoded(third)}, {"a": "one text", "b": "another text", "c": "same", "e": "same", "d": "same"})


def test_one_of_every_picture_stays_however_the_pool_is_cut(pool: pl.DataFrame, run_pass, cut) -> None:
    outcome = run(Config(), [pool], run_pass)
    assert outcome.kept == ["a", "c", "f"]
    assert dict(zip(outcome.rejected["key"], outcome.rejected["twin"], strict=True)) == {"b": "a", "d": "c", "e": "c"}
    assert set(outcome.rejected["reason"]) == {"same picture"}
    for sizes, seed in [([1, 2], 4), ([1] * 5, 5)]:
        assert run(Config(), cut(pool, sizes, seed), run_pass).kept == outcome.kept


def test_files_may_be_compared_instead(pool: pl.DataFrame, run_pass) -> None:
    assert run(Config(of="file"), [pool], run_pass).kept == ["a", "c", "d", "f"]


def test_captions_may_count(pool: pl.DataFrame, run_pass) -> None:
    outcome = run(Config(captions="same"), [pool], run_pass)
    assert outcome.kept == ["a", "b", "c", "f"]
    assert COLUMN in pool.columns or "_texts" not in outcome.rejected.columns


def test_needs_and_configuration() -> None:
    mark, compare = (step.build(0) for step in Config().steps())
    assert (mark.needs, compare.needs) == ({"captions", "pixels"}, {"captions"})
    with pytest.raises(ConfigError):
        Config.parse({"of": "name"})
