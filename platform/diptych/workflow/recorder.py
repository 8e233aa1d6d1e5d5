"""One workflow run in MLflow: a parent run with the result, a child a phase with its details."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych.core import digest
from diptych.engine.outbox import Outbox
from diptych.engine.tracking import Target, Tracker
from diptych.pairs.manifest import NAME, Manifest
from diptych.workflow import curves, identity
from diptych.workflow.project import Project
from diptych.workflow.spec import PHASES, Workflow
from diptych.workflow.store import Store


class Recorder:
    """Writes one workflow run. The parent holds what one compares (results, curves, the model), children what one looks up."""

    def __init__(self, project: Project, store: Store, workflow: Workflow, tracking_uri: str | None) -> None:
        self.store, self.workflow = store, workflow
        self.tracker = Tracker(Target.local(project.root, "diptych", tracking_uri), Outbox(project.outbox))
        self.parent = ""

    def open(self) -> None:
        """Refuses an unreachable server, then begins the parent run."""
        self.tracker.check()
        self.tracker.flush(force=True)
        workflow = self.workflow
        tags = {"workflow": workflow.name, "config": digest.short(workflow.digest), "seed": str(workflow.seed)}
        if workflow.overrides:
            tags["overrides"] = " ".join(workflow.overrides)
        self.parent = self.tracker.start(self.store.name, tags=tags)
        self.tracker.params(self.parent, self._params())
        self.tracker.watch_system(self.parent)

    def _params(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for phase in PHASES:
            values |= {key: value for key, value in self.workflow.params(phase).items() if value not in ([], {})}
        return values

    def phase(self, phase: str) -> str:
        """Begins a child run."""
        child = self.tracker.start(f"{self.store.name}/{phase}", parent=self.parent, tags={"phase": phase, "workflow": self.workflow.name})
        self.tracker.params(child, self.workflow.params(phase))
        return child

    def record(self, phase: str, child: str, figures: Mapping[str, Any]) -> None:
        """Writes a finished phase: counts, curves, results, and the data sets it read."""
        tracker = self.tracker
        values = {f"time/{phase}_s": figures["wall_s"]}
        if "kept" in figures:
            values[f"data/{phase}/kept"] = figures["kept"]
            values[f"data/{phase}/left"] = figures["pairs_in"] - figures["kept"]
        tracker.metrics(child, values)
        if phase == "evaluate":
            for run in (child, self.parent):
                tracker.metrics(run, {f"eval/{key}": entry["value"] for key, entry in figures["metrics"].items()})
        if phase == "train":
            self._curves(child)
            self._dataset("caption", self.parent, "train")
        if phase == "compress":
            tracker.model(self.parent, self.store.folder("compress"), self.workflow.name)
        for name in identity.INPUTS[phase]:
            self._dataset(name, child, phase)
        tracker.end(child)
        tracker.flush()

    def _dataset(self, name: str, run: str, context: str) -> None:
        folder = self.store.folder(name)
        if (folder / NAME).exists():
            manifest = Manifest.load(folder)
            profile = {"num_rows": manifest.rows}
            self.tracker.dataset(run, f"{self.workflow.name}-{name}", manifest.digest, folder.resolve().as_uri(), context, profile)

    def _curves(self, child: str) -> None:
        log = self.store.home / ".records" / "steps.jsonl"
        if log.exists():
            records = [json.loads(line) for line in log.read_text().splitlines()]
            for run in (child, self.parent):
                self.tracker.series(run, records, curves.metrics(records))

    def finish(self, figures: Mapping[str, Mapping[str, Any]], wall_s: float, report: Path | None) -> None:
        """Attaches the report and the evaluation table to the parent run, and describes it."""
        self.tracker.metrics(self.parent, {"time/total_s": wall_s})
        rows = self.store.folder("evaluate") / "rows.parquet"
        for path in (report, rows):
            if path is not None and path.exists():
                self.tracker.artifact(self.parent, path)
        self.tracker.note(self.parent, note(self.workflow, figures))

    def close(self, status: str) -> int:
        """Ends the parent run; gives the events that MLflow does not have yet."""
        if self.parent:
            self.tracker.end(self.parent, status)
        return self.tracker.close()


def note(workflow: Workflow, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The run's description in Markdown: what it is, what came out, what was kept."""
    lines = [str(workflow.raw.get("about", "")), ""]
    metrics = figures.get("evaluate", {}).get("metrics", {})
    if metrics:
        lines += ["| result | value | 95 % interval | n |", "|---|---|---|---|"]
        lines += [f"| {key} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['n']:,} |" for key, m in metrics.items()]
    kept = [f"{phase} {entry['kept']:,} of {entry['pairs_in']:,}" for phase, entry in figures.items() if "pairs_in" in entry]
    return "\n".join([*lines, "", "Pairs kept: " + "; ".join(kept) if kept else ""]).strip()
