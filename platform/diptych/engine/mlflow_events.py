"""Turns the outbox's events into MLflow calls. Sending an event twice leaves the same record, so one may always be sent again."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from diptych.core.errors import ResourceError
from diptych.engine import reach

OUR_ID = "mlflow.diptych.id"
"""The tag that tells whether a run was sent before; MLflow's pages do not show tags that start with its own name."""

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow show an experiment's pages for training, not those for language-model applications."""

CALM = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""MLflow's settings, set before it is imported: the outbox tries again anyway, so a call gives up soon; what the user has set stays."""

REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "MALFORMED_REQUEST"}
"""MLflow's codes for an event that it will not take tomorrow either."""

BROKEN_ROWS = ("IntegrityError", "DataError")
"""What the database says then; MLflow's code for it, BAD_REQUEST, also stands for a lost connection."""

MAX_PARAM_CHARS, MAX_TAG_CHARS, MAX_NAME_CHARS = 6000, 8000, 250
BATCH = 100


class Receiver:
    """An MLflow server or database and one experiment there. Works through the client alone: no global state of MLflow's is set."""

    def __init__(self, uri: str, experiment: str, artifacts: str | None) -> None:
        self.uri, self.experiment, self.artifacts = uri, experiment, artifacts
        self._client: Any = None
        self._experiment_id = ""

    def connect(self) -> None:
        """Finds the experiment, or makes it. Raises what went wrong within seconds, whatever state the server is in."""
        if wrong := reach.listening(self.uri):
            raise ConnectionError(wrong)
        if self._client is None:
            client = make_client(self.uri)
            self._experiment_id = self._find(client)
            self._client = client

    def _find(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return str(client.create_experiment(self.experiment, self.artifacts, KIND))
            except MlflowException:
                found = client.get_experiment_by_name(self.experiment)  # another driver was quicker
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ResourceError.at("The MLflow experiment is deleted", self.uri, self.experiment, "an active experiment",
                                   f"mlflow experiments restore --experiment-id {found.experiment_id}")  # fmt: skip
        return str(found.experiment_id)

    def send(self, runs: MutableMapping[str, str], event: Mapping[str, Any]) -> None:
        """Sends one event. `runs` maps our run ids to MLflow's and is filled here."""
        match event["kind"]:
            case "open":
                return
            case "start":
                self._start(runs, event)
            case "model":
                from diptych.engine import registry

                with _patience(Path(event["path"])):
                    registry.register(self._client, self._experiment_id, runs[event["run"]], Path(event["path"]), event["name"])
            case kind:
                _HANDLERS[kind](self._client, runs[event["run"]], event)

    def _start(self, runs: MutableMapping[str, str], event: Mapping[str, Any]) -> None:
        found = self._client.search_runs([self._experiment_id], f"tags.`{OUR_ID}` = '{event['run']}'", max_results=1)
        if found:  # sent before, but the mark was lost with the driver
            runs[event["run"]] = found[0].info.run_id
            return
        tags = {**_tag_values(event["tags"]), OUR_ID: event["run"]}
        if event["parent"]:
            tags["mlflow.parentRunId"] = runs[event["parent"]]
        run = self._client.create_run(self._experiment_id, start_time=event["time_ms"], tags=tags, run_name=event["name"])
        runs[event["run"]] = run.info.run_id


def make_client(uri: str) -> Any:
    """An MLflow client that gives up soon and logs errors only."""
    for name, value in CALM.items():
        os.environ.setdefault(name, value)
    import mlflow

    for logger in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return mlflow.MlflowClient(uri, uri)


def refused(error: Exception) -> bool:
    """Whether an event that failed with this error would fail for ever: MLflow says so, or the event itself is damaged."""
    code = getattr(error, "error_code", None)
    if code is None:
        return isinstance(error, KeyError | TypeError | UnicodeError)
    return code in REFUSALS or (code == "BAD_REQUEST" and any(word in str(error) for word in BROKEN_ROWS))


def allowed(name: str) -> str:
    """A metric's or parameter's name in the characters that MLflow takes; any other becomes `-`."""
    return re.sub(r"[^\w\-. :/]", "-", name)[:MAX_NAME_CHARS]


class _patience:
    """Allows a call the time that a file of this size needs at two megabytes a second."""

    def __init__(self, path: Path) -> None:
        files = path.rglob("*") if path.is_dir() else [path]
        size_bytes = sum(file.stat().st_size for file in files if file.is_file())
        self.timeout_s = 60 + size_bytes // 2_000_000

    def __enter__(self) -> None:
        self.before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(self.timeout_s)

    def __exit__(self, *error: object) -> None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = self.before


def _params(client: Any, run: str, event: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(allowed(key), value[:MAX_PARAM_CHARS]) for key, value in event["values"].items()]
    for start in range(0, len(entries), BATCH):
        client.log_batch(run, params=entries[start : start + BATCH])


def _metrics(client: Any, run: str, event: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run, metrics=[Metric(allowed(key), value, time_ms, step) for key, value, time_ms, step in event["points"]])


def _dataset(client: Any, run: str, event: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": event["source"]}), json.dumps(event["profile"])
    dataset = Dataset(event["name"], event["digest"], "diptych", source, profile=profile)
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])])


def _artifact(client: Any, run: str, event: Mapping[str, Any]) -> None:
    path = Path(event["path"])
    if not path.exists():  # said plainly in the run rather than dropped
        client.set_tag(run, f"diptych.missing.{allowed(path.name)}", "the file was gone when it was to be sent")
        return
    with _patience(path):
        (client.log_artifacts if path.is_dir() else client.log_artifact)(run, str(path), event["folder"])


def _tags(client: Any, run: str, event: Mapping[str, Any]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(key, value) for key, value in _tag_values(event["values"]).items()])


def _tag_values(tags: Mapping[str, str]) -> dict[str, str]:
    return {allowed(key): value[:MAX_TAG_CHARS] for key, value in tags.items()}


def _end(client: Any, run: str, event: Mapping[str, Any]) -> None:
    client.set_terminated(run, event["status"], end_time=event["time_ms"])


_HANDLERS = {"params": _params, "metrics": _metrics, "dataset": _dataset, "artifact": _artifact, "tags": _tags, "end": _end}
