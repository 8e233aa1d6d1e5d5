"""Which concepts does a text name? MetaCLIP's substring matching, for 500,000 concepts and many texts at once.

A concept (an *entry* of the metadata) is in a text iff it stands there between single spaces, once the text's punctuation has
been spaced (`space`). That is: the pieces of the entry, split at single spaces, are a contiguous run of the pieces of the text.
So the entries become a trie over whole pieces, and a block of texts walks it with a dozen array operations, not a character at a time:

1. the block is one byte string; its pieces are cut where spaces and line ends stand;
2. a piece of at most eight bytes *is* a 64-bit integer; a longer one is hashed, and compared byte for byte once found;
3. an open-addressing table gives the piece's slot, which is its name from then on: the first level of the trie;
4. deeper levels are one table from (node, piece) to node, asked only where some entry goes on with that piece.

Nothing rests on a hash being free of collisions: short pieces and trie steps are their own keys, long pieces are verified.

Source: "Demystifying CLIP Data" (ICLR 2024), section 3.2 (sub-string matching). Shape legend: E entries, N texts, P pieces of a
block of texts, M matches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import DataError

MARKS = (",", ".", ";", ":", "?", "!", "`")
"""The characters that spacing sets apart. Quotes, apostrophes, hyphens, brackets and slashes stay where they are."""

BLOCK_TEXTS = 16_384
BLOCK_CHARS = 4_000_000
"""A block's size: enough texts that array calls cost nothing, few enough that its arrays stay near the core (some 50 MB at worst)."""

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_ODD = np.uint64(0x9E3779B97F4A7C15)
_LONG = np.uint64(0xFF << 56)  # top byte of a long piece's key; no UTF-8 byte is 0xFF, so no short piece has it
_KEEP = np.array([(1 << 8 * size) - 1 for size in range(8)] + [0xFFFFFFFFFFFFFFFF], dtype=np.uint64)  # the first `size` bytes
_SPACE, _LINE_END = 0x20, 0x0A
# NUL becomes a byte that UTF-8 never uses, so that padding with zeros cannot be mistaken for text.
_HIDE_NUL = bytes.maketrans(b"\0", b"\xfe")
_TO_SPACE = bytes.maketrans(b"\t\r", b"  ")

_Int = NDArray[np.int64]
_Word = NDArray[np.uint64]


class Matches(NamedTuple):
    """The entries of each text: those of text i are `ids[indptr[i]:indptr[i + 1]]`, ascending and distinct.

    Attributes:
        indptr: int64 `[N + 1]`.
        ids: int64 `[M]`, positions in the list of entries.
    """

    indptr: NDArray[np.int64]
    ids: NDArray[np.int64]


def space(text: str) -> str:
    """The text as entries are looked for in it: padded, `MARKS` set apart by spaces, tab and line ends turned into spaces.

    No case folding, no Unicode normalisation, no collapsing of repeated spaces; a CR LF becomes two spaces.
    """
    spaced = f" {text} "
    for mark in MARKS:
        spaced = spaced.replace(mark, f" {mark} ")
    return spaced.replace("\t", " ").replace("\n", " ").replace("\r", " ")


