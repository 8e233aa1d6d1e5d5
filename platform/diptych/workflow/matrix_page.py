"""The matrix for a reader: one table in the terminal, one static page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from diptych.workflow import charts
from diptych.workflow.report import STYLE, section, table

HEADLINES = ("acc1", "text_to_image_r1", "mean_acc1", "mrr")
"""The figure that stands for a set and task, the first that is there; else the task's first figure."""


def headlines(rows: pl.DataFrame) -> list[tuple[str, str, str]]:
    """`(set, task, metric)` of the figures that stand for each set and task, in the order of the rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, task, metric in _plain(rows).select("set", "task", "metric").unique(maintain_order=True).iter_rows():
        found.setdefault((name, task), []).append(metric)
    return [
        (name, task, next((metric for metric in HEADLINES if metric in metrics), metrics[0])) for (name, task), metrics in found.items()
    ]


def text(rows: pl.DataFrame, notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """A line a checkpoint, a column a set and task, the value with half of its interval's width."""
    columns = headlines(rows)
    names = list(dict.fromkeys(rows["checkpoint"]))
    cells = _cells(rows)
    heads = [[name for name, _, _ in columns], [task for _, task, _ in columns], [metric for _, _, metric in columns]]
    width = max(len(name) for name in [*names, "checkpoint"])
    shown = {(model, column): _shown(cells.get((model, *column))) for model in names for column in columns}
    widths = [max(len(head[i]) for head in heads) for i in range(len(columns))]
    widths = [max(wide, *(len(shown[model, column]) for model in names)) for wide, column in zip(widths, columns, strict=True)]
    lines = ["  ".join([(label if i == 0 else "").ljust(width), *(cell.rjust(w) for cell, w in zip(head, widths, strict=True))])
             for i, (head, label) in enumerate(zip(heads, ("checkpoint", "", ""), strict=True))]  # fmt: skip
    lines += [
        "  ".join([model.ljust(width), *(shown[model, column].rjust(w) for column, w in zip(columns, widths, strict=True))])
        for model in names
    ]
    lines += [f"  {name}: {note}" for name, said in (notes or {}).items() for note in said]
    return "\n".join(line.rstrip() for line in lines)


def write(rows: pl.DataFrame, name: str, about: str, notes: Mapping[str, Sequence[str]], path: Path) -> Path:
    """Writes the page: the headline figures, what to know of the sets, then every figure with its interval."""
    body = "\n".join(
        [
            f"<header><h1>{html.escape(name)}</h1><p>{html.escape(about)}</p></header>",
            _headline_section(rows),
            _notes_section(notes),
            *(_set_section(str(one), rows) for one in dict.fromkeys(rows["set"])),
            _settings_section(rows),
        ]
    )
    head = f"<meta charset='utf-8'><title>{html.escape(name)}</title><style>{STYLE.read_text()}</style>"
    page = f"<!doctype html><html lang='en'><head>{head}</head><body><main>{body}</main></body></html>"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _headline_section(rows: pl.DataFrame) -> str:
    columns, cells = headlines(rows), _cells(rows)
    best = {column: max((value[0] for (_, *key), value in cells.items() if tuple(key) == column), default=0.0) for column in columns}
    body = []
    for model in dict.fromkeys(rows["checkpoint"]):
        line = [html.escape(str(model))]
        for column in columns:
            cell = cells.get((model, *column))
            shown = _shown(cell)
            line.append(f"<b>{shown}</b>" if cell and cell[0] == best[column] else shown)
        body.append(line)
    names = ["checkpoint", *(f"{name} · {task} · {metric}" for name, task, metric in columns)]
    lead = "A value and half of the width of its 95 % bootstrap interval; the highest of a column in bold. Whether two differ: diptych compare."
    return section("Checkpoints and sets", lead, table(names, body, raw=range(len(names))))


def _notes_section(notes: Mapping[str, Sequence[str]]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(note)}</li>" for name, said in notes.items() for note in said)
    return section("What to know of the sets", "", f"<ul>{items}</ul>")


def _set_section(name: str, rows: pl.DataFrame) -> str:
    lines = []
    for row in _plain(rows).filter(pl.col("set") == name).sort("task", "metric", maintain_order=True).iter_rows(named=True):
        share = 0 <= row["low"] <= row["high"] <= 1
        bar = charts.interval(row["value"], row["low"], row["high"]) if share else f"{row['low']:.3g} to {row['high']:.3g}"
        lines.append([html.escape(row["task"]), html.escape(row["metric"]), html.escape(row["checkpoint"]),
                      f"{row['value']:.4f}", bar, f"{row['n']:,}"])  # fmt: skip
    body = table(["task", "figure", "checkpoint", "value", "interval", "n"], lines, raw=range(6))
    return f"<section><details><summary>All figures on {html.escape(name)}</summary>{body}</details></section>"


def _settings_section(rows: pl.DataFrame) -> str:
    kinds = rows.select("set", "task", "settings", "dataset").unique(maintain_order=True)
    body = table(["set", "task", "settings", "dataset"], [[str(value) for value in row] for row in kinds.iter_rows()])
    return f"<section><details><summary>How it was measured</summary>{body}</details></section>"


def _plain(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows that are no single draw."""
    return rows.filter(pl.col("seed").is_null())


def _cells(rows: pl.DataFrame) -> dict[tuple[str, str, str, str], tuple[float, float]]:
    """Value and half of the interval's width by checkpoint, set, task, metric."""
    plain = _plain(rows).select("checkpoint", "set", "task", "metric", "value", "low", "high")
    return {(model, name, task, metric): (value, (high - low) / 2) for model, name, task, metric, value, low, high in plain.iter_rows()}


def _shown(cell: tuple[float, float] | None) -> str:
    return "" if cell is None else f"{cell[0]:.3f} ± {cell[1]:.3f}"
