"""The card of a pair dataset: where its pairs come from and under what licence, what its captions and pictures are like, which concepts they
name before and after curation, how many are copies, and who left on the way."""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core import digest
from diptych.core.errors import DiptychError
from diptych.curate import language_filter
from diptych.pairs import browse, page
from diptych.pairs.dataset import PairDataset
from diptych.prune import picture_hashes
from diptych.workflow import chain, concept_chart, evidence
from diptych.workflow.report import STYLE, section, table

Histogram = Sequence[tuple[str, int]]
RADIUS = 3
HEAD, TAIL = 12, 12
SOURCE, LICENCE = "meta.source", "meta.licence"
MOST_LICENCES = 5
"""Licences that a card names of a source, the most frequent."""
SURE, NOT_SURE = 0.5, "not sure"
"""Probability from which a language counts; below lie captions of a word or two, mostly."""
WORD_BINS = (1, 2, 3, 5, 8, 12, 20, 35, 60, 100)
SIDE_BINS = (32, 64, 128, 200, 256, 384, 512, 768, 1024, 2048)


@dataclass(frozen=True)
class SampledPictures:
    """What a keyed sample of pictures shows: how many were read, and the shares of them with an equal or an alike one in the sample."""

    pairs: int
    broken: int
    exact: int
    alike: int


@dataclass(frozen=True)
class DataCard:
    """Everything that the page says, measured once.

    Attributes:
        name, digest, rows: of the dataset.
        steps: (phase, methods, pairs in, kept, [(method, reason, count)]) from the first dataset that was found to this one.
        sources: name -> (pairs, card); a pool that names no sources has one.
        languages, words, sides, splits, caption_sources: counts by value or range; languages of a sample.
        concepts: the census before and after, None for a dataset without captions.
        pictures: of the sample.
    """

    name: str
    digest: str
    rows: int
    steps: Sequence[tuple[str, str, int, int, Sequence[tuple[str, str, int]]]]
    sources: Mapping[str, tuple[int, Mapping[str, Any]]]
    languages: Histogram
    words: Histogram
    sides: Histogram
    splits: Histogram
    caption_sources: Histogram
    concepts: evidence.Census
    pictures: SampledPictures
    missing: Sequence[str]


def measure(dataset: PairDataset, sample: int = 2000, seed: int = 0) -> DataCard:
    """Measures a dataset and what it came from. Pictures and languages are those of `sample` pairs, drawn by `(seed, key)`."""
    steps = chain.of(dataset)
    missing = [] if not steps[0].manifest.parents else ["the datasets before the first step are not beside this one"]
    few = browse.sample(dataset.scan(), sample, seed)
    texts = dataset.scan().select(pl.col("captions").explode().struct.unnest())
    settings = next((found for step in steps if (found := evidence.matching(step))), None)
    languages, note = _languages(few)
    census = evidence.census(
        evidence.load(settings), [steps[0].scan(), *([steps[0].rejects().lazy()] if len(steps) == 1 else [])], [dataset.scan()]
    )
    image = pl.col("image").struct
    sides = dataset.scan().select(side=pl.min_horizontal(image.field("width"), image.field("height"))).collect()["side"]
    words = texts.select(words=pl.col("text").str.extract_all(r"\S+").list.len()).collect()["words"].drop_nulls()
    return DataCard(
        name=dataset.root.name,
        digest=dataset.digest,
        rows=len(dataset),
        steps=[_step(step) for step in steps],
        sources=_sources(dataset, steps[0]),
        languages=languages,
        words=_binned(words, WORD_BINS),
        sides=_binned(sides, SIDE_BINS),
        splits=_counted(dataset.scan().select("split").collect()["split"]),
        caption_sources=_counted(texts.select("source").collect()["source"].drop_nulls()),
        concepts=census,
        pictures=_pictures(dataset, few),
        missing=[*missing, *note],
    )


def _step(step: PairDataset) -> tuple[str, str, int, int, Sequence[tuple[str, str, int]]]:
    ledger, phase = step.manifest.ledger, step.manifest.phase
    methods = ", ".join(str(method.get("method")) for method in phase.methods)
    return phase.phase, methods, ledger.pairs_in, ledger.kept, [(left.method, left.reason, left.count) for left in ledger.left]


