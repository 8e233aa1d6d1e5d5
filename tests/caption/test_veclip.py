from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from diptych.caption.describers import ModelCaptioner, RuleCaptioner, Seen
from diptych.caption.rewriters import Request
from diptych.caption.veclip import (
    DESCRIPTION,
    FUSED,
    PROMPT,
    STATUS,
    USED,
    VISUAL,
    Config,
    VeClip,
    joined,
    status_of,
    veclip_stats,
)
from diptych.core.catalogue import config_class, find
from diptych.core.chance import key_hashes
from diptych.core.errors import ConfigError, DataError
from diptych.pairs import captions
from diptych.pairs.schema import CAPTIONS


def png(ink: float) -> bytes:
    grey = np.zeros((8, 8), np.uint8)
    grey[:, 2:5] = round(255 * ink)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()


def table(*texts: Sequence[tuple[str | None, str]]) -> pl.DataFrame:
    rows = [[{"text": text, "source": source, "score": None} for text, source in row] for row in texts]
    pixels = [png(0.4 + 0.1 * index) for index in range(len(rows))]
    schema = {"key": pl.String, "pixels": pl.Binary, "captions": CAPTIONS}
    return pl.DataFrame({"key": [f"k{index}" for index in range(len(rows))], "pixels": pixels, "captions": rows}, schema=schema)


class Says:
    """A captioner and rewriter that answers by a function."""

    def __init__(self, answer: Callable[[Any], str | None]) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def describe(self, seen: Sequence[Seen]) -> list[str | None]:
        return [self.answer(each) for each in seen]

    def rewrite(self, requests: Sequence[Request]) -> list[str | None]:
        self.asked += requests
        return [self.answer(request) for request in requests]


def apply(frame: pl.DataFrame, visual: str | None, fused: str | None = None, **fields: Any) -> pl.DataFrame:
    rewriter = None if fields.get("rewriter") == "none" else Says(lambda _: fused)
    verdict = VeClip(Config.parse(fields), Says(lambda _: visual), rewriter).apply(frame, None)
    assert verdict.rejected.is_empty()
    return verdict.kept


def texts(frame: pl.DataFrame, row: int = 0) -> list[tuple[str, str]]:
    return [(caption["text"], caption["source"]) for caption in frame["captions"][row].to_list()]


ALT = ("buy seven now", "alt")


def test_a_fused_caption_follows_the_alt_text_and_nothing_else_changes() -> None:
    frame = table([ALT, ("toy", "tag")])
    kept = apply(frame, "bold drawing", "a bold seven to buy")
    assert texts(kept) == [ALT, ("toy", "tag"), ("a bold seven to buy", FUSED)]
    assert kept.drop("captions", DESCRIPTION, STATUS, USED).equals(frame.drop("captions"))
    assert kept.select(DESCRIPTION, STATUS, USED).rows() == [("bold drawing", "ok", "vec")]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (None, "error"),
        ("", "too_short"),
        ("seven", "too_short"),
        ("I'm sorry, but I can't help with that", "refused"),
        ("As an AI, nothing is to be seen", "refused"),
        ("Say both sentences as one short sentence. Put", "refused"),
        ("word " * 90, "too_long"),
        ("été " * 40, "too_long"),
    ],
)
def test_the_fallback_order_is_fused_description_alt(answer: str | None, status: str) -> None:
    kept = apply(table([ALT]), "bold drawing", answer)
    assert (texts(kept), kept[STATUS][0], kept[USED][0]) == ([ALT, ("bold drawing", VISUAL)], status, "vet")
    blind = apply(table([ALT]), answer, "never asked for")
    assert (texts(blind), blind[STATUS][0], blind[USED][0]) == ([ALT], status, "alt")
    assert blind[DESCRIPTION][0] is None


def test_the_longest_text_that_fits() -> None:
    assert status_of("", "seven " * 75) == "ok"
    assert status_of("", "seven " * 76) == "too_long"


def test_without_an_alt_text_the_description_is_used_and_nobody_is_asked_to_fuse() -> None:
    rewriter = Says(lambda _: "something fused")
    frame = table([(" ", "alt")], [("toy", "tag")], [ALT])
    kept = VeClip(Config(), Says(lambda _: "bold drawing"), rewriter).apply(frame, None).kept
    assert kept[STATUS].to_list() == ["missing", "missing", "ok"]
    assert kept[USED].to_list() == ["vet", "vet", "vec"]
    assert [request.key for request in rewriter.asked] == ["k2"]


def test_a_description_alone() -> None:
    assert texts(apply(table([ALT]), "bold drawing", rewriter="none")) == [ALT, ("bold drawing", VISUAL)]


def test_a_second_pass_replaces_the_first() -> None:
    once = apply(table([ALT]), "bold drawing", "a bold seven")
    assert texts(apply(once, "faint drawing", "a faint seven")) == [ALT, ("a faint seven", FUSED)]


def test_language_models_are_asked_by_the_prompt_and_the_word_table_with_the_joined_sentence() -> None:
    for fields in ({"rewriter": "lexicon", "lexicon": {}}, {"rewriter": "local", "local": {"path": "x"}}):
        rewriter = Says(lambda _: "a bold seven")
        VeClip(Config.parse(fields), Says(lambda _: "bold drawing"), rewriter).apply(table([ALT]), None)
        (asked,) = rewriter.asked
        if "local" in fields:
            assert asked.prompt == PROMPT.format(alt="buy seven now", visual="bold drawing")
            assert asked.picture is None
        else:
            assert (asked.source, asked.prompt) == ("bold drawing, buy seven now", "")


