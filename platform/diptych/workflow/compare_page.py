"""The page of a comparison: one static file that could go into a paper's appendix."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.core import digest
from diptych.workflow.compare import Comparison, Figure, Side, digests, method, summary
from diptych.workflow.compare_table import number, probability, save, shown
from diptych.workflow.forest import Group, Line, forest
from diptych.workflow.report import STYLE, section, table

OWN_STYLE = Path(__file__).with_name("compare.css")
ARROW = {1: "↑", 0: "", -1: "↓"}
SHARES = "figures in [0, 1]"
OPEN = 30
"""Parameters that are listed without a click."""


def write(found: Comparison, path: Path) -> Path:
    """Writes the page to `path` and gives it back."""
    return save(path, page(found))


def page(found: Comparison) -> str:
    """The page as HTML: no server, no script, nothing from elsewhere."""
    title = f"{' and '.join(side.result.name for side in found.sides)} against {found.baseline.name}"
    sections = [
        _head(found, title),
        _changed(found),
        *_plots(found),
        *(_numbers(side, several=len(found.sides) > 1) for side in found.sides),
        _left_out(found),
        section("Method", "", f"<p>{html.escape(method(found))}</p>"),
        _digests(found),
        _settings(found),
    ]
    style = STYLE.read_text() + OWN_STYLE.read_text()
    body = "\n".join(part for part in sections if part)
    return f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>"


def _head(found: Comparison, title: str) -> str:
    several = len(found.sides) > 1
    answers = "".join(
        f"<p class='answer'>{f'<b>{html.escape(side.result.name)}</b>: ' if several else ''}{html.escape(_sentence(summary(side), several))}</p>"
        for side in found.sides
    )
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in found.notes)
    return f"<header><h1>{html.escape(title)}</h1>{answers}{notes}</header>"


def _sentence(text: str, within: bool) -> str:
    return f"{text if within else text[0].upper() + text[1:]}."


def _changed(found: Comparison) -> str:
    if not found.changed:
        return section("What differs", "No parameter of the runs that is known differs.", "")
    rows = [[key, *(shown(value, 200) for value in values)] for key, values in found.changed.items()]
    whole = table(["parameter", *(run.name for run in found.runs)], rows)
    return section(
        "What differs", "", whole if len(rows) <= OPEN else f"<details><summary>{len(rows)} parameters</summary>{whole}</details>"
    )


# ---------------------------------------------------------------- the forest plots


def _plots(found: Comparison) -> Iterable[str]:
    panels: dict[tuple[str, int], list[Figure]] = {}
    for figure in found.rows:
        panels.setdefault((_unit(figure), figure.direction), []).append(figure)
    several = len(found.sides) > 1
    for place, ((unit, direction), figures) in enumerate(panels.items()):
        # The first figure's heading says what is drawn; the others continue it.
        lead = "Run minus baseline with its 95 % interval. Filled squares: shown by the test after correction." if place == 0 else ""
        heading = f"<h3>{html.escape(unit)} {ARROW[direction]}</h3>"
        plot = heading + forest(_groups(figures, several), direction)
        yield section("Differences", lead, plot) if place == 0 else f"<section>{plot}</section>"


def _unit(figure: Figure) -> str:
    """What shares an axis: figures in [0, 1] where more is better, else figures of one kind."""
    inside = 0 <= figure.found.base <= 1 and 0 <= figure.found.value <= 1
    return SHARES if inside and figure.direction > 0 else figure.found.metric.partition(".")[0]


def _groups(figures: Sequence[Figure], several: bool) -> list[Group]:
    groups: dict[str, list[Line]] = {}
    last = ""
    for figure in figures:
        label = figure.found.metric if figure.key != last else ""
        groups.setdefault(f"{figure.found.set} / {figure.found.task}", []).append(_line(figure, label, several))
        last = figure.key
    return [Group(heading, lines) for heading, lines in groups.items()]


def _line(figure: Figure, label: str, several: bool) -> Line:
    test = figure.found.test
    run, p = figure.run if several else "", probability(figure.found.p_holm)
    return Line(
        label, run, test.difference, test.low, test.high, figure.verdict, (_interval(figure), f"p {p}" if p.startswith("<") else f"p = {p}")
    )


def _interval(figure: Figure) -> str:
    test = figure.found.test
    return f"{number(test.difference, True)} [{number(test.low, True)}, {number(test.high, True)}]"


# ---------------------------------------------------------------- the tables


NAMES = ("metric", "n", "baseline", "run", "difference [95 %]", "p", "p (Holm)", "effect", "win / tie / loss", "verdict")


def _numbers(side: Side, several: bool) -> str:
    if not side.figures:
        return ""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in side.figures:
        groups.setdefault((figure.found.set, figure.found.task), []).append(figure)
    body = "".join(
        f"<tr><th colspan='{len(NAMES)}'>{html.escape(f'{of_set} / {task}')}</th></tr>{''.join(map(_row, figures))}"
        for (of_set, task), figures in groups.items()
    )
    head = "".join(f"<th>{name}</th>" for name in NAMES)
    text = "p: M, McNemar's exact test; B, bootstrap. Effect: h, Cohen's h; d, standardised difference. Win / tie / loss counts examples."
    title = f"Figures of {side.result.name}" if several else "Figures"
    return section(title, text, f"<div class='numbers'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def _row(figure: Figure) -> str:
    row, test, (kind, effect) = figure.found, figure.found.test, figure.effect
    cells = [
        f"{row.metric} {ARROW[figure.direction]}".rstrip(), f"{test.n:,}", number(row.base), number(row.value), _interval(figure),
        f"{probability(test.p_value)} {test.test[0].upper()}", probability(row.p_holm), f"{kind} {number(effect, True)}",
        " / ".join(f"{count:,}" for count in figure.examples),
    ]  # fmt: skip
    mark = figure.verdict if " " not in figure.verdict else "none-shown"
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}<td class='{mark}'>{figure.verdict}</td></tr>"


def _left_out(found: Comparison) -> str:
    rows = [[side.result.name, row.key, "", "", row.why] for side in found.sides for row in side.left_out]
    rows += [
        [side.result.name, row.key, number(row.base), number(row.value), "not a mean over examples: no paired test"]
        for side in found.sides
        for row in side.untested
    ]
    text = "Nothing here took part in a test or in the correction."
    return section("Not tested", text, table(["run", "figure", "baseline", "run's value", "why"], rows)) if rows else ""


def _digests(found: Comparison) -> str:
    rows = []
    for run in found.runs:
        known = digests(run)
        examples = digest.short(digest.of_file(run.home / "evaluate" / "examples.parquet"))
        rows.append([run.name, *(known.get(name, "") for name in ("model", "dataset", "code")), examples])
    return section("Digests", "", table(["run", "model", "data set", "evaluation code", "values by example"], rows))


def _settings(found: Comparison) -> str:
    """How the compared figures were measured; equal on all sides, or they would not stand here."""
    tasks: dict[tuple[str, str], dict[str, list[str]]] = {}
    for figure in found.rows:
        row = figure.found
        metrics = tasks.setdefault((row.set, row.task), {}).setdefault(_plain(row.settings), [])
        metrics += [row.metric] if row.metric not in metrics else []
    rows = [
        [f"{of_set} / {task}{_only(metrics) if len(kinds) > 1 else ''}", settings]
        for (of_set, task), kinds in tasks.items()
        for settings, metrics in kinds.items()
    ]
    return section("Measured how", "Equal on both sides of every difference.", table(["set / task", "settings"], rows))


def _only(metrics: Sequence[str]) -> str:
    return f": {', '.join(metrics)}"


def _plain(settings: Mapping[str, Any], prefix: str = "") -> str:
    return "; ".join(
        _plain(value, f"{prefix}{name}.") if isinstance(value, Mapping) else f"{prefix}{name}: {shown(value, 120) or 'none'}"
        for name, value in settings.items()
    )
