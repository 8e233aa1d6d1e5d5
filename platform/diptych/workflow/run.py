"""`diptych run`: plans, runs what has to run, records it, and says what came out."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.engine.pipeline import StageState
from diptych.engine.progress import Progress, duration
from diptych.engine.session import Session
from diptych.pairs import files
from diptych.workflow import costs, phases, report
from diptych.workflow.project import Project
from diptych.workflow.recorder import Recorder
from diptych.workflow.spec import PAIR_PHASES, PHASES, Workflow, check_resources
from diptych.workflow.store import PlainStore, Store, open_store

BARS = "▁▂▃▄▅▆▇█"
REASONS = 3
"""Reasons why pairs left that a line names, the most frequent; the others it counts."""
FAILED = ("captions_failed", "captions_error", "rewrites_failed")
"""Where reports of caption methods count the captions that a server or a model failed to make."""
HEADLINES = ("acc1", "acc5", "text_to_image_r1", "text_to_image_r5", "image_to_text_r1", "image_to_text_r5")


@dataclass(frozen=True)
class Options:
    """How a run is carried out; none of it changes what comes out."""

    address: str | None = None
    in_process: bool = False
    tracking_uri: str | None = None
    quiet: bool = False
    until: str = "evaluate"


@dataclass
class Outcome:
    """What a run did: the figures of every phase, which were cached, and where the report lies."""

    workflow: Workflow
    name: str
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)
    wall_s: float = 0.0
    report: Path | None = None
    tracking: str = ""
    unsent: int = 0
    mlflow_run: str | None = None

    @property
    def cached(self) -> bool:
        """Whether nothing had to run."""
        return not self.ran


def run(workflow: Workflow, options: Options) -> Outcome:
    """Runs a workflow to its end (or `options.until`) and gives the outcome; raises before anything starts when it cannot."""
    started = time.monotonic()
    if not options.address:
        check_resources(workflow)
    project = Project.find(workflow.path.parent)
    store = open_store(project, workflow)
    outcome = Outcome(workflow, store.name)
    progress = Progress(quiet=options.quiet)
    with terminated_as_interrupt(), store.locked() as swept, Session(options.address, options.in_process) as session:
        for name in swept:
            progress.note(f"tidied {name}, left by a run that was killed")
        recorder: Recorder | None = None
        try:
            with files.full_disk_explained(store.home):
                for phase in PHASES[: PHASES.index(options.until) + 1]:
                    state = store.state(phase)
                    if state.changed and recorder is None:
                        recorder = Recorder(project, store, workflow, options.tracking_uri)
                        recorder.open()
                    _one(phase, state, store, session, progress, recorder, outcome)
                outcome.wall_s = time.monotonic() - started
                _finish(store, outcome, recorder, progress)
        except BaseException as error:
            if recorder:
                with suppress(OSError):  # a full disk: the next run ends this one's record
                    recorder.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    outcome.wall_s = time.monotonic() - started
    return outcome


def _one(
    phase: str, state: StageState, store: Store, session: Session, progress: Progress, recorder: Recorder | None, outcome: Outcome
) -> None:
    if not state.changed:
        outcome.figures[phase] = store.figures(phase)
        progress.cached(phase, summary(phase, outcome.figures[phase]))
        return
    assert recorder is not None
    progress.start(phase)
    predicted = costs.predict(phase, store, starts_ray=not session.started, in_process=session.in_process).seconds
    figures = run_phase(phase, store, session, progress, recorder, {"predicted_s": predicted})
    outcome.figures[phase] = figures
    outcome.ran.append(phase)
    outcome.reasons[phase] = state.reasons
    progress.done(summary(phase, figures), figures["wall_s"])


def run_phase(
    phase: str, store: Store, session: Session, progress: Progress, recorder: Recorder | None, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Runs one phase into its store and records it; what `dvc repro` and `diptych run` share."""
    project = store.project
    bench = phases.Bench(store.workflow, store.folder, session, progress, project.scratch / store.name, project.cache)
    child = recorder.phase(phase) if recorder else None
    with heartbeat(store.home / ".records" / "heartbeat.json", phase):
        figures = {**phases.run(phase, bench), **(extra or {})}
    store.save(phase, figures)
    if recorder and child:
        recorder.record(phase, child, figures)
    return figures


def _finish(store: Store, outcome: Outcome, recorder: Recorder | None, progress: Progress) -> None:
    path = store.home / "report.html"
    if recorder or not path.exists():
        outcome.report = report.write(store, outcome, path)
    else:
        outcome.report = path
    if recorder:
        recorder.finish(outcome.figures, outcome.wall_s, outcome.report)
        outcome.unsent = recorder.close("FINISHED")
        outcome.tracking = recorder.tracker.target.uri
        outcome.mlflow_run = recorder.tracker.run_id(recorder.parent)