def test_the_rule_joins_what_is_not_said_yet() -> None:
    assert joined("buy seven now", "bold drawing") == "bold drawing, buy seven now"
    assert joined("Bold", "bold drawing") == "bold drawing"
    kept = VeClip(Config(), RuleCaptioner(), None).apply(table([ALT]), None).kept
    assert texts(kept)[1] == (f"{kept[DESCRIPTION][0]}, buy seven now", FUSED)


def test_captions_of_another_captioner_are_taken_over() -> None:
    config = Config(captioner="existing", existing="synthetic:blip", rewriter="none")
    frame = table([ALT, ("a bold drawing", "synthetic:blip"), ("one more", "synthetic:blip")], [ALT])
    kept = config.build(0).apply(frame, None).kept
    assert texts(kept) == [ALT, ("a bold drawing", VISUAL)]
    assert texts(kept, 1) == [ALT]
    assert kept[STATUS].to_list() == ["ok", "error"]


def test_a_model_sees_the_picture_and_no_text() -> None:
    rewriter = Says(lambda request: f"{len(request.picture)} bytes")
    said = ModelCaptioner(rewriter).describe([Seen("k", b"1234", ("secret",))])
    assert said == ["4 bytes"]
    (asked,) = rewriter.asked
    assert asked.source == ""
    assert "secret" not in asked.prompt


def test_the_same_captions_in_any_order_and_batching() -> None:
    frame = table(*[[(f"buy {index} now", "alt")] for index in range(6)])
    method = Config.parse({"lexicon": {"synonyms": {"buy": ["order", "get"]}}}).build(3)
    whole = method.apply(frame, None).kept
    parts = pl.concat([method.apply(part, None).kept for part in (frame[4:], frame[:4].reverse())])
    assert parts.sort("key").equals(whole)


def test_stats() -> None:
    kept = pl.concat([apply(table([ALT]), "bold drawing", "the bold seven"), apply(table([ALT]), "bold drawing", None)])
    stats = veclip_stats(kept)
    assert (stats["pairs"], stats["status.ok"], stats["status.error"]) == (2, 0.5, 0.5)
    assert (stats["used.vec"], stats["used.vet"], stats["used.alt"]) == (0.5, 0.5, 0)
    assert (stats["alt.words"], stats["new.words"]) == (3, 2.5)
    assert (stats["alt.first_bigram"], stats["new.first_bigram"]) == (1, 0.5)
    with pytest.raises(DataError, match="not been through"):
        veclip_stats(table([ALT]))


# ---------------------------------------------------------------- the mixture


@pytest.mark.parametrize("p_alt", [0.5, 0.2])
def test_the_mixture_has_its_share_and_is_drawn_anew_each_epoch(p_alt: float) -> None:
    hashes, two = key_hashes(f"k{index}" for index in range(10_000)), np.full(10_000, 2)
    first, second = (captions.draws(7, epoch, hashes, two, p_alt) == 0 for epoch in (0, 1))
    error = (p_alt * (1 - p_alt) / 10_000) ** 0.5
    assert abs(first.mean() - p_alt) < 3 * error
    both = p_alt**2
    assert abs((first & second).mean() - both) < 3 * (both * (1 - both) / 10_000) ** 0.5, "epochs are independent"
    halves = np.concatenate([captions.draws(7, 0, hashes[part::2], two[part::2], p_alt) == 0 for part in (0, 1)])
    assert np.array_equal(halves, np.concatenate([first[::2], first[1::2]])), "the same under another worker count"
    assert (captions.draws(7, 0, hashes, np.ones(10_000, np.int64), p_alt) == 0).all(), "a pair without a new caption keeps its alt text"


# ---------------------------------------------------------------- configuration


def test_the_catalogue_builds_it() -> None:
    method = config_class(find("veclip", "caption")).parse({"method": "veclip"}).build(0)  # type: ignore[attr-defined]
    assert isinstance(method, VeClip)
    assert method.report(None) == {"captioner": "rules", "fuser": "lexicon", "prompts": 1}


def test_a_model_on_this_machine_describes(image_to_text: Path) -> None:
    described_by = {"path": str(image_to_text), "max_new_tokens": 5}
    method = Config.parse({"captioner": "model", "described_by": described_by, "rewriter": "none"}).build(0)
    pixels = [Seen(str(shade), picture_of(shade)) for shade in (0, 120, 250)]
    answers = method.captioner.describe(pixels)
    assert len(answers) == 3
    assert all(answer is None or set(answer.split()) <= {"a", "red", "blue", "square", "on", "white"} for answer in answers)
    assert any(answers)
    assert method.report(None)["captioner"] == str(image_to_text)


def picture_of(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 255 - shade, 60)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"captioner": "model"}, "belong together"),
        ({"described_by": {"path": "x"}}, "belong together"),
        ({"captioner": "existing"}, "belong together"),
        ({"existing": "synthetic:blip"}, "belong together"),
        ({"captioner": "endpoint"}, "needs|belong together"),
        ({"captioner": "endpoint", "vision": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}}, "vision.api: chat"),
        ({"rewriter": "local"}, "needs the key 'local'"),
        ({"rewriter": "none", "lexicon": {}}, "remove the key 'lexicon'"),
        ({"rewriter": "lexikon"}, "did you mean 'lexicon'"),
    ],
)
def test_impossible_configurations_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.parse(data)
