"""The table of a comparison as text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.core.digest import of_plain, short
from diptych.workflow.compare import Comparison, Figure, Side, method, summary

SHOWN = 20
NAME_CHARS = 180
CSV_COLUMNS = (
    "run", "baseline", "set", "task", "metric", "status", "n", "baseline_value", "value", "difference", "low", "high", "p", "p_holm", "test",
    "effect", "effect_kind", "wins", "ties", "losses", "better_is", "verdict", "why",
)  # fmt: skip
BETTER_IS = {1: "higher", 0: "neither", -1: "lower"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: f"\\{c}" for c in "&%$#_{}"}}


# ---------------------------------------------------------------- numbers

LEAST_P = 1e-15


def number(value: float, signed: bool = False) -> str:
    """Four decimals, with a true minus; `∞` where nothing varies."""
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    return f"{value:{'+' if signed else ''}.4f}".replace("-", "−")


def probability(value: float) -> str:
    """Two digits: `0.043`, `1.2e-09`, `1`; beyond what any test can warrant `<1e-15`."""
    return f"{value:.2g}" if value >= LEAST_P else f"<{LEAST_P:g}"


def shown(value: Any, limit: int = 72) -> str:
    """A parameter's value, cut; digests as ten digits."""
    text = short(value) if isinstance(value, str) and value.startswith("sha256:") else str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# ---------------------------------------------------------------- text


def text(found: Comparison) -> str:
    """The comparison for a terminal."""
    lines = [f"baseline {found.baseline.name}, {len(found.rows)} tests", ""]
    lines += [f"  note: {note}" for note in found.notes] + [""] * bool(found.notes)
    if found.changed:
        lines += ["  what differs:", *_changed(found), ""]
    for side in found.sides:
        lines += [*_side(side), ""]
    return "\n".join([*lines, method(found)])


def _changed(found: Comparison) -> list[str]:
    lines = [f"    {key}: {' -> '.join(shown(value) for value in values)}" for key, values in found.changed.items()]
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"    … and {len(lines) - SHOWN} more, all on the page"]


def _side(side: Side) -> list[str]:
    width = max([len(figure.key) for figure in side.figures] + [10])
    head = f"    {'figure':<{width}} {'baseline':>9} {'run':>9} {'difference':>11}   {'95 % interval':<20} {'p (Holm)':>9} {'effect':>9}  {'win/tie/loss':<16} verdict"
    lines = [f"  {side.result.name}: {summary(side)}", head]
    lines += [_line(figure, width) for figure in side.figures]
    lines += [
        f"    {row.key:<{width}} {number(row.base):>9} {number(row.value):>9}   no test: not a mean over examples" for row in side.untested
    ]
    if side.left_out:
        lines += [f"    left out, {len(side.left_out)}:", *(f"      {row.key}: {row.why}" for row in side.left_out)]
    return lines


def _line(figure: Figure, width: int) -> str:
    test, (kind, effect) = figure.found.test, figure.effect
    interval = f"{number(test.low, True)} to {number(test.high, True)}"
    return (
        f"    {figure.key:<{width}} {number(figure.found.base):>9} {number(figure.found.value):>9} {number(test.difference, True):>11}   {interval:<20}"
        f" {probability(figure.found.p_holm):>9} {kind} {number(effect, True):>7}  {'/'.join(map(str, figure.examples)):<16} {figure.verdict}"
    )


# ---------------------------------------------------------------- CSV


