from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
import pytest

from diptych.caption.captioners import Picture
from diptych.caption.cfg_captioning import DROPPED, SOURCE, CfgCaptioning, Config, caption_stats
from diptych.core.errors import ConfigError
from diptych.pairs.schema import CAPTIONS


def table(*captions: Sequence[tuple[str, str]]) -> pl.DataFrame:
    held = [[{"text": text, "source": source, "score": 0.5} for text, source in row] for row in captions]
    data = {"key": [f"key-{row}" for row in range(len(held))], "captions": held, "pixels": [bytes([row]) for row in range(len(held))]}
    return pl.DataFrame(data, schema={"key": pl.String, "captions": CAPTIONS, "pixels": pl.Binary})


class Scripted:
    def __init__(self, answer: Callable[[Picture], str | None]) -> None:
        self.answer = answer

    def caption(self, pictures: Sequence[Picture]) -> list[str | None]:
        return [self.answer(picture) for picture in pictures]


def apply(frame: pl.DataFrame, answer: Callable[[Picture], str | None], **fields: Any) -> pl.DataFrame:
    verdict = CfgCaptioning(Config(model="somewhere", **fields), Scripted(answer)).apply(frame, None)
    assert verdict.rejected.is_empty()
    assert verdict.rejected.columns == ["key", "reason", "score"]
    return verdict.kept


def held(frame: pl.DataFrame, row: int = 0) -> list[tuple[str, str]]:
    return [(caption["text"], caption["source"]) for caption in frame["captions"][row].to_list()]


def test_captions_follow_the_originals_and_nothing_else_changes() -> None:
    frame = table([("red car", "alt"), ("fast", "tag")], [])
    kept = apply(frame, lambda picture: f" picture\n {picture.data[0]} ")
    assert kept.drop("captions", DROPPED).equals(frame.drop("captions"))
    assert held(kept) == [("red car", "alt"), ("fast", "tag"), ("picture 0", SOURCE)]
    assert held(kept, 1) == [("picture 1", SOURCE)]
    assert kept[DROPPED].to_list() == [None, None]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("first", [("new", SOURCE), ("old", "alt"), ("fast", "tag")]),
        ("replace", [("new", SOURCE), ("fast", "tag")]),
    ],
)
def test_places(place: str, expected: list[tuple[str, str]]) -> None:
    assert held(apply(table([("old", "alt"), ("fast", "tag")]), lambda _: "new", place=place)) == expected


@pytest.mark.parametrize("place", ["append", "first", "replace"])
def test_a_pair_without_a_usable_answer_keeps_its_captions_and_says_why(place: str) -> None:
    frame = table(*[[("old", "alt")]] * 4)
    answers = iter([None, "  ", "x" * 20, "new"])
    kept = apply(frame, lambda _: next(answers), place=place, max_chars=16)
    assert kept[DROPPED].to_list() == ["failed", "empty", "long", None]
    assert [held(kept, row) for row in range(3)] == [[("old", "alt")]] * 3
    stats = caption_stats(kept)
    assert (stats["pairs"], stats["captioned"], stats["failed"], stats["distinct"], stats["mean_words"]) == (4, 1, 0.25, 1, 1)


def test_a_caption_that_the_pair_has_is_not_added_twice() -> None:
    kept = apply(table([("Old", "alt")]), lambda _: "old")
    assert (held(kept), kept[DROPPED][0]) == ([("Old", "alt")], "identical")
    assert held(apply(table([("Old", "alt")]), lambda _: "old", place="replace")) == [("old", SOURCE)]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, "needs the key 'model'"),
        ({"captioner": "local"}, "needs the key 'local'"),
        ({"captioner": "endpoint", "model": "x"}, "remove the key 'model'"),
        ({"model": "x", "local": {"path": "y"}}, "remove the key 'local'"),
        ({"captioner": "local", "local": {"path": "y"}, "guidance": 2.0}, "only a model directory can be guided"),
    ],
)
def test_refusals(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        Config.parse(fields)


def test_the_model_directory_counts_for_the_phases_identity() -> None:
    from diptych.workflow.spec import named_directories

    assert named_directories(Config(model="a/b")) == ["a/b"]
    with pytest.raises(ConfigError, match="There is no captioner"):
        Config(model="a/b").build(0)
    assert "pixels" in CfgCaptioning.needs


@pytest.mark.parametrize(
    ("fields", "guidance"),
    [
        ({"model": "x"}, 1.5),
        ({"model": "x", "guidance": None}, 1.5),
        ({"model": "x", "guidance": 3.0}, 3.0),
        ({"captioner": "local", "local": {"path": "y"}}, None),
        ({"captioner": "endpoint", "endpoint": {"base_url": "http://127.0.0.1:9", "model": "m"}}, None),
    ],
)
def test_the_guidance_that_is_recorded_is_the_one_that_is_used(fields: dict[str, Any], guidance: float | None) -> None:
    config = Config.parse(fields)
    assert config.plain()["guidance"] == guidance
    assert Config.parse(config.plain()) == config
