import pickle
import subprocess
import sys

import ftfy
import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from diptych.core.errors import ConfigError, DataError
from diptych.models import tokenizer
from diptych.models.tokenizer import EOT, SOT, Tokenizer

NASTY = [
    "",
    " ",
    "a",
    "!",
    "a photo of a cat.",
    "A Photo of a CAT!",
    "  multiple   spaces\tand\ttabs\nand\r\nlines\x0b\x0c ",
    "naïve café — déjà vu",
    "sÃ³ voilÃ  mojibake â€™",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and 中文字符 한국어 日本語 हिन्दी",
    "it's 2021: don't STOP'S @ 3.14% I'LL we'Ve",
    "&lt;b&gt;html &amp;amp; entities&lt;/b&gt; &nbsp;&#x27;&#39; &notit; &amp;lt;",
    "<b>&amp;amp;</b>",
    "control \x00\x01\x07\x1b[31mred\x1b[0m\x1c\x1d\x1e\x1f\x7f\x85 end",
    "zero\u200bwidth\u2028line\u2029para\u180e\ufeff\u00a0nbsp\u3000ideographic",
    "lone surrogate \ud800 \udfff pair",
    "long ſ's 'ſ K Kelvin İstanbul ß ẞ ﬁ ﬂ ｆｕｌｌｗｉｄｔｈ ǅ Σς",
    "<start_of_text> inside <END_OF_TEXT>!<end_of_text><|endoftext|>",
    "<ſtart_of_text>",
    "“curly” ‘quotes’ …",
    "½ ² Ⅷ ١٢٣ 123abc456",
    "x" * 500,
    "supercalifragilisticexpialidocious " * 40,
    "!?" * 200,
    "e\u0301 combining \u0300\u0301",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
]


@pytest.fixture(scope="module")
def reference():
    return SimpleTokenizer()


@pytest.fixture(params=["rust", "python"])
def ours(request, monkeypatch):
    if request.param == "rust":
        pytest.importorskip("instant_clip_tokenizer")
    else:
        monkeypatch.setattr(tokenizer, "_rust", lambda: None)
    return Tokenizer


def random_texts(seed: int, count: int, alphabet: list[str]) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(alphabet, rng.integers(0, 60))) for _ in range(count)]


def test_nasty_texts_get_the_ids_of_open_clip(reference, ours):
    for context in (77, 16, 3):
        np.testing.assert_array_equal(ours(context).encode(NASTY), reference(NASTY, context).numpy())


def test_a_text_has_the_same_ids_alone_and_in_a_batch(ours):
    together = ours().encode(NASTY)
    np.testing.assert_array_equal(together, np.concatenate([ours().encode([text]) for text in NASTY]))


@pytest.mark.parametrize("seed", range(4))
def test_random_ascii(reference, ours, seed):
    alphabet = [chr(code) for code in range(128)] * 2 + [" ", "e", "t", "'s", "'RE", "'ll", "the ", "<start_of_text>", "&amp;", "photo"] * 8
    texts = random_texts(seed, 400, alphabet)
    np.testing.assert_array_equal(ours().encode(texts), reference(texts).numpy())


def test_random_printable_ascii(reference, ours):
    texts = random_texts(7, 1500, [chr(code) for code in range(32, 127) if chr(code) != "&"] + [" ", "e", "a"] * 20)
    np.testing.assert_array_equal(ours(40).encode(texts), reference(texts, 40).numpy())


@pytest.mark.parametrize("highest", [0x180, 0x3000, 0x110000])
def test_random_unicode(reference, ours, highest):
    rng = np.random.default_rng(highest)
    alphabet = [chr(code) for code in rng.integers(0, highest, 4000)] + [" ", "&lt;", "Ã©", "'s"] * 100
    texts = random_texts(highest, 300, alphabet)
    np.testing.assert_array_equal(ours().encode(texts), reference(texts).numpy())


@pytest.mark.parametrize("highest", [0x250, 0x2100, 0x10000])
def test_repair_is_ftfy(highest):
    rng = np.random.default_rng(highest)
    alphabet = [chr(code) for code in rng.integers(0x20, highest, 3000)] + list("aé’“”ŉﬁ＆＜；\u0301\ufffc ") * 20
    short = ["".join(rng.choice(alphabet, rng.integers(1, 6))) for _ in range(3000)]
    for text in [*NASTY, *short, *random_texts(highest, 200, alphabet)]:
        assert tokenizer.repair(text) == ftfy.fix_text(text), text


def test_cut_keeps_every_start_and_end(reference, ours):
    texts = ["a photo of a cat", "café!", "dog <end_of_text> after"]
    cut = ours().encode_cut(texts)
    whole = reference(texts).numpy()
    assert cut.shape == (3, max(len(np.trim_zeros(row, "b")) for row in whole))
    np.testing.assert_array_equal(cut, whole[:, : cut.shape[1]])
    assert (cut[:, 0] == SOT).all()
    assert (cut == EOT).any(axis=1).all()


def test_cut_is_capped_at_the_context(ours):
    assert ours(8).encode_cut(["word " * 50]).shape == (1, 8)
    assert ours(8).encode_cut([]).shape[0] == 0
    assert ours(8).encode([]).shape == (0, 8)


def test_a_full_cache_starts_anew_and_stays_exact(reference, monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHED_CHUNKS", 4)
    monkeypatch.setattr(tokenizer, "_rust", lambda: None)
    words = tokenizer._WordIds()
    monkeypatch.setattr(tokenizer, "_word_ids", lambda: words)
    texts = ["one two three four five six seven", "two one nine ten"] * 3
    np.testing.assert_array_equal(Tokenizer().encode(texts), reference(texts).numpy())
    assert 0 < len(words) <= 4


def test_pickle_keeps_the_context():
    copy = pickle.loads(pickle.dumps(Tokenizer(12)))
    np.testing.assert_array_equal(copy.encode(["a cat"]), Tokenizer(12).encode(["a cat"]))


def test_open_clip_is_not_imported():
    use = "from diptych.models.tokenizer import Tokenizer; Tokenizer().encode(['é'])"
    code = f"import sys; {use}; print({{'open_clip', 'torch'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_what_is_not_text_is_named():
    with pytest.raises(DataError, match="caption 1"):
        Tokenizer().encode(["a", None])
    with pytest.raises(DataError, match="caption 0"):
        Tokenizer().encode([b"bytes"])
    with pytest.raises(ConfigError):
        Tokenizer(2)


@pytest.mark.parametrize("name", ["./nothing/here", "folder"])
def test_a_tokenizer_that_cannot_be_had_is_told_in_a_sentence(name, tmp_path):
    with pytest.raises(DataError, match="The model's tokenizer cannot be had"):
        tokenizer.for_model({"hf_tokenizer_name": str(tmp_path) if name == "folder" else name}, 16)
