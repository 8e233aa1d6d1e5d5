"""Pages to look at pairs: what stays beside what left and why, and what changed between two datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from diptych.core import chance, digest
from diptych.pairs import algebra, page
from diptych.pairs.dataset import PairDataset
from diptych.pairs.page import text
from diptych.pairs.shards import ShardReader

Evidence = Callable[[pl.DataFrame], Mapping[str, Sequence[str]]]
"""From rows with `key` and `captions` to what methods saw in them, by key: short plain texts."""

ORIGINAL = ("alt", "human", "tag")
"""Sources of captions that came with the pair; others were made from it."""

HIDDEN = frozenset(
    {
        "key",
        "image",
        "captions",
        "captions_before",
        "split",
        "phase",
        "method",
        "reason",
        "score",
        "twin",
        "change",
        "columns",
        "meta.source",
    }
)
HASHES = frozenset({"meta.content", "meta.phash", "meta.dhash"})
TOLD = frozenset({"meta.source", "language"})
"""Columns whose value speaks for itself; others are shown with their name."""

MEASURED = frozenset({"meta.cluster", "meta.concepts", "meta.captioning_dropped", "meta.veclip_status", "meta.veclip_used"})
"""Columns in which a method says what it found or did, though they are not decimals."""


def contact_sheet(
    dataset: PairDataset,
    out: Path,
    limit: int = 200,
    seed: int = 0,
    evidence: Evidence | None = None,
    before: PairDataset | None = None,
) -> Path:
    """Writes a page of at most `limit` pairs and as many rejects a reason as fit into `limit`; gives its path.

    Which are shown depends on `(seed, key)` alone. Captions stand under their source, rewritten ones under the original; a copy stands
    beside the pair that it is a copy of; `evidence` adds what the methods saw. What the columns said of a pair that left is known from the
    dataset `before`, where it is given.
    """
    ledger, rejects = dataset.manifest.ledger, dataset.rejects()
    chosen = sample(dataset.scan(), limit, seed)
    groups = rejects.partition_by("method", "reason", as_dict=True)
    ordered = sorted(groups.items(), key=lambda item: (-item[1].height, item[0]))
    drawn = [(names, group.height, sample(group.lazy(), max(1, limit // len(groups)), seed)) for names, group in ordered]
    few = [(names, count, _with_columns(part, before)) for names, count, part in drawn]
    sheet = _Sheet.of(dataset, [chosen, *(part for _, _, part in few)], evidence)
    kept = (
        f"<section class='side kept'><h2>Kept ({chosen.height:,} of {len(dataset):,} shown)</h2>{sheet.figures(chosen, 'kept')}</section>"
    )
    left = "".join(
        f"<div class='group'><h3>Left: {text(reason)} ({text(method)}, {count:,})</h3>{sheet.figures(part, 'left')}</div>"
        for (method, reason), count, part in few
    )
    shown_left = sum(part.height for _, _, part in few)
    gone = f"<section class='side left'><h2>Left ({shown_left:,} of {rejects.height:,} shown)</h2>{left}</section>" if few else ""
    rows = [((entry.method, entry.reason), entry.count, "") for entry in sorted(ledger.left, key=lambda entry: -entry.count)]
    counts = page.bars(("method", "reason"), [(("", "kept"), ledger.kept, "kept"), *rows]) if rows else ""
    body = [
        f"<p class='note'>{len(dataset):,} pairs of {ledger.pairs_in:,}; phase {text(dataset.manifest.phase.phase)}; {digest.short(dataset.digest)}</p>",
        counts,
        _settings(dataset),
        page.tools(("kept", "left") if few else (), scores=bool(few)),
        f"<div class='sides' style='--sides:{2 if few else 1}'>{kept}{gone}</div>",
    ]
    return page.write(out, f"Pairs of {dataset.root.name}", body)


def difference_page(
    a: PairDataset,
    b: PairDataset,
    out: Path,
    limit: int = 200,
    seed: int = 0,
    evidence: Evidence | None = None,
    between: Sequence[PairDataset] = (),
) -> Path:
    """Writes a page of who left, arrived or changed between two datasets, at most `limit` of each; gives its path.

    Why a pair left is known from `b`, and from the datasets `between` the two where they are given.
    """
    changes = algebra.diff(a, b, between)
    sides, counts = [], []
    before = a.scan().select("key", "captions").rename({"captions": "captions_before"})
    for change, dataset in (("left", a), ("arrived", b), ("changed", b)):
        some = changes.filter(pl.col("change") == change)
        counts.append(((change, ""), some.height, "kept" if change == "arrived" else ""))
        reasons = some.drop_nulls("reason").group_by("method", "reason").len().sort("len", "reason", descending=[True, False])
        counts += [((f"{change}: {reason}", method), count, "") for method, reason, count in reasons.iter_rows()]
        if some.is_empty():
            continue
        few = sample(some.lazy(), limit, seed).join(dataset.scan().select("key", "image", "captions").collect(), on="key", how="left")
        if change == "changed":
            few = few.join(before.filter(pl.col("key").is_in(few["key"].implode())).collect(), on="key", how="left")
        few = _with_columns(few, dataset)
        shown = _Sheet.of(dataset, [few], evidence).figures(few, change)
        part = f" ({few.height:,} shown)" if few.height < some.height else ""
        sides.append(
            f"<section class='side {change}'><h2>{change.capitalize()}: {some.height:,}{part}</h2><div class='group'>{shown}</div></section>"
        )
    nothing = "<p class='empty'>Nothing differs.</p>"
    body = [
        f"<p class='note'>From {text(a.root)} ({len(a):,} pairs) to {text(b.root)} ({len(b):,} pairs).</p>",
        page.bars(("change", "method"), counts),
        page.tools([change for change in algebra.CHANGES if change in set(changes["change"])], scores=bool(changes["score"].count())),
        f"<div class='sides' style='--sides:{max(1, len(sides))}'>{''.join(sides) or nothing}</div>",
    ]
    return page.write(out, f"{a.root.name} → {b.root.name}", body)


def sample(rows: pl.LazyFrame, limit: int, seed: int) -> pl.DataFrame:
    """At most `limit` rows, those whose keys draw lowest under `seed`, in the order of the rows."""
    keys = rows.select("key").collect()["key"]
    if len(keys) <= limit:
        return rows.collect()
    drawn = np.sort(np.argsort(chance.uniform(seed, chance.key_hashes(keys)), kind="stable")[:limit])
    return rows.with_row_index("_row").filter(pl.col("_row").is_in(drawn.tolist())).drop("_row").collect()


def _settings(dataset: PairDataset) -> str:
    """The methods of the phase with their settings, and the figures that they reported; what is nested stays in the manifest."""
    phase = dataset.manifest.phase
    lines = []
    for place, method in enumerate(phase.methods):
        name = str(method.get("method"))
        found = phase.report.get(f"{place}-{name}", {})
        said = {key: value for key, value in method.items() if key != "method"}, found if isinstance(found, Mapping) else {}
        settings, figures = (", ".join(f"{key} {_short(value)}" for key, value in part.items() if _plain(value)) for part in said)
        lines.append(f"<p><b>{text(name)}</b> {text(settings)}{f'<br>reported: {text(figures)}' if figures else ''}</p>")
    return f"<details class='settings'><summary>methods and settings</summary>{''.join(lines)}</details>" if lines else ""


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float) or (
        isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value)
    )


def _with_columns(rows: pl.DataFrame, dataset: PairDataset | None) -> pl.DataFrame:
    """The rows with the plain columns that a dataset has of them: numbers, texts, lists of texts."""
    if dataset is None:
        return rows
    schema = dataset.scan().collect_schema()
    plain = [name for name, kind in schema.items() if not kind.is_nested() or kind == pl.List(pl.String)]
    names = ["key", *(name for name in plain if name not in {*rows.columns, *HIDDEN - {"meta.source"}})]
    more = dataset.scan().filter(pl.col("key").is_in(rows["key"].implode())).select(names).collect()
    return rows.join(more, on="key", how="left", maintain_order="left")


class _Sheet:
    """Makes figures of rows: their picture, captions, columns, evidence, and the picture of their twin."""

    def __init__(self, reader: ShardReader, twins: Mapping[str, Mapping[str, Any]], evidence: Mapping[str, Sequence[str]]) -> None:
        self.reader, self.twins, self.evidence = reader, twins, evidence

    @classmethod
    def of(cls, dataset: PairDataset, parts: Sequence[pl.DataFrame], evidence: Evidence | None) -> _Sheet:
        """A sheet that knows the twins of all rows, wherever they are now, and their evidence."""
        twins = (
            pl.concat([part["twin"] for part in parts if "twin" in part.columns] or [pl.Series("twin", [], pl.String)])
            .drop_nulls()
            .unique()
        )
        wanted = pl.col("key").is_in(twins.implode())
        kept = dataset.scan().filter(wanted).select("key", "image", "captions").collect()
        left = dataset.rejects().filter(wanted).select("key", "image", "captions")
        rows = {row["key"]: row for frame in (left, kept) for row in frame.iter_rows(named=True)} if len(twins) else {}
        shown = pl.concat([part.select("key", "captions") for part in parts]) if parts else pl.DataFrame()
        return cls(dataset.reader(), rows, evidence(shown) if evidence and shown.height else {})

    def figures(self, rows: pl.DataFrame, state: str) -> str:
        """The rows as one sheet."""
        wide = " wide" if "twin" in rows.columns and rows["twin"].is_not_null().any() else ""
        return f"<div class='sheet{wide}'>{''.join(self._figure(row, state) for row in rows.iter_rows(named=True))}</div>"

    def _figure(self, row: Mapping[str, Any], state: str) -> str:
        marks = {
            "state": state,
            "reason": row.get("reason"),
            "method": row.get("method"),
            "source": row.get("meta.source"),
            "score": row.get("score"),
        }
        data = " ".join(f"data-{name}='{text(value)}'" for name, value in marks.items() if value is not None)
        figures, names = _columns(row)
        chips = [*_scores(row), *_chips(figures)]
        chips += [f"<span class='evidence'>{text(found)}</span>" for found in self.evidence.get(str(row["key"]), ())]
        extra = f"<div class='chips'>{''.join(chips)}</div>" if chips else ""
        extra += (
            f"<details><summary>{len(names)} more columns</summary><div class='chips'>{''.join(_chips(names))}</div></details>"
            if names
            else ""
        )
        captions = _captions(row.get("captions") or (), row.get("captions_before"))
        return (
            f"<figure {data}>{self._pictures(row)}<figcaption>{captions}{extra}<p class='key'>{text(row['key'])}</p></figcaption></figure>"
        )

    def _pictures(self, row: Mapping[str, Any]) -> str:
        own = page.picture(self.reader, row.get("image"))
        if row.get("twin") is None:
            return own
        twin = self.twins.get(row["twin"])
        other = page.picture(self.reader, twin["image"]) if twin else "<span class='none'>it left earlier</span>"
        said = text(_first(twin["captions"]) if twin else "")
        return (
            f"<div class='two'><div>{own}<small>left</small></div><div>{other}<small>like {text(row['twin'])}<br>{said}</small></div></div>"
        )


def _first(captions: Sequence[Mapping[str, Any]] | None) -> str:
    return str(captions[0]["text"]) if captions else ""


def _scores(row: Mapping[str, Any]) -> Iterable[str]:
    if row.get("score") is not None:
        yield f"<span class='score'>score {row['score']:.3f}</span>"
    if row.get("reason") is not None and "change" in row:
        yield f"<span class='score'>{text(row['reason'])}</span>"


def _chips(texts: Iterable[str]) -> list[str]:
    return [f"<span>{text(chip)}</span>" for chip in texts]


def _columns(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What methods measured of a pair (e.g. its CLIP score, the guidance scale of its picture), and what else its columns say.

    Of a changed pair, what changed counts as measured.
    """
    changed = set(row.get("columns") or ()) - HASHES - {"captions"}
    measured = [str(row[name]) for name in sorted(TOLD, reverse=True) if row.get(name) is not None]
    named: list[str] = []
    for name, value in row.items():
        if name in HIDDEN | HASHES | TOLD or not isinstance(value, str | int | float | list):
            continue
        if value == []:  # as what has nothing to list leaves it
            changed.discard(name)
            continue
        said = ", ".join(map(str, value)) if isinstance(value, list) else f"{value:.3g}" if isinstance(value, float) else str(value)
        apart = isinstance(value, float) or name in MEASURED | changed
        (measured if apart else named).append(f"{name.removeprefix('meta.')} {said}")
        changed.discard(name)
    return [*measured, *(f"changed: {name}" for name in sorted(changed - TOLD))], named


def _captions(captions: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None) -> str:
    """The captions that came with the pair, then those made from them; of a changed pair also those that are gone."""
    gone = [one for one in before or () if one not in captions] if before is not None else []
    was = {one["text"] for one in before or ()}
    lines = [_caption(one, "gone") for one in gone]
    lines += [_caption(one, "" if one["source"] in ORIGINAL and (before is None or one["text"] in was) else "after") for one in captions]
    return "".join(lines)


def _caption(caption: Mapping[str, Any], kind: str) -> str:
    score = f" <small>{caption['score']:.2f}</small>" if caption.get("score") is not None else ""
    return f"<p class='{kind}'><span class='source'>{text(caption['source'])}</span> {text(caption['text'])}{score}</p>"
