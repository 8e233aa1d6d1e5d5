"""Claims as rows of MLflow, and `docs/REPRODUCTIONS.md` written from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych.core import digest
from diptych.engine import tracking
from diptych.engine.outbox import Outbox
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.workflow import claim as claims
from diptych.workflow import identity, lines_page, results
from diptych.workflow.project import Project

EXPERIMENT = "diptych-claims"
METRIC_NAMES = {"rows": "data/train/rows", "train_s": "time/train_s"}
HEAD = """# Reproductions

What each paper claims, the small experiment that should show it, and what came out here. Written by `diptych claim NAME`
from MLflow; do not edit by hand. Differences are means over seeds with the paired 95 % t interval.
"""


def run(path: Path, project: Project, in_process: bool, tracking_uri: str | None) -> claims.ClaimResult:
    """Runs a claim, records it in MLflow and rewrites the table of reproductions."""
    claims.load(path)
    tracker = tracking.Tracker(tracking.Target.local(project.root, EXPERIMENT, tracking_uri), Outbox(project.runs / ".outbox-claims"))
    tracker.check()
    with Session(in_process=in_process) as session:
        result = claims.run(path, project, session, Progress())
    _record(tracker, result)
    _draw_lines(project, result)
    if tracker.close() == 0:
        write(project, tracker)
    return result


def _draw_lines(project: Project, result: claims.ClaimResult) -> None:
    """The page of the claim's runs that compared data sources, `runs/claims/<claim>/lines.html`, where there are any."""
    home = f"claims/{result.file.claim}"
    runs = [run for name, run in results.evaluated(project).items() if name.startswith(f"{home}/") and lines_page.has_lines(run)]
    if runs:
        lines_page.write_runs(runs, project.runs / home / "lines.html", result.file.claim, result.file.about)


def _record(tracker: tracking.Tracker, result: claims.ClaimResult) -> None:
    file = result.file
    group = {"claim": file.claim, "config": digest.short(digest.of_plain(file.plain()))}
    summary = tracker.start(file.claim, tags={**group, "kind": "claim", "result": json.dumps(_plain(result))})
    tracker.params(summary, {"seeds": list(file.seeds), "arms": list(file.arms), "code": digest.short(identity.code("train"))})
    for finding in result.findings:
        d, e = finding.demand, finding.estimate
        name = f"claim/{d.better}{'' if d.worse is None else f'-{d.worse}'}/{d.metric.rsplit('/', 1)[1]}"
        tracker.metrics(summary, {name: e.mean, f"{name}/low": e.low, f"{name}/high": e.high})
    tracker.metrics(summary, {"claim/shown": float(result.shown), "time/total_s": result.wall_s})
    for row in result.table.iter_rows(named=True):
        trial = tracker.start(
            f"{file.claim}/{row['arm']}/s{row['seed']}", tags={**group, "kind": "arm", "arm": row["arm"], "seed": str(row["seed"])}
        )
        tracker.metrics(trial, {_metric_name(key): value for key, value in row.items() if isinstance(value, float)})
        tracker.end(trial)
    tracker.end(summary)


def _metric_name(key: str) -> str:
    return key if key.startswith("train/") else METRIC_NAMES.get(key, f"eval/{key}")


def _plain(result: claims.ClaimResult) -> dict[str, Any]:
    """What the table needs, as it is stored in the summary run."""
    file = result.file
    findings = [
        {
            **finding.demand.plain(), "mean": finding.estimate.mean, "low": finding.estimate.low, "high": finding.estimate.high, "shown": finding.shown,
            "better_values": [finding.better[seed] for seed in sorted(finding.better)], "worse_values": [finding.worse[seed] for seed in sorted(finding.worse)],
        }
        for finding in result.findings
    ]  # fmt: skip
    return {
        "claim": file.claim, "seeds": list(file.seeds), "shown": result.shown,
        "findings": findings, "wall_s": result.wall_s,
    }  # fmt: skip


def write(project: Project, tracker: tracking.Tracker) -> Path:
    """Rewrites `docs/REPRODUCTIONS.md` from the newest summary run of every claim."""
    newest: dict[str, Mapping[str, Any]] = {}
    for tags in tracking.newest_first(tracker.target, "tags.kind = 'claim'"):
        found = json.loads(tags["result"])
        newest.setdefault(found["claim"], found)
    files = {file.stem: claims.load(file) for file in (project.root / "workflows" / "claims").glob("*.yaml")}
    path = project.root / "docs" / "REPRODUCTIONS.md"
    path.parent.mkdir(exist_ok=True)
    kept = _earlier(path)
    kept.update({name: _entry(found, files[name]) for name, found in newest.items() if name in files})
    path.write_text(HEAD + "\n" + "\n".join(kept[name] for name in sorted(kept)))
    return path


def _earlier(path: Path) -> dict[str, str]:
    """The entries of the file as it stands, so that a claim not run with this MLflow is not forgotten."""
    if not path.exists():
        return {}
    parts = path.read_text().split("\n## ")[1:]
    return {part.split("\n", 1)[0].strip(): f"## {part.rstrip()}\n" for part in parts}


def _entry(found: Mapping[str, Any], file: claims.ClaimFile) -> str:
    lines = [f"## {found['claim']}", "", file.about, ""]
    if file.paper:
        lines += [f"Paper: {file.paper}. {file.headline}", ""]
    lines += ["| figure | compared | difference | 95 % interval | demanded | result | values by seed |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {f['metric']} | {_compared(f)} | {f['mean']:+.3f} | {f['low']:+.3f} to {f['high']:+.3f} | {_demanded(f)} | {'shown' if f['shown'] else 'not shown'} | {_values(f)} |"
        for f in found["findings"]
    ]
    lines += ["", f"Seeds {', '.join(map(str, found['seeds']))}; {found['wall_s']:.0f} s. `diptych claim {found['claim']}`", ""]
    return "\n".join(lines)


def _compared(finding: Mapping[str, Any]) -> str:
    """The two sides: two arms, or one arm's figure and another figure; or the one arm whose figure is judged by itself."""
    if finding["worse"] is None:
        return str(finding["better"])
    other = finding["worse"] if finding.get("against") is None else f"{finding['against']} of {finding['worse']}"
    times = "" if finding.get("factor", 1) == 1 else f"{finding['factor']:g} × "
    return f"{finding['better']} − {times}{other}"


def _demanded(finding: Mapping[str, Any]) -> str:
    words = f"{'≥' if finding['least'] > 0 else 'above'} {finding['least']:+.3f}"
    return words + (", every seed" if finding.get("every_seed") else "")


def _values(finding: Mapping[str, Any]) -> str:
    return _list(finding["better_values"]) + ("" if finding["worse"] is None else f" against {_list(finding['worse_values'])}")


def _list(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
