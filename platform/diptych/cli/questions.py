"""The verbs that answer questions: `compare`, `lines`, `trace`, `methods`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any, get_origin

from diptych.core import catalogue
from diptych.core.config import models_in
from diptych.core.errors import ConfigError, nearest


def compare(options: argparse.Namespace) -> int:
    """`diptych compare A B …`."""
    from diptych.workflow import compare as comparisons
    from diptych.workflow import compare_page, compare_table, results
    from diptych.workflow.project import Project

    project = Project.find(Path.cwd())
    if not options.runs:
        names = results.evaluated(project) or ["no evaluated runs yet: diptych run WORKFLOW"]
        sys.stdout.write("".join(f"  {name}\n" for name in names))
        return 0
    found = comparisons.compare(project, *options.runs, seed=options.seed, resamples=options.resamples, common=options.common)
    sys.stdout.write(compare_table.text(found) + "\n\n")
    default = project.runs / ".compare" / f"{compare_table.default_name(options.runs)}.html"
    written = [compare_page.write(found, Path(options.html) if options.html else default)]
    if options.csv:
        written.append(compare_table.save(Path(options.csv), compare_table.to_csv(found)))
    if options.latex:
        written.append(compare_table.save(Path(options.latex), compare_table.to_latex(found)))
    for path in written:
        sys.stdout.write(f"  written: {path}\n")
    return 0


def lines(options: argparse.Namespace) -> int:
    """`diptych lines RUN …`."""
    from diptych.workflow import lines_page, results
    from diptych.workflow.project import Project

    project = Project.find(Path.cwd())
    if not options.runs:
        for name, run in results.evaluated(project).items():
            if lines_page.has_lines(run):
                sys.stdout.write(f"  {name}\n")
        return 0
    default = project.runs / ".lines" / f"{options.runs[0].replace('/', '--')}.html"
    runs = [results.find(project, name) for name in options.runs]
    sys.stdout.write(f"{lines_page.write_runs(runs, Path(options.html) if options.html else default)}\n")
    return 0


def trace(options: argparse.Namespace) -> int:
    """`diptych trace X`."""
    from diptych.workflow import trace as traces
    from diptych.workflow.project import Project

    sys.stdout.write(traces.text(traces.trace(Project.find(Path.cwd()), options.target, options.run)) + "\n")
    return 0


def methods(options: argparse.Namespace) -> int:
    """`diptych methods [NAME]`."""
    rows = catalogue.rows()
    if options.name:
        sys.stdout.write(describe(catalogue.find(options.name)) + "\n")
        return 0
    phases = list(dict.fromkeys(row.phase for row in rows.values()))
    if options.phase and options.phase not in phases:
        raise ConfigError.at(
            "There is no such phase", "--phase", options.phase, f"one of {', '.join(phases)}", nearest(options.phase, phases)
        )
    widest = max(map(len, rows))
    for phase in [options.phase] if options.phase else phases:
        sys.stdout.write(f"{phase}\n")
        for row in rows.values():
            if row.phase == phase:
                sys.stdout.write(f"  {row.name:<{widest}} {row.line}\n")
    return 0


def describe(row: catalogue.Row) -> str:
    """A method with its parameters: name, type, default, meaning."""
    from diptych.pairs.ingest import IngestConfig

    config = catalogue.config_class(row)
    lines = [f"{row.name} ({row.phase}): {row.line}", f"paper: {row.paper or 'none'}", f"code:  {row.config.partition(':')[0]}", ""]
    lines += _fields(config, "")
    if row.phase == "ingest":
        lines += ["", "  and what every source takes:", "", *_fields(IngestConfig, "")]
    return "\n".join(lines)


def _fields(config: Any, prefix: str) -> list[str]:
    lines = []
    for name, field in config.model_fields.items():
        if name == "method":
            continue
        default = "required" if field.is_required() else f"default {_value(field.get_default(call_default_factory=True))}"
        kind = _kind(field.annotation)
        bounds = ", ".join(_bound(entry) for entry in field.metadata if _bound(entry))
        lines.append(f"  {prefix}{name}: {kind}{f' ({bounds})' if bounds else ''}, {default}")
        if field.description:
            lines += textwrap.wrap(field.description, 100, initial_indent="      ", subsequent_indent="      ")
        key = f"{prefix}{name}.NAME." if get_origin(field.annotation) is dict else f"{prefix}{name}."
        for nested in models_in(field.annotation):
            lines += _fields(nested, key)
    return lines


def _value(value: Any) -> str:
    text = str(value.plain()) if hasattr(value, "plain") else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _kind(annotation: Any) -> str:
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else str(annotation)
    for nested in models_in(annotation):
        text = text.replace(f"{nested.__module__}.{nested.__qualname__}", "mapping").replace(nested.__qualname__, "mapping")
    return text.replace("typing.", "").replace("diptych.", "").replace("NoneType", "None")


def _bound(entry: Any) -> str:
    for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if getattr(entry, attribute, None) is not None:
            return f"{sign} {getattr(entry, attribute)}"
    return ""
