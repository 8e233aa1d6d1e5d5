"""CLIP's byte-pair tokenizer, id for id what open_clip's `SimpleTokenizer` gives, several times as fast.

Three things make it fast and none changes an id. A caption of printable ASCII without `&` needs no unicode repair and no
HTML unescaping. The token pattern never crosses white space, so the ids of a word are computed once and kept. And where the
Rust wheel `instant_clip_tokenizer` is installed, it tokenises those plain captions.

Shape legend: N captions, L context length.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex  # type: ignore[import-untyped]
from ftfy.badness import is_bad
from ftfy.chardata import CONTROL_CHARS, LIGATURES, WIDTH_MAP
from ftfy.fixes import uncurl_quotes
from numpy.typing import NDArray

from diptych.core.errors import ConfigError, DataError, DiptychError

SOT, EOT, VOCABULARY_SIZE = 49406, 49407, 49408
SPECIAL = ("<start_of_text>", "<end_of_text>")
MERGES = 49152 - 256 - 2
PATTERN = regex.compile("|".join(SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
REPLACED = re.compile(f"[{re.escape(''.join(map(chr, {**CONTROL_CHARS, **LIGATURES, **WIDTH_MAP})))}]")

CACHED_CHUNKS = 1 << 17
CACHED_CHUNK_CHARS = 64


class Tokenizer:
    """Captions to token ids: lower-cased byte-level BPE with 49,408 entries, `SOT … EOT`, padded with 0.

    A caption that is too long is cut and its last id becomes EOT. Cheap to construct and to pickle: the vocabulary is read on
    first use, once a process, and without importing open_clip (which takes seconds). Raises ConfigError if `context_length` < 3.
    """

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 3:
            raise ConfigError.at("The context is too short", "context_length", context_length, "at least 3: start, one token, end")
        self.context_length = context_length

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[int]]:
        return Tokenizer, (self.context_length,)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids int64 `[N, context_length]`. Raises DataError if a caption is not a string."""
        assert not isinstance(texts, str), "a sequence of captions, not one caption"
        try:
            is_plain = [_is_plain(text) for text in texts]
        except AttributeError:
            raise _not_text(texts) from None
        text_NL = np.zeros((len(texts), self.context_length), dtype=np.int64)
        plain = [row for row, is_so in enumerate(is_plain) if is_so]
        other = [row for row, is_so in enumerate(is_plain) if not is_so]
        if plain and (rust := _rust()):
            text_NL[plain] = rust.tokenize_batch([texts[row] for row in plain], context_length=self.context_length)
        else:
            self._fill(text_NL, plain, (texts[row].lower().split() for row in plain))
        self._fill(text_NL, other, (clean(texts[row]).split() for row in other))
        return text_NL

    def encode_cut(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """As `encode`, cut to the longest caption of the batch: int64 `[N, <= context_length]`. Every row keeps its EOT."""
        text_NL = self.encode(texts)
        used = np.flatnonzero((text_NL == EOT).any(axis=0))
        return text_NL[:, : used[-1] + 1 if len(used) else 2]

    def shorten(self, text_NL: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Ids of at most `length` tokens a caption, >= 3: one that is longer is cut and its last id becomes EOT, as `encode` does."""
        if text_NL.shape[1] <= length:
            return text_NL
        short_NL = text_NL[:, :length].copy()
        short_NL[(short_NL != EOT).all(axis=1), -1] = EOT
        return short_NL

    def decode(self, text_NL: Iterable[Sequence[int]]) -> list[str]:
        """The texts of token ids, up to the first EOT of each row; words are parted by single spaces. Bytes that are no UTF-8 become `\ufffd`."""
        return [_word_ids().bpe.text(row) for row in text_NL]

    def _fill(self, text_NL: NDArray[np.int64], rows: list[int], captions: Iterable[list[str]]) -> None:
        """Writes the ids of cleaned, split captions into the given rows; one array assignment for all of them."""
        space = self.context_length - 2
        word_ids, flat, lengths = _word_ids(), [], []
        for chunks in captions:
            ids = [SOT, *islice(chain.from_iterable(map(word_ids.__getitem__, chunks)), space), EOT]
            flat += ids
            lengths.append(len(ids))
        mask = np.zeros(text_NL.shape, dtype=np.bool_)
        mask[rows] = np.arange(self.context_length) < np.array(lengths, dtype=np.int64)[:, None]
        text_NL[mask] = flat


class ForeignTokenizer:
    """A tokenizer of open_clip that is not CLIP's own (SigLIP, Hugging Face), behind the same two methods.

    Args:
        pad_id: what fills captions at their end, where that is known to be all that it stands for; None: `encode_cut` does not cut.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Any], pad_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.pad_id = pad_id

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids int64 `[N, L]`."""
        return np.asarray(self.tokenizer(list(texts)), dtype=np.int64)

    def encode_cut(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """As `encode`, cut to the longest caption of the batch where the padding is known."""
        text_NL = self.encode(texts)
        if self.pad_id is None:
            return text_NL
        used = np.flatnonzero((text_NL != self.pad_id).any(axis=0))
        return text_NL[:, : used[-1] + 1 if len(used) else 1]


def for_model(text_cfg: Mapping[str, Any], context_length: int) -> Tokenizer | ForeignTokenizer:
    """The tokenizer that an open_clip text configuration asks for. Raises DataError for one of a hub that cannot be had."""
    name, options = text_cfg.get("hf_tokenizer_name"), text_cfg.get("tokenizer_kwargs", {})
    if not name and not options:
        return Tokenizer(context_length)
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if not name:
        return ForeignTokenizer(SimpleTokenizer(context_length=context_length, **options))
    mode = text_cfg.get("tokenizer_mode")
    try:
        tokenizer = HFTokenizer(name, context_length=context_length, tokenizer_mode=mode, **options)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError.at("The model's tokenizer cannot be had", "text_cfg.hf_tokenizer_name", f"{name} <{reason}>",
                           "a reachable hub, its local cache, or a folder with tokenizer.json") from error  # fmt: skip
    return ForeignTokenizer(tokenizer, None if mode else tokenizer.tokenizer.pad_token_id)


def clean(text: str) -> str:
    """Repairs unicode (ftfy), unescapes HTML twice, collapses white space, lower-cases: open_clip's `clean='lower'`."""
    return " ".join(html.unescape(html.unescape(repair(text))).split()).lower()


def repair(text: str) -> str:
    """`ftfy.fix_text(text)`, asked only where it could change something beyond straightening quotes.

    ftfy leaves alone what has no entity, no control character, no ligature or full-width form, is in normal form C and shows no
    mojibake; each of its steps tests one of these. Straightened quotes are tested again, because ftfy repeats to a fixed point.
    """
    if not _is_sound(text):
        return str(ftfy.fix_text(text))
    straight: str = uncurl_quotes(text)
    return straight if straight == text or _is_sound(straight) else str(ftfy.fix_text(text))


def _is_sound(text: str) -> bool:
    sound = text.isprintable() and "&" not in text and not REPLACED.search(text)
    return sound and unicodedata.is_normalized("NFC", text) and not is_bad(text)


def _is_plain(text: str) -> bool:
    """Whether ftfy and `html.unescape` provably leave the text as it is: no entity, no control or non-ASCII character."""
    return text.isprintable() and text.isascii() and "&" not in text


class _WordIds(dict[str, tuple[int, ...]]):
    """Chunk of text without spaces -> its ids. Started anew when full: bounded, and the common words are back at once."""

    def __init__(self) -> None:
        self.bpe = _BytePairs()

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        ids = tuple(chain.from_iterable(map(self.bpe.ids, PATTERN.findall(chunk))))
        if len(chunk) <= CACHED_CHUNK_CHARS:
            if len(self) >= CACHED_CHUNKS:
                self.clear()
            self[chunk] = ids
        return ids


class _BytePairs:
    """The vocabulary and the merges, in the order in which they are applied."""

    def __init__(self) -> None:
        merges = [tuple(line.split()) for line in _vocabulary_lines()]
        self.letters = _byte_letters()
        letters = sorted(self.letters)  # the visible bytes come first
        vocabulary = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *SPECIAL]
        self.id_of = {token: id for id, token in enumerate(vocabulary)}
        self.rank = {merge: rank for rank, merge in enumerate(merges)}

    def ids(self, word: str) -> list[int]:
        """The ids of one match of `PATTERN`."""
        if word in SPECIAL:
            return [self.id_of[word]]
        parts = [self.letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, MERGES))
            if best not in self.rank:
                break
            parts = _merge(parts, best)
        return [self.id_of[part] for part in parts]

    @cached_property
    def token_of(self) -> list[str]:
        """The token of each id."""
        return list(self.id_of)

    @cached_property
    def byte_of(self) -> dict[str, int]:
        """The byte that each visible letter stands for."""
        return {letter: byte for byte, letter in enumerate(self.letters)}

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids up to EOT, without SOT."""
        end = list(ids).index(EOT) if EOT in ids else len(ids)
        letters = "".join(self.token_of[id] for id in ids[:end] if id != SOT).replace("</w>", " ")
        words = [bytes(self.byte_of[letter] for letter in word).decode(errors="replace") for word in letters.split(" ")]
        return " ".join(words).strip()


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every occurrence of the pair, from the left."""
    merged: list[str] = []
    i = 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


def _byte_letters() -> list[str]:
    """One visible letter a byte: Latin-1's printable bytes stand for themselves, the others move to 256 and up, in order."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in visible else next(moved)) for byte in range(256)]


def _vocabulary_lines() -> list[str]:
    """The merges of CLIP's vocabulary, read from the installed open_clip without executing it."""
    spec = importlib.util.find_spec("open_clip")
    assert spec, "open_clip is a dependency of this package"
    assert spec.origin, "open_clip is installed as files"
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        return file.read().split("\n")[1 : MERGES + 1]


@cache
def _word_ids() -> _WordIds:
    return _WordIds()


@cache
def _rust() -> Any | None:
    """The Rust tokenizer where it is installed. It only sees plain captions: on those it was checked id for id."""
    try:
        import instant_clip_tokenizer
    except ImportError:
        return None
    return instant_clip_tokenizer.Tokenizer()


def _not_text(texts: Sequence[object]) -> DiptychError:
    row = next(i for i, text in enumerate(texts) if not isinstance(text, str))
    return DataError.at("A caption is not text", f"caption {row} of the batch", texts[row], "a string")
