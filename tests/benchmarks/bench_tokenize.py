"""Captions per CPU second: our tokenizer beside open_clip's `SimpleTokenizer`, on the same 100,000 captions.

    python tests/benchmarks/bench_tokenize.py [--captions 100000] [--texts FILE.parquet --column text]

Without `--texts` the captions are made: web-like, Zipf-distributed words, codes, sizes, HTML entities and other scripts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diptych.models import tokenizer

CAPTIONS = 100_000
TARGET = 8.0
CALL = 1_000  # captions a call, as a loader makes them
TEMPLATES = (
    "{a} {b} {c} {d} {e} - {f} {g}",
    "{A} {B} {C} with {d} {e}, {f} {g} {h}",
    "{A} {b} for {C} {n}x{m}cm",
    "Women's {A} {B} {c} | {D} {e} {f}",
    "{a} {b} {c} {d} {e} {f} {g} {h} {n}",
    "Vector illustration of {a} {b} and {c} {d} on {e} background",
    "{A}_{b}-{n}{m}.jpg",
    "{A} {B} {C} ({n}) #{m}: {d} {e} {f} {g}",
)
OTHERS = (
    "{A} &amp; {B} {c} {d} {e}",
    "{A} – {b} {c} {d} é {e}",
    "“{a} {b}” {c} {d}…",
    "Ã©{a} {b} {c}",
    "{a} {b} 中文 {c} 😀",
    "{A}™ {b} £{n}.{m}",
)


def captions(count: int, seed: int = 0) -> list[str]:
    """Deterministic web-like captions; one in ten needs unicode repair or HTML unescaping."""
    rng = np.random.default_rng(seed)
    whole = (token.removesuffix("</w>") for token in tokenizer._word_ids().bpe.id_of if token.endswith("</w>"))
    words = sorted({word for word in whole if word.isascii() and word.isalpha() and len(word) > 1})
    words = [words[i] for i in np.random.default_rng(1).permutation(len(words))]
    rank = np.minimum(rng.zipf(1.25, (count, 8)) - 1, len(words) * 40) % len(words)
    number = rng.integers(1, 3000, (count, 2))
    kind, other = rng.integers(0, len(TEMPLATES), count), rng.integers(0, 10 * len(OTHERS), count)
    made = []
    for row in range(count):
        low = dict(zip("abcdefgh", (words[i] for i in rank[row]), strict=True))
        fields = low | {key.upper(): word.title() for key, word in low.items()} | {"n": number[row, 0], "m": number[row, 1]}
        made.append((OTHERS[other[row]] if other[row] < len(OTHERS) else TEMPLATES[kind[row]]).format(**fields))
    return made


def cpu_s(encode: Callable[[list[str]], NDArray[np.int64]], texts: list[str]) -> tuple[float, NDArray[np.int64]]:
    """CPU seconds and ids for all captions, in calls of `CALL`."""
    start = time.process_time()
    rows = [encode(texts[i : i + CALL]) for i in range(0, len(texts), CALL)]
    return time.process_time() - start, np.concatenate(rows)


def cold(encode: Callable[[list[str]], NDArray[np.int64]]) -> Callable[[list[str]], NDArray[np.int64]]:
    """The same, with the cache of words emptied: what the first pass over a data set costs."""
    tokenizer._word_ids().clear()
    return encode


def main() -> None:
    """Runs the three ways in turn, twice, and prints the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--texts", type=Path, help="a Parquet file with real captions")
    parser.add_argument("--column", default="text")
    options = parser.parse_args()
    if options.texts:
        import polars as pl

        texts = pl.read_parquet(options.texts)[options.column].drop_nulls().to_list()[: options.captions]
    else:
        texts = captions(options.captions)

    from open_clip.tokenizer import SimpleTokenizer

    peer, ours = SimpleTokenizer(), tokenizer.Tokenizer()
    rust = tokenizer._rust
    best = dict.fromkeys(("peer", "ours", "ours, python cold", "ours, python warm"), float("inf"))
    for _ in range(2):
        for name in best:
            tokenizer._rust = rust if name == "ours" else lambda: None
            encode = (lambda batch: peer(batch).numpy()) if name == "peer" else ours.encode
            seconds, ids = cpu_s(cold(encode) if "cold" in name else encode, texts)
            best[name] = min(best[name], seconds)
            if name == "peer":
                expected = ids
            assert np.array_equal(ids, expected), f"{name}: {(ids != expected).any(axis=1).sum()} rows differ"
    rate = {name: len(texts) / seconds for name, seconds in best.items()}
    characters, tokens = np.mean([len(text) for text in texts]), np.mean((expected == tokenizer.EOT).argmax(axis=1) + 1)
    print(f"{len(texts)} captions, mean {characters:.0f} characters, {tokens:.1f} tokens; cold: {rate['ours, python cold']:.0f}/s")
    for label, name in (("tokenize-python", "ours, python warm"), ("tokenize", "ours")):
        ratio = rate[name] / rate["peer"]
        print(f"BENCH {label}: ours {rate[name]:.0f}/s, peer {rate['peer']:.0f}/s, ratio {ratio:.1f}, target {TARGET}")


if __name__ == "__main__":
    main()
