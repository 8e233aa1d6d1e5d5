"""MLflow's side of a run. Only the driver writes, through an outbox, in batches.

A workflow run is a parent run, each phase a child; a sweep's trials are flat runs with group tags and one summary.
Metric names have one grammar: `data/<phase>/<what>`, `train/<what>`, `eval/<set>/<task>/<metric>`, `time/<phase>_s`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.core.errors import ResourceError
from diptych.engine.outbox import Outbox, new_id

MAX_POINTS = 500
MAX_PARAM_CHARS = 6000
RETRY_EVERY_S = 10.0
SYSTEM_EVERY_S = 5.0
CALM = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Where results go: an absolute tracking URI, an experiment, and where artifacts lie (None: the server decides)."""

    uri: str
    experiment: str
    artifacts: str | None = None

    @classmethod
    def local(cls, root: Path, experiment: str, uri: str | None = None) -> Target:
        """SQLite in the project folder, unless `uri` or MLFLOW_TRACKING_URI names a server."""
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri:
            return cls(uri, experiment, None)
        return cls(f"sqlite:///{root.resolve() / 'mlflow.db'}", experiment, (root.resolve() / "mlruns").as_uri())


class Tracker:
    """Records runs. Every call returns at once with the event on disk; `flush` sends what waits."""

    def __init__(self, target: Target, outbox: Outbox) -> None:
        self.target = target
        self.outbox = outbox
        self._next_try = 0.0
        self._client: Any = None
        self._lock = threading.Lock()
        self._system: _SystemSampler | None = None

    def check(self) -> None:
        """Asks the server for an answer; raises ResourceError when it gives none, before anything was started."""
        try:
            self._connect()
        except Exception as error:
            raise ResourceError.at("MLflow does not answer", self.target.uri, _sentence(error), "a tracking server or a SQLite file",
                                   "start the server, or unset MLFLOW_TRACKING_URI to use a file here") from error  # fmt: skip

    def start(self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Begins a run and gives our id for it."""
        run = new_id()
        self.outbox.add("start", run=run, name=name, parent=parent, tags=dict(tags or {}))
        return run

    def params(self, run: str, values: Mapping[str, Any]) -> None:
        """Records parameters; nested mappings and lists become dotted names."""
        self.outbox.add("params", run=run, values={key: str(value)[:MAX_PARAM_CHARS] for key, value in flatten(values).items()})

    def metrics(self, run: str, values: Mapping[str, float], step: int = 0) -> None:
        """Records one value a name."""
        self.outbox.add("metrics", run=run, points=[[key, float(value), time.time_ns() // 1_000_000, step] for key, value in values.items()])

    def series(self, run: str, records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
        """Records curves from step records (`step`, `time_ms` and values), thinned to at most 500 points a curve."""
        stride = max(1, -(-len(records) // MAX_POINTS))
        thin = [record for i, record in enumerate(records) if i % stride == 0 or i == len(records) - 1]
        points = [[name, float(r[key]), int(r.get("time_ms", time.time_ns() // 1_000_000)), int(r["step"])] for r in thin for key, name in names.items() if key in r]
        for start in range(0, len(points), 1000):
            self.outbox.add("metrics", run=run, points=points[start : start + 1000])

    def dataset(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Records a data set as an input of the run."""
        self.outbox.add("dataset", run=run, name=name, digest=digest.removeprefix("sha256:")[:36], source=source, context=context)

    def artifact(self, run: str, path: Path, folder: str | None = None) -> None:
        """Records a file or a folder. It must stay where it is until it is sent."""
        self.outbox.add("artifact", run=run, path=str(path.resolve()), folder=folder)

    def model(self, run: str, path: Path, name: str) -> None:
        """Puts a model directory into the run and the registry, with a signature."""
        self.outbox.add("model", run=run, path=str(path.resolve()), name=name)

    def tags(self, run: str, values: Mapping[str, str]) -> None:
        """Sets tags."""
        self.outbox.add("tags", run=run, values=dict(values))

    def end(self, run: str, status: str = "FINISHED") -> None:
        """Ends a run: FINISHED, FAILED or KILLED."""
        self.outbox.add("end", run=run, status=status)

    def watch_system(self, run: str) -> None:
        """Samples this machine's processor and memory into `system/…` until `close`."""
        self._system = _SystemSampler(lambda values, step: self.metrics(run, values, step))
        self._system.start()

    def flush(self, *, force: bool = False) -> int:
        """Sends what waits; gives the number of events still waiting. A server that is down is tried again later."""
        with self._lock:
            if not force and time.monotonic() < self._next_try:
                return self.outbox.behind
            try:
                self._send()
                self._next_try = 0.0
            except Exception:
                self._next_try = time.monotonic() + RETRY_EVERY_S
            return self.outbox.behind

    def close(self) -> int:
        """Stops sampling, makes a last attempt to send, and gives the number of events kept for later."""
        if self._system:
            self._system.stop()
            self._system = None
        return self.flush(force=True)

    def run_id(self, run: str) -> str | None:
        """MLflow's id of a run of ours, once it is sent."""
        found: str | None = self.outbox.state()["runs"].get(run)
        return found

    def _connect(self) -> Any:
        if self._client is None:
            for name, value in CALM.items():
                os.environ.setdefault(name, value)
            import logging

            import mlflow

            for logger in ("mlflow", "alembic", "sqlalchemy"):
                logging.getLogger(logger).setLevel(logging.ERROR)
            mlflow.set_tracking_uri(self.target.uri)
            client = mlflow.MlflowClient(self.target.uri, self.target.uri)
            found = client.get_experiment_by_name(self.target.experiment)
            self._experiment = found.experiment_id if found else client.create_experiment(self.target.experiment, self.target.artifacts)
            self._client = client
        return self._client

    def _send(self) -> None:
        from diptych.engine import mlflow_events

        client = self._connect()
        state = self.outbox.state()
        for position, event in self.outbox.waiting():
            mlflow_events.send(client, self._experiment, state["runs"], event)
            state["sent"] = position + 1
            self.outbox.mark(state)


class _SystemSampler(threading.Thread):
    """Reports processor and memory use under the names of MLflow's system-metrics page."""

    def __init__(self, report: Callable[[Mapping[str, float], int], None]) -> None:
        super().__init__(daemon=True)
        self._report = report
        self._stopped = threading.Event()

    def run(self) -> None:
        import psutil

        psutil.cpu_percent()
        step = 0
        while not self._stopped.wait(SYSTEM_EVERY_S):
            memory = psutil.virtual_memory()
            values = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(),
                "system/system_memory_usage_percentage": memory.percent,
                "system/system_memory_usage_megabytes": memory.used / 1e6,
            }
            with suppress(OSError):
                self._report(values, step)
            step += 1

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self.join(timeout=SYSTEM_EVERY_S)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": [1]}}` as `{"a.b.0": 1}`; a method in a list is named by itself: `prune.semantic-dedup.epsilon`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
            flat |= flatten({str(entry.get("method", i)) if isinstance(entry, Mapping) else str(i): entry for i, entry in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value
    return flat


def _sentence(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:300]


def serve(target: Target, host: str, port: int) -> int:
    """Runs MLflow's page on `target` until Ctrl-C. Raises ResourceError when the port is taken."""
    import socket
    import subprocess
    import sys

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError.at("The port is taken", f"{host}:{port}", str(error), "a free port", f"diptych ui --port {port + 1}") from None
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", target.uri, "--host", host, "--port", str(port), "--workers", "1"]
    if target.artifacts:
        command += ["--default-artifact-root", target.artifacts]
    process = subprocess.Popen(command)  # noqa: S603 - a fixed program, arguments as a list
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait(timeout=10)
        return 0


def newest_first(target: Target, query: str) -> list[dict[str, str]]:
    """The tags of all runs of the target's experiment that match, the newest first."""
    import mlflow

    client = mlflow.MlflowClient(target.uri, target.uri)
    experiment = client.get_experiment_by_name(target.experiment)
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1000)
    return [dict(run.data.tags) for run in runs]
