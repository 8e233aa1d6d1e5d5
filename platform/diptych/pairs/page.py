"""The frame of the pages about pairs: one HTML file with its style and script inside, no server, nothing from elsewhere.

A content security policy lets this very script run and no other, so that nothing that stands in a caption or a key ever does.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diptych.core.errors import DiptychError
from diptych.pairs import files
from diptych.pairs.shards import ShardReader
from diptych.pairs.thumbnails import webp

THUMBNAIL_PX = 128
MAX_SHOWN_CHARS = 300


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def write(out: Path, title: str, body: Sequence[str], *, script: bool = True) -> Path:
    """Writes a page whole or not at all; gives its path. `body` is HTML, `title` plain text."""
    code = _asset("browse.js") if script else ""
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{text(title)}</title><style>\n{_asset('browse.css')}</style></head><body><main><h1>{text(title)}</h1>",
        *body,
        f"</main>{f'<script>{code}</script>' if script else ''}</body></html>\n",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = files.partial_of(out)
    try:
        files.write_durably(partial, "\n".join(parts[:-1]).encode(errors="replace") + parts[-1].encode())
        partial.replace(out)
    finally:
        files.remove(partial)
    return out


def text(value: object) -> str:
    """A value as HTML text or attribute, cut at 300 characters."""
    shown = str(value)
    return html.escape(shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}… ({len(shown):,} characters)")


def picture(reader: ShardReader, image: Mapping[str, Any] | None) -> str:
    """A picture as an `img` with its bytes inside; what cannot be shown says why."""
    if not image or image.get("shard") is None:
        return "<span class='none'>no picture</span>"
    try:
        data = webp(reader.read(image["shard"], image["offset"], image["size"]), THUMBNAIL_PX)
    except DiptychError as error:
        return f"<span class='none'>{text(error.headline)}</span>"
    return f"<img alt='' src='data:image/webp;base64,{base64.b64encode(data).decode()}'>"


def bars(head: Sequence[str], rows: Iterable[tuple[Sequence[str], int, str]], counted: str = "pairs") -> str:
    """A table of names with counts as bars; a row is its cells, its count and the bar's class. `counted` heads the counts."""
    lines = list(rows)
    most = max((count for _, count, _ in lines), default=0) or 1
    cells = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in names)
        + f"<td class='count'>{count:,}</td><td class='bar'><i class='{kind}' style='width:{100 * count / most:.2f}%'></i></td></tr>"
        for names, count, kind in lines
    )  # fmt: skip
    return f"<table><tr>{''.join(f'<th>{text(cell)}</th>' for cell in (*head, counted, ''))}</tr>{cells}</table>"


def tools(states: Sequence[str], *, scores: bool) -> str:
    """The bar with the filters; the script adds choices of what occurs."""
    boxes = "".join(f"<label><input type='checkbox' value='{text(state)}' checked> {text(state)}</label>" for state in states)
    order = (
        "<label>order <select name='order'><option value=''>as sampled</option><option value='rising'>score, lowest first</option>"
        "<option value='falling'>score, highest first</option></select></label>"
    )
    return f"<div class='tools'><input type='search' placeholder='captions, keys, columns' aria-label='search'>{boxes}{order if scores else ''}<output></output></div>"
