import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from diptych.caption.laclip import DROPPED, REASONS, SOURCE, Config, LaClip, rewrite_stats, tidy
from diptych.caption.rewriters import Request
from diptych.core.catalogue import config_class, find
from diptych.core.errors import ConfigError, DataError
from diptych.pairs.schema import CAPTIONS, PAIRS


def table(*captions: Sequence[tuple[str | None, str]], **columns: Sequence[Any]) -> pl.DataFrame:
    """A pair table; a row's captions as (text, source)."""
    rows = [[{"text": text, "source": source, "score": 0.5} for text, source in row] for row in captions]
    data = {
        "key": [f"key-{index}" for index in range(len(rows))],
        "image": [None] * len(rows),
        "captions": rows,
        "split": ["train"] * len(rows),
    }
    return pl.DataFrame(data, schema=PAIRS).with_columns(pl.Series(name, values) for name, values in columns.items())


class Scripted:
    """A rewriter that answers by a function and remembers what it was asked."""

    def __init__(self, answer: Callable[[Request], str | None]) -> None:
        self.answer = answer
        self.asked: list[Request] = []

    def rewrite(self, requests: Sequence[Request]) -> list[str | None]:
        self.asked += requests
        return [self.answer(request) for request in requests]


def apply(frame: pl.DataFrame, answer: Callable[[Request], str | None], **fields: Any) -> pl.DataFrame:
    verdict = LaClip(Config(**fields), Scripted(answer)).apply(frame, None)
    assert verdict.rejected.is_empty()
    assert verdict.rejected.columns == ["key", "reason", "score"]
    return verdict.kept


def texts(frame: pl.DataFrame, row: int = 0, source: str = SOURCE) -> list[str]:
    return [caption["text"] for caption in frame["captions"][row].to_list() if caption["source"] == source]


def test_rewrites_follow_the_originals_and_nothing_else_changes() -> None:
    frame = table([("red car", "alt"), ("fast", "tag")], [("a dog", "human"), ("one dog", "human")], label=[3, 4])
    kept = apply(frame, lambda request: f"{request.source} {request.copy}", copies=2)
    assert kept.drop("captions", DROPPED).equals(frame.drop("captions"))
    assert kept.schema["captions"] == CAPTIONS
    assert kept["captions"][0].to_list()[:2] == frame["captions"][0].to_list()
    assert texts(kept) == ["red car 0", "red car 1"]
    assert texts(kept, 1) == ["a dog 0", "a dog 1"]
    assert kept["captions"][0].to_list()[2]["score"] is None


def test_what_the_rewriter_is_told() -> None:
    rewriter = Scripted(lambda _: "fine")
    frame = table([("red\n car ", "alt"), ("fast", "tag"), (None, "tag"), ("shiny", "synthetic:x")], language=["de"])
    LaClip(Config(copies=2), rewriter).apply(frame, None)
    assert rewriter.asked == [Request("key-0", copy, "red car", ("fast",), "de") for copy in (0, 1)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "failed"),
        ("", "empty"),
        (" \n ", "empty"),
        ("A  Red\tCAR", "identical"),
        ("a second caption", "identical"),
        ("word " * 200, "long"),
        ("x" * 617, "long"),
    ],
)
def test_a_useless_rewrite_is_counted_not_added(answer: str | None, reason: str) -> None:
    frame = table([("a red car", "alt"), ("a second caption", "human")])
    kept = apply(frame, lambda request: answer if request.copy else "a crimson car", copies=3)
    assert texts(kept) == ["a crimson car"]
    assert kept[DROPPED].to_list() == [dict.fromkeys(REASONS, 0) | {reason: 2}]


def test_a_rewrite_that_repeats_another_is_identical_but_one_that_repeats_a_tag_is_not() -> None:
    kept = apply(table([("a red car", "alt"), ("vehicle", "tag")]), lambda _: "Vehicle", copies=3)
    assert texts(kept) == ["Vehicle"]
    assert kept[DROPPED][0]["identical"] == 2


def test_the_longest_rewrite_allowed() -> None:
    assert texts(apply(table([("a", "alt")]), lambda _: "x" * 616, copies=1)) == ["x" * 616]


def test_rewrites_become_one_line_of_valid_text() -> None:
    kept = apply(table([("a", "alt")]), lambda _: " two\nlines\u2028and \ud800 half ", copies=1)
    assert texts(kept) == ["two lines and ? half"]
    assert tidy("ok") == "ok"


@pytest.mark.parametrize("captions", [[], [("", "alt")], [(" \n", "alt")], [(None, "alt")]])
def test_a_pair_with_nothing_to_rewrite_keeps_its_place(captions: list[tuple[str | None, str]]) -> None:
    rewriter = Scripted(lambda request: f"{request.source} again")
    frame = table([("first", "alt")], captions, [("last", "alt")])
    kept = LaClip(Config(copies=2), rewriter).apply(frame, None).kept
    assert {request.source for request in rewriter.asked} == {"first", "last"}
    assert kept["captions"][1].to_list() == frame["captions"][1].to_list()
    assert [row["empty"] for row in kept[DROPPED]] == [0, 2, 0]
    assert texts(kept, 2) == ["last again"]


def test_null_captions_and_an_empty_batch() -> None:
    frame = table([("first", "alt")]).with_columns(captions=pl.lit(None, dtype=CAPTIONS))
    assert apply(frame, lambda _: "x")[DROPPED][0]["empty"] == 4
    assert apply(table(), lambda _: "x").height == 0


