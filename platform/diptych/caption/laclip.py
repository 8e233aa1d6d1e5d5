"""LaCLIP: rewrites every caption several times; training then draws one caption a visit (`pairs/captions.py`).

Fan et al., "Improving CLIP Training with Language Rewrites" (NeurIPS 2023): text augmentation at no training cost. The paper rewrites
each caption once with each of four sets of example pairs, so K = 4. The rewriter is a choice: a language model on a server or on
this machine, as in the paper, or a table of words, which needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from diptych.caption.rewriters import Request, Rewriter
from diptych.caption.rewriters.endpoint import EndpointConfig
from diptych.caption.rewriters.lexicon import LexiconConfig
from diptych.caption.rewriters.local import LocalConfig
from diptych.caption.rewriters.prompts import EXAMPLE_SETS, ExampleSet
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import PairMethod, Verdict
from diptych.pairs.schema import CAPTIONS

SOURCE = "rewrite:laclip"
DROPPED = "meta.laclip_dropped"
"""Rewrites of a pair that were asked for and not added, by reason: a struct of Int32 counts.

`empty` (nothing said, or nothing to rewrite), `identical` (to the original or to another rewrite, but for capitals: CLIP's tokenizer
lowers them), `long` (more than `max_chars`), `failed` (the model gave nothing usable). Rewrites added + dropped = `copies` a pass."""

REASONS = ("empty", "identical", "long", "failed")


class Config(BaseConfig):
    """Appends K rewrites of a pair's first caption to its captions. No pair is rejected."""

    method: Literal["laclip"] = "laclip"
    rewriter: Literal["lexicon", "endpoint", "local"] = Field("lexicon", description="who rewrites: a word table, a server, a local model")
    copies: int = Field(4, ge=1, le=64, description="K: rewrites a caption")
    max_chars: int = Field(616, ge=16, description="longest rewrite in characters; CLIP sees 77 tokens, of some 8 characters at most")
    examples: tuple[ExampleSet, ...] = Field(
        EXAMPLE_SETS, min_length=1, description="sets of example pairs for language models, in turn a copy"
    )
    lexicon: LexiconConfig | None = Field(None, description="the word table; default: WordNet's")
    endpoint: EndpointConfig | None = Field(None, description="the server; required with rewriter endpoint")
    local: LocalConfig | None = Field(None, description="the model on disk; required with rewriter local")

    @model_validator(mode="after")
    def _one_rewriter(self) -> Self:
        blocks = {"lexicon": self.lexicon, "endpoint": self.endpoint, "local": self.local}
        superfluous = [name for name, block in blocks.items() if block is not None and name != self.rewriter]
        if superfluous:
            raise ValueError(f"the rewriter is {self.rewriter!r}: remove the key {superfluous[0]!r}, or set rewriter: {superfluous[0]}")
        if self.rewriter != "lexicon" and blocks[self.rewriter] is None:
            needs = "base_url and model" if self.rewriter == "endpoint" else "path"
            raise ValueError(f"the rewriter {self.rewriter!r} needs the key {self.rewriter!r} with at least {needs}")
        return self

    def build(self, seed: int) -> LaClip:
        """The method. Raises ConfigError or DataError for a model folder or a word table that is not there."""
        return LaClip(self, self.build_rewriter(seed))

    def build_rewriter(self, seed: int) -> Rewriter:
        """The chosen rewriter alone."""
        if self.endpoint is not None:
            return self.endpoint.build(seed, self.examples)
        if self.local is not None:
            return self.local.build(seed, self.examples)
        return (self.lexicon or LexiconConfig()).build(seed)


class LaClip(PairMethod):
    """Asks for K rewrites a pair and appends those that are usable, source `rewrite:laclip`; the original stays first."""

    def __init__(self, config: Config, rewriter: Rewriter) -> None:
        self.config = config
        self.rewriter = rewriter

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """Keeps every pair; adds captions, and counts in `meta.laclip_dropped` what was not worth adding."""
        del state
        pairs = [_Pair.of(row) for row in batch.select(_wanted(batch)).iter_rows(named=True)]
        copies = range(self.config.copies)
        requests = [Request(pair.key, copy, pair.original, pair.tags, pair.language) for pair in pairs if pair.original for copy in copies]
        answers = iter(self.rewriter.rewrite(requests))
        for pair in pairs:
            pair.add((next(answers) if pair.original else "" for _ in copies), self.config.max_chars)
        kept = batch.with_columns(
            pl.Series("captions", [pair.captions for pair in pairs], dtype=CAPTIONS),
            pl.Series(DROPPED, [pair.dropped for pair in pairs], dtype=pl.Struct(dict.fromkeys(REASONS, pl.Int32))),
        )
        return Verdict(kept, pl.DataFrame(schema={"key": pl.String, "reason": pl.String, "score": pl.Float32}))

    def tally(self, kept: pl.LazyFrame) -> Mapping[str, int]:
        """Rewrites asked for that were not added, by reason; a pair that got none has its own captions still."""
        counts = kept.select(pl.col(DROPPED).struct.unnest()).sum().collect()
        return {f"rewrites_{reason}": int(counts[reason][0] or 0) for reason in REASONS}