def summary(phase: str, figures: Mapping[str, Any]) -> str:
    """One line on what a phase did."""
    if "pairs_in" in figures:
        left = sorted(figures.get("left", []), key=lambda entry: -entry["count"])
        often = Counter(entry["reason"] for entry in left)
        named = [f"{_reason(entry, often[entry['reason']] > 1)} {entry['count']:,}" for entry in left[:REASONS]]
        rest = sum(entry["count"] for entry in left[REASONS:])
        reasons = ", ".join([*named, *([f"other reasons {rest:,}"] if rest else [])])
        captions = f", {figures['captions_per_pair']:.1f} captions a pair{_failed(figures)}" if phase == "caption" else ""
        return f"{figures['kept']:,} of {figures['pairs_in']:,} pairs kept" + (f"; left: {reasons}" if left else "") + captions
    if phase == "train" and "samples_seen" in figures:
        resumed = f", from step {figures['resumed_from']:,} on" if figures.get("resumed_from") else ""
        loss = f", loss {figures['loss']:.3f}" if "loss" in figures else ""
        return f"{figures['samples_seen']:,} pictures seen{loss}{resumed}"
    if phase == "evaluate":
        values = {key.rsplit("/", 1)[1]: entry for key, entry in figures.get("metrics", {}).items()}
        return ", ".join(f"{name} {values[name]['value']:.1%}" for name in HEADLINES if name in values)
    if phase == "compress":
        return "; ".join(_compressed(method, told) for method, told in (figures.get("report") or {}).items()) or "handed on"
    return "done"


def _reason(entry: Mapping[str, Any], shared: bool) -> str:
    """The reason, with its method where several methods give the same."""
    return f"{entry['reason']} ({entry['method']})" if shared else str(entry["reason"])


def _failed(figures: Mapping[str, Any]) -> str:
    """How many captions could not be made, by the reports of the methods; a pair whose caption failed keeps those it has."""
    reports = (figures.get("report") or {}).values()
    failed = sum(report.get(name) or 0 for report in reports for name in FAILED)
    return f"; {failed:,} more could not be made" if failed else ""


def _compressed(method: str, told: Mapping[str, Any]) -> str:
    """What a compressor did, of the figures that most of them have: zeros among the weights, parameters and arithmetic before and after."""
    parts = []
    if "overall" in told:
        parts.append(f"{told['overall']:.1%} of {told['weights']:,} weights are zero")
    if "before" in told and "after" in told:
        parts.append(f"{told['before']['parameters']:,} to {told['after']['parameters']:,} parameters")
        flops = [sum(told[when][f"{tower}_flops"] for tower in ("image", "text")) / 1e6 for when in ("before", "after")]
        parts.append(f"{flops[0]:,.1f} to {flops[1]:,.1f} MFLOP a pair")
    return f"{method}: {', '.join(parts)}" if parts else method


def phase(workflow: Workflow, name: str) -> None:
    """Runs one phase by itself: the command of a DVC stage, which holds DVC's lock and writes `dvc.lock` itself."""
    project = Project.find(workflow.path.parent)
    store = PlainStore(project, workflow, workflow.name)
    progress = Progress()
    with terminated_as_interrupt(), store.locked(), Session(os.environ.get("RAY_ADDRESS")) as session:
        progress.start(name)
        with files.full_disk_explained(store.home):
            figures = run_phase(name, store, session, progress, None)
        progress.done(summary(name, figures), figures["wall_s"])


def contributions(store: Store, outcome: Outcome) -> list[str]:
    """What each phase did to the pairs, the captions and the figures, in a sentence each."""
    figures, lines = outcome.figures, []
    for name in ("ingest", *PAIR_PHASES):
        found = figures.get(name)
        if not found or not (store.workflow.methods(name) if name != "ingest" else True):
            continue
        left = found["pairs_in"] - found["kept"]
        text = f"{name}: {found['pairs_in']:,} pairs in, {left:,} left ({left / max(1, found['pairs_in']):.1%}){_seconds(found)}"
        if name == "caption":
            before = figures.get("prune", {}).get("captions_per_pair", 0)
            text += f"; captions a pair from {before:.1f} to {found['captions_per_pair']:.1f}"
        lines.append(text)
    train = figures.get("train", {})
    if "samples_seen" in train:
        speed = f", {train['samples_per_s']:,.0f} a second" if "samples_per_s" in train else ""
        lines.append(f"train: {summary('train', train)}{speed}{_seconds(train)}")
    if figures.get("compress", {}).get("report"):
        lines.append(f"compress: {summary('compress', figures['compress'])}{_seconds(figures['compress'])}")
    sweep = figures.get("evaluate", {}).get("sweep")
    if sweep:
        lines.append(
            f"sweep: {sweep['tried']} settings on {sweep['chosen_on']}; {sweep['winner']} gives {sweep['metric']} {sweep['winner_value']:.3f} there"
        )
    return lines


