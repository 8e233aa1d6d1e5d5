"""What curating saw in a pair's captions, for the pages: the concepts they name, with how many pairs name them before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.curate import concepts
from diptych.curate.concepts import Concepts
from diptych.pairs.browse import ORIGINAL
from diptych.pairs.dataset import PairDataset

MOST_CONCEPTS = 4
"""Concepts named of a pair, the rarest first: what everything is called says little."""
BLOCK_ROWS = 50_000
BETWEEN = "\n\0\n"
_Int = NDArray[np.int64]


@dataclass(frozen=True)
class Census:
    """How many pairs name each concept, int64 `[E]`, before and after a phase, or over a chain of them."""

    metadata: Concepts
    before_E: _Int
    after_E: _Int


def of_phase(dataset: PairDataset) -> Callable[[pl.DataFrame], Mapping[str, Sequence[str]]] | None:
    """The evidence of the phase that made a dataset, or None where no method of it matched concepts."""
    settings = matching(dataset)
    if settings is None:
        return None
    found = census(load(settings), [dataset.scan(), dataset.rejects().lazy()], [dataset.scan()])

    def evidence(rows: pl.DataFrame) -> dict[str, list[str]]:
        matches = found.metadata.matcher.match(joined(rows["captions"]))
        return {
            key: [_said(found, entry) for entry in sorted(matches.ids[start:stop].tolist(), key=lambda entry: (found.before_E[entry], entry))[:MOST_CONCEPTS]]
            for key, start, stop in zip(rows["key"], matches.indptr[:-1], matches.indptr[1:], strict=True)
        }  # fmt: skip

    return evidence


def matching(dataset: PairDataset) -> Mapping[str, Any] | None:
    """The settings of the method that matched concepts in the phase that made a dataset."""
    return next((method for method in dataset.manifest.phase.methods if method.get("method") == "metaclip"), None)


def load(settings: Mapping[str, Any] | None) -> Concepts:
    """The concepts of a method's settings, the shipped ones without any."""
    metadata = (settings or {}).get("metadata", concepts.BUILTIN)
    return concepts.load(metadata if isinstance(metadata, str) else tuple(metadata))


def census(metadata: Concepts, before: Sequence[pl.LazyFrame], after: Sequence[pl.LazyFrame]) -> Census:
    """Counts, in training pairs and rejects: a concept once a pair, whatever number of its captions name it."""
    return Census(metadata, _counts(metadata, before), _counts(metadata, after))


def _counts(metadata: Concepts, frames: Sequence[pl.LazyFrame]) -> _Int:
    counts_E = np.zeros(len(metadata.entries), dtype=np.int64)
    for frame in frames:
        train = pl.col("split") == "train" if "split" in frame.collect_schema().names() else pl.lit(True)
        captions = frame.filter(train).select("captions").collect()["captions"]
        for start in range(0, len(captions), BLOCK_ROWS):
            matches = metadata.matcher.match(joined(captions[start : start + BLOCK_ROWS]))
            counts_E += np.bincount(matches.ids, minlength=len(counts_E))
    return counts_E


def joined(captions: pl.Series) -> list[str]:
    """The captions that came with each pair, as one text; what stands between two is in no concept, so that none reaches across."""
    one = pl.element()
    own = one.filter(one.struct.field("source").is_in(list(ORIGINAL))).struct.field("text")
    return captions.list.eval(own).list.join(BETWEEN).fill_null("").to_list()


def _said(found: Census, entry: int) -> str:
    before, after = int(found.before_E[entry]), int(found.after_E[entry])
    return f"{found.metadata.entries[entry]} {before:,}" + ("" if before == after else f" → {after:,}")