class Matcher:
    """Finds the entries of texts. Build once, use for any number of texts; a few arrays, so pickling it is a copy of memory.

    Args:
        entries: the concepts, in the order that gives them their ids. An entry that holds one of `MARKS` next to a letter, a tab or
            a line end can never match, as in the paper's code ("st. louis": the text's dot is set apart), and does no harm.

    Raises:
        DataError: an entry occurs twice (two ids for one concept would share its count), or there is none.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        _refuse_duplicates(entries)
        self.entries = len(entries)
        pieces = _Pieces(_lines(entries, inner_line_end="\t"))  # no text has a tab once it is spaced: such an entry stays dead
        self._vocabulary = _Vocabulary(pieces)
        piece_P = self._vocabulary.find(pieces)
        last_E = np.flatnonzero(pieces.ends_text_P)
        self._steps = _Table(len(piece_P) - len(last_E))
        words, nodes = self._vocabulary.slots, self._vocabulary.slots + self._steps.slots
        # One element more than there are nodes: index -1, "in no entry", then reads a value of its own.
        self._entry_of = np.full(nodes + 1, -1, dtype=np.int32)
        self._goes_on = np.zeros(nodes + 1, dtype=bool)  # node -> some entry has a further piece
        self._follows = np.zeros(words + 1, dtype=bool)  # piece -> some entry has it past its first
        self._grow(piece_P, last_E)

    def _grow(self, piece_P: _Int, last_E: _Int) -> None:
        """Builds the trie level by level from the entries' pieces, entry e ending at piece `last_E[e]`."""
        at_E = np.concatenate([[0], last_E[:-1] + 1])
        node_E = piece_P[at_E]
        live = np.flatnonzero(at_E < last_E)
        while len(live):
            self._goes_on[node_E[live]] = True
            at_E[live] += 1
            self._follows[piece_P[at_E[live]]] = True
            step = _step(node_E[live], piece_P[at_E[live]])
            self._steps.insert(np.unique(step))
            node_E[live] = self._vocabulary.slots + self._steps.find(step)
            live = live[at_E[live] < last_E[live]]
        self._entry_of[node_E] = np.arange(self.entries, dtype=np.int32)

    def match(self, texts: Sequence[str]) -> Matches:
        """The entries of every text, each once a text however often it occurs. Memory is that of one block and the result."""
        sizes, ids = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for block in _blocks(texts):
            size_N, id_M = self._block(block)
            sizes.append(size_N)
            ids.append(id_M)
        return Matches(np.cumsum(np.concatenate(sizes)), np.concatenate(ids))

    def _block(self, texts: Sequence[str]) -> tuple[_Int, _Int]:
        """How many entries `[N]` each text of a block has, and the entries, text after text, ascending and distinct."""
        pieces = _Pieces(_spaced_lines(texts))
        found = list(self._walk(self._vocabulary.find(pieces), pieces.ends_text_P))
        at_M, entry_M = (np.concatenate(columns) for columns in zip(*found, strict=True))
        text_P = np.cumsum(pieces.ends_text_P) - pieces.ends_text_P
        bits = self.entries.bit_length()
        both_M = text_P[at_M] << bits | entry_M
        both_M.sort()
        both_M = both_M[np.diff(both_M, prepend=-1) > 0]
        return np.bincount(both_M >> bits, minlength=len(texts)), both_M & ((1 << bits) - 1)

    def _walk(self, piece_P: _Int, ends_P: NDArray[np.bool_]) -> Iterator[tuple[_Int, NDArray[np.int32]]]:
        """Walks the trie from every piece at once; yields, level by level, where an entry ends (piece index) and which it is."""
        entry_P = self._entry_of[piece_P]
        at = np.flatnonzero(entry_P >= 0)
        yield at, entry_P[at]
        more_P = np.zeros(len(piece_P), dtype=bool)  # the next piece is of the same text, and some entry has it past its first
        more_P[:-1] = self._follows[piece_P[1:]] & ~ends_P[:-1]
        at = np.flatnonzero(more_P & self._goes_on[piece_P])
        node = piece_P[at]
        while len(at):
            at = at + 1
            slot = self._steps.find(_step(node, piece_P[at]))
            hit = np.flatnonzero(slot >= 0)
            at, node = at[hit], slot[hit] + self._vocabulary.slots
            entry = self._entry_of[node]
            ends_entry = np.flatnonzero(entry >= 0)
            yield at[ends_entry], entry[ends_entry]
            further = np.flatnonzero(more_P[at] & self._goes_on[node])
            at, node = at[further], node[further]


