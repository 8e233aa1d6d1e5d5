from __future__ import annotations

import polars as pl
import pytest

from diptych.core.errors import ConfigError
from diptych.curate.basic_filter import Config
from diptych.pairs.schema import PAIRS


def pairs(*rows: tuple[int, int, list[str]]) -> pl.DataFrame:
    data = {
        "key": [f"p{row}" for row in range(len(rows))],
        "image": [{"shard": "s", "offset": 0, "size": 1, "width": width, "height": height} for width, height, _ in rows],
        "captions": [[{"text": text, "source": "alt", "score": None} for text in texts] for _, _, texts in rows],
        "split": ["train"] * len(rows),
    }
    return pl.DataFrame(data, schema=PAIRS)


GOOD = "a small brown dog"


def test_every_limit_has_its_reason_and_score() -> None:
    table = pairs((200, 600, [GOOD]), (199, 300, [GOOD]), (200, 601, [GOOD]), (300, 300, ["two words", " a dog  "]), (300, 300, []))
    verdict = Config().build(0).apply(table, None)
    assert verdict.kept["key"].to_list() == ["p0"]
    assert verdict.rejected["reason"].to_list() == ["picture too small", "picture too narrow", "caption too short", "caption too short"]
    assert verdict.rejected["score"].to_list() == [199, pytest.approx(3.005), 2, None]


def test_captions_that_are_long_enough_stay() -> None:
    table = pairs((300, 300, ["dog", GOOD, "a b c", "  \n a   b cd  "]))
    kept = Config().build(0).apply(table, None).kept
    assert [caption["text"] for caption in kept["captions"][0]] == [GOOD, "  \n a   b cd  "], "white space parts words; six characters"
    assert kept.schema == table.schema


def test_limits_can_be_taken_off() -> None:
    config = Config(words=0, characters=0, side_px=0, aspect=1e9)
    table = pairs((1, 900, ["x"]))
    assert config.build(0).apply(table, None).kept.equals(table)
    assert config.build(0).report(None)["side_px"] == 0
    for wrong in ({"words": -1}, {"aspect": 0.5}, {"side": 3}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)
