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
from diptych.evaluate.intervals import Estimate
from diptych.workflow import claim as claims
from diptych.workflow import claim_page, identity, lines_page, results
from diptych.workflow.project import Project

EXPERIMENT = "diptych-claims"
METRIC_NAMES = {"rows": "data/train/rows", "train_s": "time/train_s"}
TAG_CHARS = 4_000
RESULT = ("result", *(f"result.{index}" for index in range(1, 8)))
"""The tags that hold a claim's result, one after another."""
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
    _record(tracker, result, claim_page.write(result, project))
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


def _record(tracker: tracking.Tracker, result: claims.ClaimResult, page: Path) -> None:
    file = result.file
    group = {"claim": file.claim, "config": digest.short(digest.of_plain(file.plain()))}
    summary = tracker.start(file.claim, tags={**group, "kind": "claim", **_in_tags(json.dumps(_plain(result)))})
    tracker.params(summary, {"seeds": list(file.seeds), "arms": list(file.arms), "code": digest.short(identity.code("train"))})
    for finding in result.findings:
        d, e = finding.demand, finding.estimate
        name = f"claim/{d.better}{'' if d.worse is None else f'-{d.worse}'}/{d.metric.rsplit('/', 1)[1]}"
        tracker.metrics(summary, {name: e.mean, f"{name}/low": e.low, f"{name}/high": e.high})
    tracker.metrics(summary, {"claim/shown": float(result.shown), "time/total_s": result.wall_s})
    tracker.artifact(summary, page)
    for row in result.table.iter_rows(named=True):
        trial = tracker.start(
            f"{file.claim}/{row['arm']}/s{row['seed']}", tags={**group, "kind": "arm", "arm": row["arm"], "seed": str(row["seed"])}
        )
        tracker.metrics(trial, {_metric_name(key): value for key, value in row.items() if isinstance(value, float)})
        tracker.end(trial)
    tracker.end(summary)


def _in_tags(text: str) -> dict[str, str]:
    """A text as tags, each of which is cut where MLflow would cut it."""
    assert len(text) <= TAG_CHARS * len(RESULT), "a claim of so many arms needs another place for its result"
    return {name: part for index, name in enumerate(RESULT) if (part := text[index * TAG_CHARS : (index + 1) * TAG_CHARS])}


def _metric_name(key: str) -> str:
    return key if key.startswith(("train/", "compress/")) else METRIC_NAMES.get(key, f"eval/{key}")


def _plain(result: claims.ClaimResult) -> dict[str, Any]:
    """What the table needs, as it is stored in the summary run."""
    file = result.file
    findings = [
        {
            **finding.demand.plain(), **_estimate(finding.estimate), "shown": finding.shown,
            "better_values": [_short(finding.better[seed]) for seed in sorted(finding.better)],
            "worse_values": [_short(finding.worse[seed]) for seed in sorted(finding.worse)],
        }
        for finding in result.findings
    ]  # fmt: skip
    arms = {
        arm: {"chosen": tuned.chosen, "at_edge": tuned.at_edge, **{metric: _estimate(found) for metric in result.metrics if (found := result.summary(arm, metric))}}
        for arm, tuned in result.tuned.items()
    }  # fmt: skip
    return {
        "claim": file.claim, "seeds": list(file.seeds), "shown": result.shown,
        "findings": findings, "wall_s": result.wall_s, **({"arms": arms} if arms else {}),
    }  # fmt: skip


def _short(value: float) -> float:
    """Six digits: a tag holds only so many characters."""
    return float(f"{value:.6g}")


def _estimate(found: Estimate) -> dict[str, float]:
    return {"mean": _short(found.mean), "low": _short(found.low), "high": _short(found.high)}


def write(project: Project, tracker: tracking.Tracker) -> Path:
    """Rewrites `docs/REPRODUCTIONS.md` from the newest summary run of every claim."""
    newest: dict[str, Mapping[str, Any]] = {}
    for tags in tracking.newest_first(tracker.target, "tags.kind = 'claim'"):
        found = json.loads("".join(tags.get(name, "") for name in RESULT))
        newest.setdefault(found["claim"], found)
    files = {file.stem: claims.load(file) for file in (project.root / "workflows" / "claims").glob("*.yaml") if file.stem in newest}
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
        f"| {f['metric']} | {_compared(f)} | {claims.number(f['mean'], '+')} | {claims.number(f['low'], '+')} to {claims.number(f['high'], '+')} | {_demanded(f)} | {'shown' if f['shown'] else 'not shown'} | {_values(f)} |"
        for f in found["findings"]
    ]
    if arms := found.get("arms"):
        lines += ["", *_chosen(arms)]
    lines += ["", f"Seeds {', '.join(map(str, found['seeds']))}; {found['wall_s']:.0f} s. `diptych claim {found['claim']}`", ""]
    return "\n".join(lines)


def _chosen(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the arms that chose values of their own, with their figures."""
    metrics = list(dict.fromkeys(name for arm in arms.values() for name in arm if name not in ("chosen", "at_edge")))
    lines = [f"| arm | chose | {' | '.join(metrics)} |", f"|---|---|{'---|' * len(metrics)}"]
    for name, arm in arms.items():
        values = ", ".join(f"{key} = {value}{' (edge)' if key in arm['at_edge'] else ''}" for key, value in arm["chosen"].items())
        cells = [
            f"{arm[metric]['mean']:.3g} ({arm[metric]['low']:.3g} to {arm[metric]['high']:.3g})" if metric in arm else ""
            for metric in metrics
        ]
        lines.append(f"| {name} | {values} | {' | '.join(cells)} |")
    return lines


def _compared(finding: Mapping[str, Any]) -> str:
    """The two sides: two arms, or one arm's figure and another figure; or the one arm whose figure is judged by itself."""
    if finding["worse"] is None:
        return str(finding["better"])
    other = finding["worse"] if finding.get("against") is None else f"{finding['against']} of {finding['worse']}"
    times = "" if finding.get("factor", 1) == 1 else f"{finding['factor']:g} × "
    since = "" if finding.get("since") is None else f", both since {finding['since']}"
    return f"{finding['better']} − {times}{other}{since}"


def _demanded(finding: Mapping[str, Any]) -> str:
    words = f"{'≥' if finding['least'] > 0 else 'above'} {claims.number(finding['least'], '+')}"
    return words + (", every seed" if finding.get("every_seed") else "")


def _values(finding: Mapping[str, Any]) -> str:
    return _list(finding["better_values"]) + ("" if finding["worse"] is None else f" against {_list(finding['worse_values'])}")


def _list(values: list[float]) -> str:
    return " ".join(claims.number(value) for value in values)