class _Table:
    """A set of 64-bit keys by open addressing with linear probing; the slot where a key lies is its name."""

    def __init__(self, capacity: int) -> None:
        bits = max(4, int(3 * capacity).bit_length())  # a load of a third to a sixth: most look-ups end at the first probe
        self.slots = 1 << bits
        self._shift = np.uint64(64 - bits)
        self._keys = np.full(self.slots, _EMPTY, dtype=np.uint64)

    def insert(self, keys: _Word) -> None:
        """Adds keys (distinct, none all ones)."""
        slot = self._home(keys)
        while len(keys):
            free = self._keys[slot] == _EMPTY
            self._keys[slot[free]] = keys[free]  # of keys that meet at a slot one wins, the others go on
            lost = self._keys[slot] != keys
            keys, slot = keys[lost], (slot[lost] + 1) & (self.slots - 1)

    def find(self, keys: _Word) -> _Int:
        """The slot of each key, -1 where it is not in the table."""
        slot = self._home(keys)
        there = self._keys[slot]
        slot_or_none = np.where(there == keys, slot, -1)
        open_ = np.flatnonzero((there != keys) & (there != _EMPTY))
        slot, keys = slot[open_], keys[open_]
        while len(open_):
            slot = (slot + 1) & (self.slots - 1)
            there = self._keys[slot]
            hit = there == keys
            slot_or_none[open_[hit]] = slot[hit]
            again = np.flatnonzero(~hit & (there != _EMPTY))
            open_, slot, keys = open_[again], slot[again], keys[again]
        return slot_or_none

    def _home(self, keys: _Word) -> _Int:
        return ((keys * _ODD) >> self._shift).astype(np.int64)


class _Pieces:
    """The pieces of a block of texts, cut at single spaces; two spaces in a row have an empty piece between them.

    Args:
        data: the texts in UTF-8 without NUL, each closed by a line end.

    Attributes:
        ends_text_P: bool `[P]`, whether the piece is its text's last.
    """

    def __init__(self, data: bytes) -> None:
        padded = data + bytes(16 - len(data) % 8)  # whole words of eight bytes, and one more to read ahead into
        byte = np.frombuffer(padded, dtype=np.uint8)
        self._word = np.frombuffer(padded, dtype="<u8")
        stop_P = np.flatnonzero((byte == _SPACE) | (byte == _LINE_END))
        self.ends_text_P = byte[stop_P] == _LINE_END
        self.start_P = np.concatenate([np.zeros(min(1, len(stop_P)), dtype=np.int64), stop_P[:-1] + 1])
        self.size_P = stop_P - self.start_P

    def eight(self, index: _Int | slice, offset: int = 0) -> _Word:
        """The eight bytes from `offset` of the indexed pieces as little-endian integers, zeros past a piece's end."""
        start = self.start_P[index] + offset
        at, shift = start >> 3, ((start & 7) << 3).astype(np.uint64)
        # A shift by 64 gives zero in NumPy, which is what an aligned start needs.
        both: _Word = (self._word[at] >> shift) | (self._word[at + 1] << (np.uint64(64) - shift))
        both &= _KEEP[np.minimum(self.size_P[index] - offset, 8)]
        return both