def test_added_and_dropped_make_up_copies_and_a_second_pass_adds_to_the_counts() -> None:
    frame = table([("red car", "alt")], [("dog", "alt")])
    once = apply(frame, lambda request: [None, "", "new text", request.source][request.copy])
    twice = apply(once, lambda request: [None, "", "new text", "newer text"][request.copy])
    assert texts(twice) == ["new text", "newer text"]
    assert twice[DROPPED][0] == {"empty": 2, "identical": 2, "long": 0, "failed": 2}
    stats = rewrite_stats(twice)
    assert (stats["pairs"], stats["asked"], stats["added"]) == (2, 16, 4)


def test_stats() -> None:
    answers = {"red car": ["crimson car", "automobile in red", None, ""], "dog": ["Crimson CAR", "dog", "y" * 700, None]}
    stats = rewrite_stats(apply(table([("red car", "alt")], [("dog", "alt")]), lambda request: answers[request.source][request.copy]))
    assert stats == {
        "pairs": 2,
        "asked": 8,
        "added": 3,
        "empty": 1 / 8,
        "identical": 1 / 8,
        "long": 1 / 8,
        "failed": 2 / 8,
        "distinct": 2 / 3,
        "mean_chars": (11 + 17 + 11) / 3,
        "mean_words": 7 / 3,
        "mean_chars_original": 5.0,
    }
    assert rewrite_stats(apply(table(), lambda _: ""))["mean_chars"] == 0
    assert rewrite_stats(apply(table([]), lambda _: ""))["empty"] == 1
    with pytest.raises(DataError, match="not been through"):
        rewrite_stats(table())


# ---------------------------------------------------------------- with the word table


def test_the_same_pairs_get_the_same_rewrites_in_any_order_and_batching() -> None:
    frame = table(*([(f"red car with {thing}", "alt"), ("fast", "tag")] for thing in ("horn", "door", "wheel", "lamp", "roof", "dog")))
    method = Config().build(3)
    whole = method.apply(frame, None).kept
    parts = [pickle.loads(pickle.dumps(method)).apply(part, None).kept for part in (frame[4:], frame[:1], frame[1:4])]
    assert pl.concat(parts).sort("key").equals(whole)
    assert not Config().build(4).apply(frame, None).kept.equals(whole)


def test_hard_captions_with_the_word_table() -> None:
    frame = table(
        *([(text, "alt")] for text in ("", "step 1 => step 2", "two\nlines", "red car " * 131_072, "猫が笑っている", "zxqv", "😀"))
    )
    kept = Config().build(0).apply(frame, None).kept
    added = [len(texts(kept, row)) for row in range(kept.height)]
    assert added[0] == 0
    assert added[1] == added[2] == added[5] == 4
    assert added[4] == 0
    assert [added[row] + sum(kept[DROPPED][row].values()) for row in range(kept.height)] == [4] * kept.height
    assert kept[DROPPED][4]["identical"] == 4
    assert all("\n" not in text and len(text) <= 616 for row in range(kept.height) for text in texts(kept, row))


# ---------------------------------------------------------------- configuration


def test_the_catalogue_builds_it() -> None:
    config = config_class(find("laclip", "caption")).parse({"method": "laclip", "rewriter": "lexicon", "copies": 4})
    assert isinstance(config, Config)
    assert isinstance(config.build(0), LaClip)
    assert Config.parse(json.loads(json.dumps(config.plain()))) == config


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rewriter": "endpoint"}, "needs the key 'endpoint' with at least base_url and model"),
        ({"rewriter": "local"}, "needs the key 'local' with at least path"),
        ({"rewriter": "lexicon", "local": {"path": "x"}}, "remove the key 'local', or set rewriter: local"),
        ({"rewriter": "local", "local": {"path": "x"}, "lexicon": {}}, "remove the key 'lexicon'"),
        ({"rewriter": "lexikon"}, "did you mean 'lexicon'"),
        ({"endpoint": {"base_url": "http://h/v1", "model": "m", "api_key": "s3cret"}}, "did you mean 'api_key_env'"),
        ({"copies": 0}, "greater than or equal to 1"),
        ({"copies": "4"}, "a whole number"),
        ({"examples": []}, "at least 1"),
        ({"examples": ["chatgpt"]}, "plain"),
    ],
)
def test_impossible_configurations_are_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.parse(data, "caption[0]")
    assert words in str(error.value)
    assert "caption[0]" in str(error.value)


def test_each_rewriter_is_built_with_its_own_block(tmp_path: Path) -> None:
    from diptych.caption.rewriters.endpoint import EndpointRewriter
    from diptych.caption.rewriters.local import LocalRewriter

    (tmp_path / "config.json").write_text("{}")
    data: dict[str, object] = {
        "rewriter": "endpoint",
        "endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "m"},
        "examples": ["rich"],
    }
    endpoint = Config.parse(data).build_rewriter(1)
    local = Config.parse({"rewriter": "local", "local": {"path": str(tmp_path)}, "examples": ["rich"]}).build_rewriter(1)
    assert isinstance(endpoint, EndpointRewriter)
    assert isinstance(local, LocalRewriter)
    assert endpoint.examples == local.examples == ("rich",)
    assert endpoint.seed == local.seed == 1
