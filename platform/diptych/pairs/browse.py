"""Pages to look at pairs: one HTML file that needs no server, no script and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from diptych.core import chance, digest
from diptych.core.errors import DiptychError
from diptych.pairs import algebra, files
from diptych.pairs.dataset import PairDataset
from diptych.pairs.shards import ShardReader
from diptych.pairs.thumbnails import webp

THUMBNAIL_PX = 128
MAX_SHOWN_CHARS = 300

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem }}
figure {{ margin: 0; overflow-wrap: anywhere }} img, .none {{ width: 128px; height: 128px; object-fit: contain; background: #eee; display: block }}
figcaption p {{ margin: .2rem 0 }} .key, .source {{ color: #666; font-size: 11px }} td, th {{ padding: .1rem .8rem .1rem 0; text-align: left }}
</style></head><body><h1>{title}</h1>
"""


def contact_sheet(dataset: PairDataset, out: Path, limit: int = 200, seed: int = 0) -> Path:
    """Writes a page of at most `limit` pairs and as many rejects a reason as fit into `limit`; gives its path.

    Which are shown depends on `(seed, key)` alone. Captions stand under their source, rejects under method and reason.
    """
    reader, ledger = dataset.reader(), dataset.manifest.ledger
    chosen = sample(dataset.scan(), limit, seed)
    rows = [(entry.method, entry.reason, f"{entry.count:,}") for entry in ledger.left]
    body = [
        f"<p>{len(dataset):,} pairs of {ledger.pairs_in:,}; phase {_text(dataset.manifest.phase.phase)}; {digest.short(dataset.digest)}</p>",
        _table(("method", "reason", "pairs"), rows) if rows else "",
        f"<h2>Kept ({chosen.height:,} shown)</h2>",
        _sheet(reader, chosen.iter_rows(named=True)),
    ]
    rejects = dataset.rejects()
    groups = rejects.partition_by("method", "reason", as_dict=True)
    for (method, reason), group in sorted(groups.items(), key=lambda item: (-item[1].height, item[0])):
        few = sample(group.lazy(), max(1, limit // len(groups)), seed)
        body += [f"<h2>Left: {_text(reason)} ({_text(method)}, {group.height:,})</h2>", _sheet(reader, few.iter_rows(named=True))]
    return _write(out, f"Pairs of {dataset.root.name}", body)


def difference_page(a: PairDataset, b: PairDataset, out: Path, limit: int = 200, seed: int = 0) -> Path:
    """Writes a page of who left, arrived or changed between two datasets, at most `limit` of each; gives its path."""
    changes = algebra.diff(a, b)
    body = [f"<p>From {_text(a.root)} ({len(a):,} pairs) to {_text(b.root)} ({len(b):,} pairs).</p>"]
    for change, dataset in (("left", a), ("arrived", b), ("changed", b)):
        some = changes.filter(pl.col("change") == change)
        few = sample(some.lazy(), limit, seed).join(dataset.scan().select("key", "image", "captions").collect(), on="key", how="left")
        body += [f"<h2>{change.capitalize()}: {some.height:,}</h2>", _sheet(dataset.reader(), few.iter_rows(named=True))]
    return _write(out, f"{a.root.name} → {b.root.name}", body)


def sample(rows: pl.LazyFrame, limit: int, seed: int) -> pl.DataFrame:
    """At most `limit` rows, those whose keys draw lowest under `seed`, in the order of the rows."""
    keys = rows.select("key").collect()["key"]
    if len(keys) <= limit:
        return rows.collect()
    drawn = np.sort(np.argsort(chance.uniform(seed, chance.key_hashes(keys)), kind="stable")[:limit])
    return rows.with_row_index("_row").filter(pl.col("_row").is_in(drawn.tolist())).drop("_row").collect()


def _sheet(reader: ShardReader, rows: Iterable[Mapping[str, Any]]) -> str:
    return f"<div class='sheet'>{''.join(_figure(reader, row) for row in rows)}</div>"


def _figure(reader: ShardReader, row: Mapping[str, Any]) -> str:
    captions = "".join(
        f"<p><span class='source'>{_text(caption['source'])}</span> {_text(caption['text'])}</p>" for caption in row.get("captions") or ()
    )
    notes = [f"score {row['score']:.3f}" if row.get("score") is not None else "", ", ".join(row.get("columns") or ())]
    notes += [str(row["reason"])] if row.get("reason") and "change" in row else []
    extra = _text(" · ".join(filter(None, [str(row["key"]), *notes])))
    return f"<figure>{_image(reader, row.get('image'))}<figcaption>{captions}<p class='key'>{extra}</p></figcaption></figure>"


def _image(reader: ShardReader, image: Mapping[str, Any] | None) -> str:
    if not image or image.get("shard") is None:
        return "<span class='none'></span>"
    try:
        data = webp(reader.read(image["shard"], image["offset"], image["size"]), THUMBNAIL_PX)
    except DiptychError as error:
        return f"<span class='none'>{_text(error.headline)}</span>"
    return f"<img alt='' src='data:image/webp;base64,{base64.b64encode(data).decode()}'>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>{lines}</table>"


def _text(value: object) -> str:
    text = str(value)
    return html.escape(text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}… ({len(text):,} characters)")


def _write(out: Path, title: str, body: Sequence[str]) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = files.partial_of(out)
    try:
        files.write_durably(partial, (_HEAD.format(title=_text(title)) + "\n".join(body) + "\n</body></html>\n").encode(errors="replace"))
        partial.replace(out)
    finally:
        files.remove(partial)
    return out