def _seconds(figures: Mapping[str, Any]) -> str:
    """How long a phase took, where its record came from the machine that it ran on."""
    return f", {figures['wall_s']:.1f} s" if "wall_s" in figures else ""


@contextmanager
def heartbeat(path: Path, phase: str, every_s: float = 10.0) -> Iterator[None]:
    """Writes who works on what every few seconds, so that a run whose driver died can be told from one that works."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()

    def beat() -> None:
        while True:
            partial = path.with_suffix(".partial")
            with suppress(OSError):  # a full disk is the phase's to tell
                partial.write_text(
                    json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "phase": phase, "time": time.time(), "every_s": every_s})
                )
                partial.replace(path)
            if stop.wait(every_s):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=1)
        path.unlink(missing_ok=True)


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end a run as Ctrl-C does: cleanly. What is ignored (`nohup`) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table(outcome: Outcome) -> str:
    """The short table at the end of a run."""
    lines = ["", f"{outcome.name}: {'everything cached, nothing to do' if outcome.cached else 'done'} in {duration(outcome.wall_s)}", ""]
    lines += [
        f"  {phase:<9} {'cached' if phase not in outcome.ran else 'ran':<7} {summary(phase, figures)}"
        for phase, figures in outcome.figures.items()
    ]
    metrics = outcome.figures.get("evaluate", {}).get("metrics", {})
    if metrics:
        lines += ["", f"  {'result':<44} {'value':>8}   95 % interval"]
        lines += [
            f"  {key:<44} {entry['value']:>8.3f}   {entry['low']:.3f} to {entry['high']:.3f}  (n = {entry['n']:,})"
            for key, entry in metrics.items()
        ]
    lines += _curve_lines(outcome) + _sweep_lines(outcome) + _time_lines(outcome)
    if outcome.report:
        lines += ["", f"  report    {outcome.report}"]
    if outcome.unsent:
        lines += [f"  MLflow    did not answer: {outcome.unsent} events are kept and will be sent by the next run"]
    return "\n".join(lines)


def _curve_lines(outcome: Outcome) -> list[str]:
    curve = outcome.figures.get("train", {}).get("loss_curve")
    if not curve:
        return []
    low, high = min(curve), max(curve)
    bars = "".join(BARS[round((value - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for value in curve)
    return ["", f"  loss      {curve[0]:.3f} {bars} {curve[-1]:.3f}"]


def _sweep_lines(outcome: Outcome) -> list[str]:
    sweep = outcome.figures.get("evaluate", {}).get("sweep")
    if not sweep:
        return []
    setting = ", ".join(f"{key.removeprefix('evaluate.benchmarks.')} = {value}" for key, value in sweep["winner"].items())
    final = sweep["winner_metrics"].get(sweep["metric"])
    reported = f"; as reported {final['value']:.3f} ({final['low']:.3f} to {final['high']:.3f})" if final else ""
    return [
        "",
        f"  sweep     {sweep['tried']} settings on {sweep['chosen_on']}, best {setting}: {sweep['metric']} {sweep['winner_value']:.3f}{reported}",
    ]


def _time_lines(outcome: Outcome) -> list[str]:
    if outcome.cached:
        return []
    lines = ["", f"  {'time':<9} {'actual':>12} {'predicted':>12}"]
    for name in outcome.ran:
        figures = outcome.figures[name]
        predicted = figures.get("predicted_s")
        lines.append(f"  {name:<9} {duration(figures['wall_s']):>12} {duration(predicted) if predicted is not None else '':>12}")
    train = outcome.figures.get("train", {})
    if "train" in outcome.ran and train.get("samples_per_s"):
        shares = ", ".join(f"{activity} {share:.0%}" for activity, share in train["shares"].items())
        lines.append(f"  a training step: {shares}; {train['samples_per_s']:,.0f} pictures/s. {train['advice']}")
    return lines


def show(outcome: Outcome) -> None:
    """Prints the table."""
    sys.stdout.write(table(outcome) + "\n")