def _sources(dataset: PairDataset, first: PairDataset) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Pairs by source with what the source says of itself; where it names no licence, those that its pairs have."""
    said: Mapping[str, Any] = first.manifest.phase.report.get("sources", {})
    names = [str(method.get("method")) for method in first.manifest.phase.methods] or [first.manifest.phase.phase]
    names = ["not known"] if first.manifest.parents else names
    columns = set(dataset.scan().collect_schema().names())
    rows = dataset.scan().select(
        "key",
        source=pl.col(SOURCE) if SOURCE in columns else pl.lit(names[0]),
        licence=pl.col(LICENCE).cast(pl.String).replace("", None) if LICENCE in columns else pl.lit(None, pl.String),
    )
    counts = rows.group_by("source", "licence").len().drop_nulls("source").collect()
    found = {}
    for name, count in counts.group_by("source").agg(pl.col("len").sum()).sort("len", "source", descending=[True, False]).iter_rows():
        card = said.get(name, {}).get("card", {})
        own = _licences(counts.filter(pl.col("source") == name))
        found[str(name)] = (int(count), card if card.get("licence") or not own else {**card, "licence": own})
    return found


def _licences(counts: pl.DataFrame) -> str:
    """`CC BY 4.0 71, CC0 10, not said 2`, the most frequent first; empty where no pair names one."""
    named = counts.drop_nulls("licence").sort("len", "licence", descending=[True, False])
    if named.is_empty():
        return ""
    few = list(named.head(MOST_LICENCES).select("licence", "len").iter_rows())
    rest = [("others", int(named["len"][MOST_LICENCES:].sum())), ("not said", int(counts["len"].sum()) - int(named["len"].sum()))]
    return ", ".join(f"{name} {count:,}" for name, count in [*few, *rest] if count)


def _languages(few: pl.DataFrame) -> tuple[Histogram, list[str]]:
    """The column `language` where there is one, else what py3langid makes of first captions."""
    if "language" in few.columns:
        return _counted(few["language"].fill_null("unknown")), []
    first = few["captions"].list.first().struct.field("text").drop_nulls().to_list()
    try:
        told = language_filter.told_apart([[text] for text in first])
    except DiptychError as error:
        return [], [f"languages: {error.headline.lower()}"]
    counts = Counter(code if sure >= SURE else NOT_SURE for ((code, sure),) in told)
    return sorted(counts.items(), key=lambda entry: (entry[0] == NOT_SURE, -entry[1], entry[0])), []


def _pictures(dataset: PairDataset, few: pl.DataFrame) -> SampledPictures:
    """Digests and hashes of a sample's pictures; what cannot be read is counted, not passed over."""
    reader, contents, hashes, broken = dataset.reader(), [], [], 0
    for key, image in zip(few["key"], few["image"], strict=True):
        try:
            data = reader.read(image["shard"], image["offset"], image["size"])
            contents.append(picture_hashes.content(data, "pixels", key))
            hashes.append(picture_hashes.perceptual(data, "phash", key))
        except DiptychError:
            broken += 1
    value_N = np.array([found for found in hashes if found is not None], dtype=np.uint64)
    before_N, _ = picture_hashes.nearest_before(value_N, RADIUS)
    return SampledPictures(few.height, broken, len(contents) - len(set(contents)), int((before_N >= 0).sum()))


def _counted(values: pl.Series) -> Histogram:
    counts = values.to_frame("value").group_by("value").len().sort("len", "value", descending=[True, False])
    return [(str(value), int(count)) for value, count in counts.iter_rows()]


def _binned(values: pl.Series, edges: Sequence[int]) -> Histogram:
    """Counts between edges: below the first, then from each edge to the next, then the rest."""
    count_B: NDArray[np.int64] = np.bincount(np.searchsorted(edges, values.to_numpy(), side="right"), minlength=len(edges) + 1)
    ranges = [f"{low}" if high == low + 1 else f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)]
    names = [f"below {edges[0]}", *ranges, f"{edges[-1]} or more"]
    found = list(zip(names, count_B.tolist(), strict=True))
    filled = [place for place, (_, count) in enumerate(found) if count]
    return found[filled[0] : filled[-1] + 1] if filled else []


# ---------------------------------------------------------------- shown


def text(card: DataCard) -> str:
    """The card in a few lines for the terminal."""
    lines = [f"{card.name}: {card.rows:,} pairs, {digest.short(card.digest)}"]
    lines += [
        f"  source {name}: {count:,} pairs, licence {said.get('licence') or 'not said'}" for name, (count, said) in card.sources.items()
    ]
    lines += [f"  {phase} ({methods or 'nothing'}): {came:,} in, {kept:,} kept" for phase, methods, came, kept, _ in card.steps]
    lines.append(
        "  languages " + ", ".join(f"{name} {count:,}" for name, count in card.languages[:5]) if card.languages else "  languages not told"
    )
    named = int((card.concepts.after_E > 0).sum())
    lines.append(f"  {named:,} concepts named, {int((card.concepts.before_E > 0).sum()):,} before")
    pictures = card.pictures
    lines.append(
        f"  of {pictures.pairs:,} pictures looked at {pictures.exact:,} occur before, {pictures.alike:,} are like one before, {pictures.broken:,} are broken"
    )
    return "\n".join(lines + [f"  {note}" for note in card.missing])


