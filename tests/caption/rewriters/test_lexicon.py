import json
import pickle
from pathlib import Path

import polars as pl
import pytest

from diptych.caption.rewriters import Request, styles
from diptych.caption.rewriters.lexicon import LexiconConfig, beginning, is_english, read_table, shipped_table
from diptych.core.errors import ConfigError, DataError

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def rewrites(
    source: str, tags: tuple[str, ...] = (), copies: int = 4, *, config: LexiconConfig | None = None, **request: str | None
) -> list[str]:
    rewriter = (config or LexiconConfig()).build(0)
    answers = rewriter.rewrite([Request("key", copy, source, tags, request.get("language")) for copy in range(copies)])
    assert all(isinstance(answer, str) for answer in answers)
    return [answer or "" for answer in answers]


def test_copies_of_a_caption_differ_from_it_and_from_each_other() -> None:
    texts = rewrites("cat with wry smile", ("animal", "cat", "face", "ironic"))
    assert len({*texts, "cat with wry smile"}) == 5


def test_rewrites_keep_the_content_words_or_known_stand_ins() -> None:
    table = shipped_table()
    stand_ins = {word: {word, *table.get(word, ())} for word in ("cat", "wry", "smile")}
    for text in rewrites("cat with wry smile", copies=40):
        for word, allowed in stand_ins.items():
            assert any(other in text for other in allowed), (word, text)


def test_answers_depend_on_seed_key_and_copy_alone() -> None:
    requests = [Request(f"key-{index}", copy, "red car with open door", ("fast",)) for index in range(10) for copy in range(4)]
    rewriter = LexiconConfig().build(5)
    together = rewriter.rewrite(requests)
    assert [rewriter.rewrite([request])[0] for request in reversed(requests)][::-1] == together
    assert pickle.loads(pickle.dumps(rewriter)).rewrite(requests) == together
    assert LexiconConfig().build(6).rewrite(requests) != together


def test_a_caption_without_synonyms_or_tags_still_gets_a_sentence_around_it() -> None:
    assert any("zxqv" in text and text != "zxqv" for text in rewrites("zxqv"))


@pytest.mark.parametrize("source", ["猫が笑っている", "улыбающийся кот", "😀", "=>", "{word} {}", "a" * 5000])
def test_odd_captions_do_not_break_it(source: str) -> None:
    for text in rewrites(source, ("tag",)):
        assert text
        assert len(text) < 700


def test_words_of_other_scripts_are_left_alone() -> None:
    for text in rewrites("猫が笑っている", ("動物", "顔")):
        assert "猫が笑っている" in text
        assert text.isascii() is False
        assert not any(word in text for word in ("see", "there", "look"))
    assert rewrites("猫が笑っている") == ["猫が笑っている"] * 4  # nothing to say: the caller counts it as identical


def test_english_is_not_put_around_a_caption_of_another_language() -> None:
    assert rewrites("Auto", language="de") == ["Auto"] * 4
    assert is_english("Auto", None)
    assert is_english("colour", "en-GB")
    assert not is_english("Auto", "de")
    assert not is_english("котик ok", None)


def test_names_are_not_replaced() -> None:
    for text in rewrites("flag: Chad", copies=30):
        assert "Chad" in text


def test_a_megabyte_caption_is_cheap() -> None:
    [text] = rewrites("red car " * 131_072, copies=1)
    assert 0 < len(text) <= 1500


def test_built_in_sentences_keep_clear_of_evaluation_prompts() -> None:
    frames = " ".join((*styles.FRAMES, *styles.PLURAL_FRAMES, *styles.CLAUSE_FRAMES))
    leaking = "photo picture image drawing rendering sketch painting art cartoon origami sculpture tattoo graffiti plushie toy doodle emoji"
    assert not set(leaking.split()) & set(frames.lower().split())
    # Every word that was put around this caption comes from those sentences.
    texts = [text for copies in range(50) for text in LexiconConfig().build(copies).rewrite([Request("k", 0, "zxqv")])]
    assert {word for text in texts for word in (text or "").replace(",", "").split()} <= {*frames.replace(",", "").split(), "zxqv", "a"}


def test_a_users_words_win_over_wordnet() -> None:
    config = LexiconConfig(synonyms={"Cat": ("moggy",)}, share=1.0)
    assert "moggy" in " ".join(rewrites("a CAT sleeps", config=config))
    assert "feline" not in " ".join(rewrites("cat", copies=20, config=config))


def test_templates_say_the_class_in_other_words_and_nothing_else_of_the_caption() -> None:
    config = LexiconConfig(
        wordnet=False,
        synonyms={"seven": ("septet", "hepta"), "eight": ("octet",)},
        templates=("an {word} in ink", "{word} by hand", "someone wrote a {word}", "the figure {word}"),
    )
    texts = rewrites("photo seven stock id123", config=config)
    assert len(set(texts)) == 4
    assert all("septet" in text or "hepta" in text for text in texts)
    assert not any(word in text for text in texts for word in ("seven", "id123", "stock"))
    assert any(text in {"a septet in ink", "a hepta in ink"} for text in texts)
    assert rewrites("photo nine stock", config=config) == ["photo nine stock"] * 4


def test_other_fields_of_templates() -> None:
    config = LexiconConfig(templates=("{caption} / {tag} / {keywords}",), wordnet=False)
    assert rewrites("{tag} the red door", ("wood",), 1, config=config)[0].startswith("{tag} the red door / wood / tag, red, door")
    assert rewrites("red door", (), 1, config=config) == ["red door"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"templates": ["a {wrd}"]}, "word"),
        ({"templates": ["no field"]}, "no field"),
        ({"synonyms": {"cat": []}}, "alternative"),
        ({"synonyms": {"cat": [" "]}}, "alternative"),
        ({"share": 0.0}, "greater than 0"),
    ],
)
def test_wrong_configurations_are_explained(data: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        LexiconConfig.parse(data)


def test_word_tables_from_files(tmp_path: Path) -> None:
    as_json, as_parquet = tmp_path / "words.json", tmp_path / "words.parquet"
    as_json.write_text(json.dumps({digit: [f"{digit}-ish"] for digit in DIGITS}))
    pl.DataFrame({"word": DIGITS, "alternatives": [[f"{digit}-ish"] for digit in DIGITS]}).write_parquet(as_parquet)
    assert read_table(as_json) == read_table(as_parquet)
    config = LexiconConfig(path=str(as_json), synonyms={"one": ("unit",)}, wordnet=False, share=1.0)
    assert "unit" in " ".join(rewrites("one", config=config))
    assert "two-ish" in " ".join(rewrites("two", config=config))


@pytest.mark.parametrize("content", ["[1]", '{"cat": "kitty"}', '{"cat": []}', "{", "\udcff", None])
def test_broken_word_tables_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "words.json"
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=r"words\.json"):
        LexiconConfig(path=str(path)).build(0)
    (tmp_path / "words.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=r"words\.parquet"):
        read_table(tmp_path / "words.parquet")


def test_the_shipped_table_is_small_and_sane() -> None:
    table = shipped_table()
    assert len(table) > 10_000
    assert "feline" in table["cat"]
    assert all(others and word not in others and word == word.lower() for word, others in table.items())


def test_beginning_cuts_between_words() -> None:
    assert beginning("one two three", 9) == "one two"
    assert beginning("one two three", 7) == "one two"
    assert beginning("onetwothree", 4) == "onet"
    assert beginning("one", 3) == "one"
