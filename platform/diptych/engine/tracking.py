"""MLflow's side of a run. Only the driver writes, through an outbox, in batches, and never waits long for an answer.

A workflow run is a parent run, each phase a child; a sweep's trials are flat runs with group tags and one summary.
Metric names have one grammar: `data/<phase>/<what>`, `train/<what>`, `eval/<set>/<task>/<metric>`, `time/<phase>_s`.
"""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diptych import __version__
from diptych.core.errors import DiptychError, ResourceError
from diptych.engine import reach
from diptych.engine.mlflow_events import Receiver, make_client, refused
from diptych.engine.outbox import Event, Journal, Outbox, new_id, now_ms
from diptych.engine.system import Sampler

MAX_POINTS = 500
MAX_BATCH = 1000
RETRY_EVERY_S = 10.0
FLUSH_S = 10.0
CLOSE_S = 60.0
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Target:
    """Where results go: an absolute tracking URI, an experiment, and where artifacts lie (None: the server decides)."""

    uri: str
    experiment: str
    artifacts: str | None = None

    @classmethod
    def local(cls, root: Path, experiment: str, uri: str | None = None) -> Target:
        """SQLite in the project folder, unless `uri` or MLFLOW_TRACKING_URI names a server or another database.

        A relative SQLite path is made absolute here, since a job's current folder is not the user's.
        """
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{root.resolve() / 'mlflow.db'}"
        if uri.startswith(("http://", "https://", "databricks")):
            return cls(uri.rstrip("/"), experiment)
        home = root.resolve()
        if uri.startswith(SQLITE):
            path = Path(uri.removeprefix(SQLITE)).resolve()
            uri, home = f"{SQLITE}{path}", path.parent
        return cls(uri, experiment, (home / "mlruns").as_uri())

    @property
    def shown(self) -> str:
        """The URI without its password."""
        return reach.without_password(self.uri)