class _Vocabulary:
    """The distinct pieces of all entries, each named by its slot in a table."""

    def __init__(self, pieces: _Pieces) -> None:
        self._longest = int(pieces.size_P.max(initial=0))
        self._salt = 0
        key_P = self._keys(pieces)
        while (distinct := self._first_of_each(pieces, key_P)) is None:
            self._salt += 1
            key_P = self._keys(pieces)
        self._table = _Table(len(distinct))
        self._table.insert(key_P[distinct])
        self.slots = self._table.slots
        long = distinct[pieces.size_P[distinct] > 8]
        self._size = np.zeros(self.slots, dtype=np.int32)  # bytes, of long pieces only: a short one is its own proof
        self._tail = np.zeros(self.slots, dtype=np.int64)  # where its words begin in `_tails`
        slot = self._table.find(key_P[long])
        words = -(-pieces.size_P[long] // 8)
        self._size[slot] = pieces.size_P[long]
        self._tail[slot] = np.cumsum(words) - words
        self._tails = np.zeros(int(words.sum()), dtype=np.uint64)
        for offset, live in _reaching(pieces.size_P[long]):
            self._tails[self._tail[slot[live]] + offset // 8] = pieces.eight(long[live], offset)

    def find(self, pieces: _Pieces) -> _Int:
        """The slot `[P]` of every piece, -1 for one that is in no entry."""
        slot_P = self._table.find(self._keys(pieces))
        # An over-long piece's key is that of a free slot, whose size is 0: it fails the comparison like any other stranger.
        long = np.flatnonzero((slot_P >= 0) & (pieces.size_P > 8))
        slot_P[long[~self._same(pieces, long, slot_P[long])]] = -1
        return slot_P

    def _keys(self, pieces: _Pieces) -> _Word:
        """A 64-bit key a piece: its bytes if there are at most eight, else a hash. One longer than all entries' pieces has no key."""
        key_P = pieces.eight(slice(None))
        index = np.flatnonzero(pieces.size_P > 8)
        key_P[index] = _EMPTY
        index = index[pieces.size_P[index] <= self._longest]
        hashed = np.full(len(index), self._salt, dtype=np.uint64)
        for offset, live in _reaching(pieces.size_P[index]):
            mixed = (hashed[live] + pieces.eight(index[live], offset)) * _ODD
            hashed[live] = (mixed ^ (mixed >> np.uint64(32))) * _ODD
        key_P[index] = (hashed >> np.uint64(8)) | _LONG
        return key_P

    def _same(self, pieces: _Pieces, index: _Int, slot: _Int) -> NDArray[np.bool_]:
        """Whether each indexed long piece equals, byte for byte, the vocabulary's piece at its slot."""
        same: NDArray[np.bool_] = self._size[slot] == pieces.size_P[index]
        for offset, live in _reaching(np.where(same, pieces.size_P[index], 0)):
            same[live] &= self._tails[self._tail[slot[live]] + offset // 8] == pieces.eight(index[live], offset)
        return same

    def _first_of_each(self, pieces: _Pieces, key_P: _Word) -> _Int | None:
        """Index of one piece a distinct key, or None if two different pieces share a key (the salt must change)."""
        _, first, which = np.unique(key_P, return_index=True, return_inverse=True)
        other = np.flatnonzero(first[which] != np.arange(len(key_P)))
        twin = first[which[other]]
        differ = pieces.size_P[other] != pieces.size_P[twin]
        for offset, live in _reaching(np.where(differ, 0, pieces.size_P[other])):
            differ[live] |= pieces.eight(other[live], offset) != pieces.eight(twin[live], offset)
        return None if differ.any() or bool((key_P == _EMPTY).any()) else first


def _reaching(sizes: _Int) -> Iterator[tuple[int, _Int]]:
    """Offsets 0, 8, 16… bytes, each with the indices of the pieces that reach past it; ends with the longest piece."""
    offset, live = 0, np.arange(len(sizes))
    while len(live := live[sizes[live] > offset]):
        yield offset, live
        offset += 8


def _step(node: _Int, piece: _Int) -> _Word:
    """The key of the step from a node to the next piece."""
    return (node << 32 | piece).astype(np.uint64)


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cuts texts, in order, into blocks within the limits; a text that is too long by itself is a block."""
    if len(texts) > BLOCK_TEXTS:
        for first in range(0, len(texts), BLOCK_TEXTS):
            yield from _blocks(texts[first : first + BLOCK_TEXTS])
    elif len(texts) > 1 and sum(map(len, texts)) > BLOCK_CHARS:
        yield from _blocks(texts[: len(texts) // 2])
        yield from _blocks(texts[len(texts) // 2 :])
    elif len(texts):
        yield texts


def _spaced_lines(texts: Sequence[str]) -> bytes:
    """`space` of many texts at once, without the padding, one a line, in UTF-8."""
    data = _lines(texts, inner_line_end=" ").translate(_TO_SPACE)
    for mark in MARKS:
        data = data.replace(mark.encode(), f" {mark} ".encode())
    return data


def _lines(texts: Sequence[str], inner_line_end: str) -> bytes:
    """The texts in UTF-8 with NUL hidden, each closed by a line end; one inside a text is replaced."""
    joined = "\n".join(texts)
    if joined.count("\n") >= max(len(texts), 1):
        joined = "\n".join(text.replace("\n", inner_line_end) for text in texts)
    # A lone surrogate is not text, but must not stop the run either.
    return f"{joined}\n".encode(errors="surrogatepass").translate(_HIDE_NUL)


def _refuse_duplicates(entries: Sequence[str]) -> None:
    if not entries:
        raise DataError.at("The list of concepts is empty", "entries", [], "at least one concept")
    if len(set(entries)) < len(entries):
        entry, times = Counter(entries).most_common(1)[0]
        raise DataError.at(
            "A concept is listed twice", "entries", f"{entry!r} {times} times", "each concept once", "remove duplicates first"
        )