def _wanted(batch: pl.DataFrame) -> list[str]:
    return [name for name in ("key", "captions", "language", DROPPED) if name in batch.columns]


@dataclass
class _Pair:
    """A pair while its rewrites are judged."""

    key: str
    captions: list[dict[str, Any]]
    original: str
    tags: tuple[str, ...]
    language: str | None
    dropped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, row: dict[str, Any]) -> _Pair:
        captions = row["captions"] or []
        tags = tuple(tidy(caption["text"]) for caption in captions if caption["source"] == "tag" and caption["text"])
        original = tidy(captions[0]["text"] or "") if captions else ""
        before = row.get(DROPPED) or {}
        return cls(row["key"], list(captions), original, tags, row.get("language"), {reason: before.get(reason, 0) for reason in REASONS})

    def add(self, answers: Iterable[str | None], max_chars: int) -> None:
        """Appends the usable answers to the captions, counts the others."""
        seen = {tidy(caption["text"] or "").casefold() for caption in self.captions if caption["source"] != "tag"} | {
            self.original.casefold()
        }
        for answer in answers:
            text = tidy(answer or "")
            reason = fault_of(answer, text, seen, max_chars)
            if reason is not None:
                self.dropped[reason] += 1
                continue
            seen.add(text.casefold())
            self.captions.append({"text": text, "source": SOURCE, "score": None})


def fault_of(answer: str | None, text: str, seen: Iterable[str], max_chars: int) -> Literal["failed", "empty", "identical", "long"] | None:
    """Why an answer, tidied to `text`, is not added to captions whose case-folded texts are `seen`; None: it is usable."""
    if answer is None:
        return "failed"
    if not text:
        return "empty"
    if len(text) > max_chars:
        return "long"
    return "identical" if text.casefold() in seen else None


def tidy(text: str) -> str:
    """One line of valid Unicode: white space collapsed, half surrogate pairs (which JSON can smuggle in) replaced by `?`."""
    return " ".join(text.encode(errors="replace").decode().split())


def rewrite_stats(frame: pl.DataFrame) -> dict[str, float]:
    """What rewriting gave over a table that went through LaCLIP: where duplication and prompt leakage would show first.

    Returns:
        `pairs`, `asked`, `added` (counts); `empty`, `identical`, `long`, `failed` (shares of asked, in [0, 1]); `distinct` (different
        texts, case folded, as a share of added); `mean_chars`, `mean_words` of added rewrites, `mean_chars_original`. 0 where nothing is.

    Raises:
        DataError: the table has no `meta.laclip_dropped`.
    """
    if DROPPED not in frame.columns:
        raise DataError.at("The table has not been through LaCLIP", "columns", frame.columns, f"the column {DROPPED}")
    captions = frame.select(pl.col("captions").explode(empty_as_null=False)).unnest("captions")
    texts: Sequence[str] = captions.filter(pl.col("source") == SOURCE)["text"].to_list()
    originals = frame.select(pl.col("captions").list.first().struct.field("text")).to_series().drop_nulls()
    dropped = {reason: int(frame[DROPPED].struct.field(reason).sum()) for reason in REASONS}
    added = len(texts)
    asked = added + sum(dropped.values())
    return {
        "pairs": frame.height,
        "asked": asked,
        "added": added,
        **{reason: count / max(1, asked) for reason, count in dropped.items()},
        "distinct": len({text.casefold() for text in texts}) / max(1, added),
        "mean_chars": sum(map(len, texts)) / max(1, added),
        "mean_words": sum(len(text.split()) for text in texts) / max(1, added),
        "mean_chars_original": float(originals.str.len_chars().sum()) / max(1, len(originals)),
    }
