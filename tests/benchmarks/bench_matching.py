"""Concept matching beside an Aho-Corasick automaton over padded entries, the quick variant of the paper's own matcher.

    python tests/benchmarks/bench_matching.py            # needs the package pyahocorasick

Both sides do the whole path on one core: spacing, matching, entry ids of every text, counts of every entry. Entries and texts are
made up, after the shapes of the paper: 500,000 entries (251,000 words, 100,000 pairs of words, 149,000 capitalised titles of one
to four words) and 100,000 texts of alt-text length, some with punctuation and capitals; words follow a Zipf law.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ahocorasick  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray

from diptych.curate.matching import MARKS, Matcher

T = TypeVar("T")

ENTRIES, WORDS, PAIRS, TEXTS = 500_000, 251_000, 100_000, 100_000
ROUNDS = 5
TARGET = 3.0
MEMORY_TARGET_MB = 500


class Words:
    """Made-up words in order of frequency, drawn by a Zipf law."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        syllables = np.array(
            [start + end for start in [*"bcdfghklmnprstvw", "st", "tr", "ch", "pl"] for end in [*"aeiou", "ar", "en", "il"]]
        )
        sizes = generator.choice([1, 2, 3, 4], size=2 * WORDS, p=[0.12, 0.48, 0.3, 0.1])
        made = ("".join(generator.choice(syllables, size)) for size in sorted(sizes.tolist()))
        self.words = np.array(list(dict.fromkeys(made))[:WORDS], dtype=object)
        weight = (np.arange(len(self.words)) + 2.7) ** -1.05
        self.cumulative = np.cumsum(weight / weight.sum())

    def runs(self, sizes: NDArray[np.int64]) -> Iterator[list[str]]:
        """Runs of words of the given sizes."""
        where = np.searchsorted(self.cumulative, self.generator.random(int(sizes.sum()))).clip(0, len(self.words) - 1)
        drawn, end = self.words[where], np.cumsum(sizes)
        return (drawn[stop - size : stop].tolist() for stop, size in zip(end.tolist(), sizes.tolist(), strict=True))


def make(seed: int = 0) -> tuple[list[str], list[str]]:
    """The entries, distinct, and the texts."""
    generator = np.random.default_rng(seed)
    words = Words(generator)
    entries = dict.fromkeys(words.words.tolist())
    while len(entries) < len(words.words) + PAIRS:
        entries |= dict.fromkeys(" ".join(run) for run in words.runs(np.full(20_000, 2)))
    while len(entries) < ENTRIES:
        entries |= dict.fromkeys(" ".join(map(str.capitalize, run)) for run in words.runs(generator.integers(1, 5, 20_000)))
    endings = [""] * 8 + [",", ".", "!", " -"]

    def phrase(run: list[str]) -> str:
        capital, ending = generator.random(len(run)) < 0.3, generator.integers(0, len(endings), len(run)).tolist()
        return " ".join((w.capitalize() if up else w) + endings[end] for w, up, end in zip(run, capital, ending, strict=True))

    return list(entries)[:ENTRIES], [phrase(run) for run in words.runs(generator.poisson(7.5, TEXTS) + 1)]


def build_automaton(entries: Sequence[str]) -> ahocorasick.Automaton:
    """The peer: an automaton over " entry "."""
    automaton = ahocorasick.Automaton()
    for index, entry in enumerate(entries):
        automaton.add_word(f" {entry} ", index)
    automaton.make_automaton()
    return automaton


def peer(automaton: ahocorasick.Automaton, texts: Sequence[str]) -> tuple[list[set[int]], NDArray[np.int64]]:
    """Spaces each text, walks the automaton, collects a set of ids; counts at the end."""
    found = []
    for text in texts:
        spaced = f" {text} "
        for mark in MARKS:
            if mark in spaced:
                spaced = spaced.replace(mark, f" {mark} ")
        for blank in "\t\n\r":
            spaced = spaced.replace(blank, " ")
        found.append({index for _, index in automaton.iter(spaced)})
    count = np.bincount(np.fromiter((index for ids in found for index in ids), dtype=np.int64), minlength=ENTRIES)
    return found, count


def ours(matcher: Matcher, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The same by `Matcher`."""
    matches = matcher.match(texts)
    return matches.indptr, matches.ids, np.bincount(matches.ids, minlength=ENTRIES)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of a call, and what it gave."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def peak_mb() -> float:
    """The process's peak resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints the line of the benchmark and fails if the two disagree."""
    entries, texts = make()
    before_mb = peak_mb()
    build_s, matcher = timed(lambda: Matcher(entries))
    ours(matcher, texts)
    grown_mb = peak_mb() - before_mb  # measured before the peer exists
    peer_build_s, automaton = timed(lambda: build_automaton(entries))
    best_ours = best_peer = float("inf")
    for _ in range(ROUNDS):
        seconds, (indptr, ids, count) = timed(lambda: ours(matcher, texts))
        best_ours = min(best_ours, seconds)
        seconds, (found, peer_count) = timed(lambda: peer(automaton, texts))
        best_peer = min(best_peer, seconds)
    assert indptr.tolist() == [0, *np.cumsum([len(row) for row in found]).tolist()], "texts have other numbers of entries"
    assert ids.tolist() == [index for row in found for index in sorted(row)], "texts have other entries"
    assert np.array_equal(count, peer_count), "entries have other counts"
    print(
        f"entries {len(entries)}, {np.mean([*map(len, entries)]):.1f} characters; texts {len(texts)}, "
        f"{np.mean([*map(len, texts)]):.1f} characters, {len(ids) / len(texts):.1f} matches each; identical ids and counts"
    )
    print(f"build: ours {build_s:.2f} s, peer {peer_build_s:.2f} s; memory grown at the peak {grown_mb:.0f} MB (target {MEMORY_TARGET_MB})")
    rates = len(texts) / best_ours, len(texts) / best_peer
    print(f"BENCH matching: ours {rates[0]:.0f} texts/s, peer {rates[1]:.0f} texts/s, ratio {rates[0] / rates[1]:.2f}, target {TARGET}")


if __name__ == "__main__":
    main()