def to_csv(found: Comparison) -> str:
    """Every figure in full precision, the untested and the left out among them (`status`, `why`)."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for side in found.sides:
        common = {"run": side.result.name, "baseline": found.baseline.name}
        writer.writerows({**common, **_record(figure)} for figure in side.figures)
        for row in side.untested:
            writer.writerow({**common, **_named(row.key), "status": "untested", "baseline_value": row.base, "value": row.value,
                             "why": "not a mean over examples"})  # fmt: skip
        writer.writerows({**common, **_named(key), "status": "left out", "why": why} for key, why in side.left_out)
    return out.getvalue()


def _named(key: str) -> dict[str, str]:
    return dict(zip(("set", "task", "metric"), key.split("/", 2), strict=True))


def _record(figure: Figure) -> dict[str, Any]:
    row, test, (kind, effect), (wins, ties, losses) = figure.found, figure.found.test, figure.effect, figure.examples
    return {
        "set": row.set, "task": row.task, "metric": row.metric, "status": "tested", "n": test.n, "baseline_value": row.base, "value": row.value,
        "difference": test.difference, "low": test.low, "high": test.high, "p": test.p_value, "p_holm": row.p_holm, "test": test.test,
        "effect": effect, "effect_kind": kind, "wins": wins, "ties": ties, "losses": losses,
        "better_is": BETTER_IS[figure.direction], "verdict": figure.verdict,
    }  # fmt: skip


# ---------------------------------------------------------------- LaTeX


def to_latex(found: Comparison) -> str:
    """A `booktabs` table; verdicts are set in bold where the run is better, in italics where it is worse."""
    several = len(found.sides) > 1
    names = ["Set", "Task", "Metric", *(["Run"] if several else []), "$n$", "Baseline", "Run" if not several else "Value",
             r"$\Delta$ [95\,\%]", r"$p_\mathrm{Holm}$", "Effect", "W/T/L"]  # fmt: skip
    rows = [" & ".join(_latex_cells(figure, several)) + r" \\" for figure in found.rows]
    return "\n".join([
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{_escaped(', '.join(side.result.name for side in found.sides))} against {_escaped(found.baseline.name)}. {_caption(found)}}}",
        rf"\begin{{tabular}}{{{'l' * (4 if several else 3)}rrrrrrr}}",
        r"\toprule",
        " & ".join(names) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ])  # fmt: skip


def _caption(found: Comparison) -> str:
    missing = [f"{side.result.name}: {row.key} ({row.why})" for side in found.sides for row in side.left_out]
    left_out = f" Left out: {'; '.join(missing)}." if missing else ""
    return _escaped(method(found) + left_out) + r" $\uparrow$/$\downarrow$: higher/lower is better; bold: better; italics: worse."


def _latex_cells(figure: Figure, several: bool) -> list[str]:
    row, test, (kind, effect) = figure.found, figure.found.test, figure.effect
    arrow = {1: r"$\,\uparrow$", 0: "", -1: r"$\,\downarrow$"}[figure.direction]
    difference = f"{_math(number(test.difference, True))} [{_math(number(test.low, True))}, {_math(number(test.high, True))}]"
    wrap = {"better": r"\textbf{%s}", "worse": r"\textit{%s}"}.get(figure.verdict, "%s")
    return [
        _escaped(row.set), _escaped(row.task), _escaped(row.metric) + arrow, *([_escaped(figure.run)] if several else []), f"{test.n:,}",
        _math(number(row.base)), wrap % _math(number(row.value)), difference, _latex_probability(row.p_holm),
        rf"${kind}$ {_math(number(effect, True))}",
        "/".join(f"{count:,}" for count in figure.examples),
    ]  # fmt: skip


def _math(text: str) -> str:
    return text.replace("−", "$-$").replace("+", "$+$").replace("∞", r"$\infty$")


def _latex_probability(value: float) -> str:
    mantissa, _, exponent = probability(value).partition("e")
    if mantissa.startswith("<"):
        return rf"$<10^{{{int(exponent)}}}$"
    return rf"${mantissa}\cdot10^{{{int(exponent)}}}$" if exponent else mantissa


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


# ---------------------------------------------------------------- files


def default_name(runs: Sequence[str]) -> str:
    """The file name of a comparison without its ending: `A--B`, folders as dots, a digest in place of what is too long."""
    name = "--".join(run.replace("/", ".") for run in runs)
    return name if len(name) <= NAME_CHARS else f"{name[:NAME_CHARS]}--{short(of_plain(list(runs)))}"


def save(path: Path, content: str) -> Path:
    """Writes a file whole or not at all, and gives its path back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)
    return path
