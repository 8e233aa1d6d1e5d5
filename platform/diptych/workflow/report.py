"""The static HTML report of a run: one file, no server, no script from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from diptych.core import digest
from diptych.core.errors import DiptychError
from diptych.engine.progress import duration
from diptych.pairs.dataset import PairDataset
from diptych.workflow import charts, curves, sweep_charts
from diptych.workflow.spec import PAIR_PHASES, PHASES
from diptych.workflow.store import Store

if TYPE_CHECKING:
    from diptych.workflow.run import Outcome

REJECTS_SHOWN = 24
STYLE = Path(__file__).with_name("report.css")


def write(store: Store, outcome: Outcome, path: Path) -> Path:
    """Writes the report of a run to `path` and gives it back."""
    sections = [
        _head(store, outcome),
        _results(outcome),
        _corridor(outcome),
        _ledger(store, outcome),
        _contribution(store, outcome),
        _training(store, outcome),
        _retrieval(store),
        _sweep(store, outcome),
        _time(outcome),
        _settings(store),
    ]
    body = "\n".join(section for section in sections if section)
    page = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(store.name)}</title><style>{STYLE.read_text()}</style></head><body><main>{body}</main></body></html>"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _head(store: Store, outcome: Outcome) -> str:
    workflow = store.workflow
    changed = f"<p class='note'>with {html.escape(' '.join(workflow.overrides))}</p>" if workflow.overrides else ""
    about = html.escape(str(workflow.raw.get("about", "")))
    return f"<header><h1>{html.escape(store.name)}</h1><p>{about}</p>{changed}<p class='note'>seed {workflow.seed} · settings {digest.short(workflow.digest)} · {duration(outcome.wall_s)}</p></header>"


def _results(outcome: Outcome) -> str:
    metrics = outcome.figures.get("evaluate", {}).get("metrics", {})
    if not metrics:
        return ""
    rows = [
        [
            key,
            f"{m['value']:.3f}",
            charts.interval(m["value"], m["low"], m["high"]) if 0 <= m["value"] <= 1 else f"{m['low']:.3g} to {m['high']:.3g}",
            f"{m['n']:,}",
        ]
        for key, m in metrics.items()
    ]
    return section(
        "Results", "Bars show the 95 % bootstrap interval over examples.", table(["figure", "value", "interval", "n"], rows, raw=(2,))
    )


def _corridor(outcome: Outcome) -> str:
    boxes = []
    for phase in PHASES:
        figures = outcome.figures.get(phase)
        if figures is None:
            continue
        what = (
            f"{figures['kept']:,} pairs" if "kept" in figures else f"{figures['samples_seen']:,} seen" if "samples_seen" in figures else ""
        )
        state = "ran" if phase in outcome.ran else "cached"
        methods = ", ".join(str(method.get("method", "")) for method in _methods(outcome, phase)) or "nothing to do"
        boxes.append(f"<li class='{state}'><b>{phase}</b><span>{html.escape(methods)}</span><span>{what}</span><small>{state}</small></li>")
    return f"<section><h2>The corridor</h2><ol class='corridor'>{''.join(boxes)}</ol></section>"


def _methods(outcome: Outcome, phase: str) -> Sequence[Mapping[str, Any]]:
    value = outcome.workflow.params(phase)[phase]
    if phase == "ingest":
        return [value["source"]]
    if phase == "train":
        growth = [value["batch_growth"]] if value.get("batch_growth") else []
        return [{"method": value["model"]}, value["objective"], value["optimizer"], *growth]
    found: Sequence[Mapping[str, Any]] = value["benchmarks"] if phase == "evaluate" else value
    return found


def _ledger(store: Store, outcome: Outcome) -> str:
    rows, pictures = [], []
    for phase in ("ingest", *PAIR_PHASES):
        figures = outcome.figures.get(phase, {})
        if "pairs_in" not in figures:
            continue
        rows.append([phase, f"{figures['pairs_in']:,}", f"{figures['kept']:,}", ""])
        rows += [["", "", f"−{entry['count']:,}", f"{entry['reason']} ({entry['method']})"] for entry in figures.get("left", [])]
        pictures.append(_rejected(store, phase))
    shown = "".join(pictures)
    return section(
        "The ledger", "Every pair that came in was kept or left for a reason.", table(["phase", "in", "kept / left", "why"], rows) + shown
    )


def _rejected(store: Store, phase: str) -> str:
    try:
        dataset = PairDataset.open(store.folder(phase))
        rejects = dataset.rejects()
    except DiptychError:
        return ""
    if rejects.is_empty():
        return ""
    reasons = rejects.partition_by("method", "reason", as_dict=True)
    parts = []
    reader = dataset.reader()
    for (method, reason), frame in sorted(reasons.items(), key=lambda item: -item[1].height):
        few = frame.sort("key").gather_every(max(1, frame.height // REJECTS_SHOWN)).head(REJECTS_SHOWN)
        figures = "".join(_figure(reader, row) for row in few.iter_rows(named=True))
        parts.append(
            f"<h3>{phase}: {html.escape(str(reason))} ({html.escape(str(method))}, {frame.height:,})</h3><div class='sheet'>{figures}</div>"
        )
    return "".join(parts)


def _figure(reader: Any, row: Mapping[str, Any]) -> str:
    caption = (row["captions"] or [{}])[0].get("text") or "" if row.get("captions") else ""
    score = f" · {row['score']:.3f}" if row.get("score") is not None else ""
    return f"<figure>{thumbnail(reader, row.get('image'))}<figcaption>{html.escape(str(caption)[:80])}{score}</figcaption></figure>"


def thumbnail(reader: Any, image: Mapping[str, Any] | None, side: int = 72) -> str:
    """An `img` element with the picture inlined, or an empty box when there is none to show."""
    if not image or image.get("shard") is None:
        return "<span class='none'></span>"
    from diptych.pairs.thumbnails import webp

    try:
        data = webp(reader.read(image["shard"], image["offset"], image["size"]), side)
    except DiptychError:
        return "<span class='none'>broken</span>"
    return f"<img width='{side}' height='{side}' alt='' src='data:image/webp;base64,{base64.b64encode(data).decode()}'>"


def _contribution(store: Store, outcome: Outcome) -> str:
    from diptych.workflow.run import contributions

    lines = "".join(f"<li>{html.escape(line)}</li>" for line in contributions(store, outcome))
    return f"<section><h2>What each phase contributed</h2><ul>{lines}</ul></section>" if lines else ""


def _training(store: Store, outcome: Outcome) -> str:
    log = store.folder("train").parent / ".records" / "steps.jsonl"
    if not log.exists() or "train" not in outcome.figures:
        return ""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    advice = html.escape(str(outcome.figures["train"].get("advice", "")))
    return section("Training", advice, f"<div class='charts'>{curves.drawn(records)}</div>")


def _retrieval(store: Store) -> str:
    path = store.folder("evaluate") / "retrieved.parquet"
    if not path.exists():
        return ""
    dataset = PairDataset.open(store.folder("ingest"))
    images = dict(dataset.read(["key", "image"]).iter_rows())
    reader = dataset.reader()
    rows = []
    for row in pl.read_parquet(path).iter_rows(named=True):
        found = "".join(
            f"<span class='{'hit' if key == row['query_key'] else 'miss'}'>{thumbnail(reader, images[key], 48)}</span>"
            for key in row["top_keys"]
        )
        rank = "found first" if row["right"] else f"found at {row['rank_of_target']:,}"
        rows.append([html.escape(row["text"]), thumbnail(reader, images[row["query_key"]], 48), found, rank])
    return section(
        "Retrieval, right and wrong",
        "The text, its picture, the five pictures found first.",
        table(["text", "picture", "found", ""], rows, raw=(0, 1, 2)),
    )


def _sweep(store: Store, outcome: Outcome) -> str:
    sweep = outcome.figures.get("evaluate", {}).get("sweep")
    path = store.folder("evaluate") / "sweep.parquet"
    if not sweep or not path.exists():
        return ""
    found = sweep_charts.Sweep.read(path, sweep)
    rows = [[f"{value:.4f}", *(str(row[axis])[:80] for axis in found.axes)] for value, row in found.best(20)]
    text = f"{sweep['tried']} settings, chosen on {sweep['chosen_on']}, by {sweep['metric']}, {sweep['mode']}imal."
    final = [[key, f"{m['value']:.3f}", f"{m['low']:.3f} to {m['high']:.3f}"] for key, m in sweep["winner_metrics"].items()]
    failed = [[str(entry["setting"])[:120], entry["error"]] for entry in sweep.get("failed", [])]
    return section(
        "Sweep",
        text,
        found.chart()
        + found.pareto_chart()
        + table([sweep["metric"], *found.axes], rows)
        + "<h3>The winner as reported</h3>"
        + table(["figure", "value", "interval"], final)
        + ("<h3>Settings that failed twice</h3>" + table(["setting", "error"], failed) if failed else ""),
    )


def _time(outcome: Outcome) -> str:
    rows = []
    for phase in PHASES:
        figures = outcome.figures.get(phase, {})
        if "wall_s" in figures:
            predicted = figures.get("predicted_s")
            rows.append(
                [
                    phase,
                    duration(figures["wall_s"]),
                    duration(predicted) if predicted is not None else "",
                    f"{figures['peak_memory_bytes'] / 2**20:,.0f} MiB",
                ]
            )
    shares = outcome.figures.get("train", {}).get("shares", {})
    bars = charts.shares({name: float(value) for name, value in shares.items()}) if shares else ""
    return section("Where time went", "", table(["phase", "actual", "predicted", "driver's peak memory"], rows) + bars)


def _settings(store: Store) -> str:
    text = html.escape(json.dumps({phase: store.workflow.params(phase)[phase] for phase in PHASES}, indent=1, ensure_ascii=False))
    return f"<section><details><summary>All settings, defaults filled in</summary><pre>{text}</pre></details></section>"


def section(title: str, text: str, body: str) -> str:
    """A titled part of a page; `text` is plain, `body` is HTML."""
    lead = f"<p class='note'>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{lead}{body}</section>"


def table(names: Sequence[str], rows: Iterable[Sequence[str]], raw: Sequence[int] = ()) -> str:
    """An HTML table; cells are escaped except in the columns listed in `raw`."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if i in raw else html.escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