class Tracker:
    """Records runs. Every call returns at once with the event on disk; `flush` sends what waits, in a thread of its own."""

    def __init__(self, target: Target, outbox: Outbox) -> None:
        self.target = target
        self.outbox = outbox
        self.trouble = ""
        self._origin = origin(Path.cwd())
        self._journal: Journal | None = None
        self._runs: dict[str, str] = {}
        self._receivers: dict[Target, Receiver] = {}
        self._lock = threading.Lock()
        self._delivery: threading.Thread | None = None
        self._next_try = 0.0
        self._system: Sampler | None = None

    def check(self) -> None:
        """Asks the server for an answer; raises ResourceError when it gives none, before anything was started."""
        try:
            self._receiver(self.target).connect()
        except DiptychError:
            raise
        except Exception as error:
            raise ResourceError.at("MLflow does not answer", self.target.shown, sentence(error), "a tracking server or a SQLite file",
                                   "start the server, or unset MLFLOW_TRACKING_URI to use a file here") from error  # fmt: skip

    def start(self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Begins a run and gives our id for it. Tags without a value are left out."""
        run = new_id()
        given = {key: value for key, value in (tags or {}).items() if value}
        self._add("start", run=run, name=name, parent=parent, tags={**given, **self._origin})
        return run

    def params(self, run: str, values: Mapping[str, Any]) -> None:
        """Records parameters; nested mappings and lists become dotted names."""
        self._add("params", run=run, values={key: _plain(value) for key, value in flatten(values).items()})

    def metrics(self, run: str, values: Mapping[str, float], step: int = 0) -> None:
        """Records one value a name."""
        self._points(run, [(key, float(value), now_ms(), step) for key, value in values.items()])

    def series(self, run: str, records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
        """Records curves from step records (`step`, `time_ms` and values), thinned to at most 500 points a curve and the last."""
        stride = max(1, -(-len(records) // MAX_POINTS))
        thin = [record for i, record in enumerate(records) if i % stride == 0 or i == len(records) - 1]
        self._points(
            run,
            [
                (name, float(r[key]), int(r.get("time_ms", now_ms())), int(r["step"]))
                for r in thin
                for key, name in names.items()
                if key in r
            ],
        )

    def dataset(self, run: str, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None) -> None:
        """Records a data set as an input of the run; `profile` may hold `num_rows` and other small facts."""
        self._add(
            "dataset",
            run=run,
            name=name,
            digest=digest.removeprefix("sha256:")[:36],
            source=source,
            context=context,
            profile=dict(profile or {}),
        )

    def artifact(self, run: str, path: Path, folder: str | None = None) -> None:
        """Records a file or a folder. It must stay where it is until it is sent."""
        self._add("artifact", run=run, path=str(path.resolve()), folder=folder)

    def model(self, run: str, path: Path, name: str) -> None:
        """Puts a model directory into the run and the registry, with a signature. It must stay where it is until it is sent."""
        self._add("model", run=run, path=str(path.resolve()), name=name)

    def tags(self, run: str, values: Mapping[str, str]) -> None:
        """Sets tags."""
        self._add("tags", run=run, values=dict(values))

    def note(self, run: str, markdown: str) -> None:
        """Sets the description at the top of the run's page."""
        self.tags(run, {"mlflow.note.content": markdown})

    def end(self, run: str, status: str = "FINISHED") -> None:
        """Ends a run: FINISHED, FAILED or KILLED."""
        self._add("end", run=run, status=status)

    def watch_system(self, run: str) -> None:
        """Samples this machine into `system/…` until `close`, and sends whatever waits as it goes, so that a long phase is seen alive."""

        def report(values: Mapping[str, float], step: int) -> None:
            self.metrics(run, values, step)
            self.flush(patience_s=0)

        self._system = Sampler(report)
        self._system.start()

    def flush(self, *, force: bool = False, patience_s: float = FLUSH_S) -> int:
        """Sends what waits; gives the number of events still waiting after at most `patience_s`.

        A server that is down is tried again later: at once with `force`, else not before ten seconds have passed.
        `force` also sends what drivers before this one have left in the outbox.
        """
        deadline = time.monotonic() + patience_s
        if force and self._delivery:
            self._delivery.join(patience_s)
        again = True
        while again:
            self._deliver(force).join(max(0.0, deadline - time.monotonic()))
            force, left = False, self._journal.behind if self._journal else 0
            again = bool(left) and time.monotonic() < deadline and time.monotonic() >= self._next_try
        return left

    def close(self) -> int:
        """Stops sampling, makes a last attempt to send, and gives the number of events kept for later."""
        if self._system:
            self._system.stop()
            self._system = None
        left = self.flush(force=True, patience_s=CLOSE_S)
        with self._lock:
            if self._journal and not (self._delivery and self._delivery.is_alive()):
                self._journal.close()
                self._journal = None
        return left

    def run_id(self, run: str) -> str | None:
        """MLflow's id of a run of ours, once it is sent."""
        return self._runs.get(run)

    def _add(self, kind: str, **values: Any) -> None:
        with self._lock:
            if self._journal is None:
                self._journal = self.outbox.open(asdict(self.target))
                self._journal.runs = self._runs
            self._journal.add(kind, **values)

    def _points(self, run: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        for start in range(0, len(points), MAX_BATCH):
            self._add("metrics", run=run, points=points[start : start + MAX_BATCH])

    def _receiver(self, target: Target) -> Receiver:
        return self._receivers.setdefault(target, Receiver(target.uri, target.experiment, target.artifacts))

    def _deliver(self, force: bool) -> threading.Thread:
        """The delivery in progress, or a new one."""
        with self._lock:
            if self._delivery is None or not self._delivery.is_alive():
                self._delivery = threading.Thread(target=self._send_all, args=(force,), daemon=True, name="diptych-delivery")
                self._delivery.start()
            return self._delivery

    def _send_all(self, force: bool) -> None:
        if force:
            for journal in self.outbox.adopt():
                self._send(journal)
                journal.close()
        if self._journal and (force or time.monotonic() >= self._next_try):
            self.trouble = self._send(self._journal)
            self._next_try = time.monotonic() + RETRY_EVERY_S if self.trouble else 0.0

    def _send(self, journal: Journal) -> str:
        """Sends a journal to its own target; gives what stopped it, or the empty string."""
        try:
            receiver = self._receiver(Target(**journal.target))
            receiver.connect()
            for offset, event in journal.waiting():
                _send_one(receiver, journal, event)
                journal.mark(offset)
        except Exception as error:
            return sentence(error)
        return ""


def _send_one(receiver: Receiver, journal: Journal, event: Event) -> None:
    try:
        receiver.send(journal.runs, event)
    except Exception as error:
        if not refused(error):
            raise
        journal.refuse(event, sentence(error))


def origin(folder: Path) -> dict[str, str]:
    """MLflow's own tags for who started a run, with which version, from which commit."""
    tags = {"mlflow.source.name": f"diptych {__version__}", "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError):  # a container's user need not have a name
        tags["mlflow.user"] = getpass.getuser()
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        tags["mlflow.source.git.commit"] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()  # noqa: S603
    return tags


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": [1]}}` as `{"a.b": [1]}`.

    A list of methods becomes their names in order, `prune = "semantic-dedup, concept-pruning"`, with the values of each under
    its name, `prune.semantic-dedup.epsilon`; a second one of the same name ends in `-2`.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(entry, Mapping) for entry in value):
            named = _named(value)
            flat[name] = ", ".join(named)
            flat |= flatten(named, f"{name}.")
        else:
            flat[name] = value
    return flat


def _named(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of a list, without their `method`, under names of their own."""
    named: dict[str, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        method = name = str(entry.get("method", position))
        twin = 1
        while name in named:
            twin += 1
            name = f"{method}-{twin}"
        named[name] = {key: value for key, value in entry.items() if key != "method"}
    return named


def _plain(value: Any) -> str:
    """A parameter's value as the workflow file would write it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def sentence(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:300]


def newest_first(target: Target, query: str) -> list[dict[str, str]]:
    """The tags of all runs of the target's experiment that match, the newest first."""
    client = make_client(target.uri)
    experiment = client.get_experiment_by_name(target.experiment)
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1000)
    return [dict(run.data.tags) for run in runs]