def write(card: DataCard, out: Path) -> Path:
    """Writes the card as a page."""
    body = [
        f"<p class='note'>{card.rows:,} pairs; {digest.short(card.digest)}"
        + "".join(f"; {html.escape(note)}" for note in card.missing)
        + "</p>",
        f"<style>{_own_style()}</style>",
        section("Sources", "", _source_table(card)),
        section("The way here", "Pairs that came into each phase, what stayed, and why the others left.", _ledger(card)),
        section("Concepts", *_concepts(card)),
        f"<div class='charts'>{_bars('Words a caption', 'words', card.words, 'captions')}{_bars('Shorter side of pictures, pixels', 'pixels', card.sides)}"
        f"{_bars(f'Languages of {card.pictures.pairs:,} first captions', 'language', _few(card.languages))}"
        f"{_bars('Captions by where they come from', 'source', card.caption_sources, 'captions')}{_bars('Splits', 'split', card.splits)}</div>",
        section("Copies", _copies_lead(card), _copies(card.pictures)),
    ]
    return page.write(out, f"Data card of {card.name}", body, script=False)


def _own_style() -> str:
    keep = ("section", ".charts", "svg")
    layout = ".beside { display: flex; flex-wrap: wrap; gap: 12px 44px; align-items: flex-start } .beside svg { flex: 0 1 680px } .beside h3 { margin-top: 0 } section table { width: auto } td:first-child { white-space: nowrap }"
    return f"section {{ margin: 26px 0 }} {layout} " + "\n".join(line for line in STYLE.read_text().splitlines() if line.startswith(keep))


def _source_table(card: DataCard) -> str:
    heads = ["source", "pairs", "licence", "languages", "about", "left out before", "where"]
    rows = [
        [
            name,
            f"{count:,}",
            said.get("licence") or "not said",
            ", ".join(said.get("languages", ())),
            said.get("about", ""),
            said.get("filters", ""),
            said.get("url", ""),
        ]
        for name, (count, said) in card.sources.items()
    ]
    filled = [place for place in range(len(heads)) if place < 3 or any(row[place] for row in rows)]
    return table([heads[place] for place in filled], [[row[place] for place in filled] for row in rows])


def _ledger(card: DataCard) -> str:
    rows: list[tuple[Sequence[str], int, str]] = []
    for phase, methods, came, kept, left in card.steps:
        rows.append(((phase, methods or "handed on", f"of {came:,}"), kept, "kept"))
        rows += [(("", method, reason), count, "") for method, reason, count in sorted(left, key=lambda entry: -entry[2])]
    return page.bars(("phase", "method", "stays, or why it left"), rows)


def _concepts(card: DataCard) -> tuple[str, str]:
    before_E, after_E, entries = card.concepts.before_E, card.concepts.after_E, card.concepts.metadata.entries
    named = int((before_E > 0).sum())
    if not named:
        return "No caption names a concept of the list.", ""
    lead = f"{named:,} of {len(entries):,} concepts are named by training pairs, {int((after_E > 0).sum()):,} of them after. A concept counts once a pair."
    head = np.argsort(-before_E, kind="stable")[:HEAD]
    seldom = np.flatnonzero(before_E > 0)
    tail = seldom[np.argsort(before_E[seldom], kind="stable")][:TAIL]
    tables = "".join(
        f"<div><h3>{title}</h3>{table(['concept', 'before', 'after'], [[entries[e], f'{before_E[e]:,}', f'{after_E[e]:,}'] for e in chosen.tolist()])}</div>"
        for title, chosen in (("Head", head), ("Tail", tail))
    )
    return lead, f"<div class='beside'>{concept_chart.rank_frequency(before_E, after_E)}{tables}</div>"


def _few(values: Histogram, most: int = 9) -> Histogram:
    """The first values, the others together, and last what is not sure."""
    known, unsure = [entry for entry in values if entry[0] != NOT_SURE], [entry for entry in values if entry[0] == NOT_SURE]
    rest = sum(count for _, count in known[most:])
    return [*known[:most], *([(f"{len(known) - most} others", rest)] if rest else []), *unsure]


def _bars(title: str, what: str, values: Histogram, counted: str = "pairs") -> str:
    if not values:
        return ""
    return (
        f"<section><h3>{html.escape(title)}</h3>{page.bars((what,), [((name,), count, '') for name, count in values], counted)}</section>"
    )


def _copies_lead(card: DataCard) -> str:
    return f"Among {card.pictures.pairs:,} of {card.rows:,} pictures, drawn by key: copies whose other half was not drawn are not seen, so these are lower bounds."


def _copies(pictures: SampledPictures) -> str:
    rows = [
        ("the same pixels as another", pictures.exact),
        (f"a hash within {RADIUS} bits of another's", pictures.alike),
        ("cannot be read", pictures.broken),
    ]
    return page.bars(("pictures with",), [((name,), count, "") for name, count in rows])
