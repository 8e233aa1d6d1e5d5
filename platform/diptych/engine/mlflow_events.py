"""Turns the outbox's events into MLflow calls; sending an event twice leaves the same record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych import __version__

OUR_ID = "diptych.id"


def send(client: Any, experiment: str, runs: dict[str, str], event: Mapping[str, Any]) -> None:
    """Sends one event. `runs` maps our run ids to MLflow's and is filled here."""
    if event["kind"] == "start":
        _start(client, experiment, runs, event)
        return
    handler = _HANDLERS[event["kind"]]
    handler(client, runs[event["run"]], event)


def _start(client: Any, experiment: str, runs: dict[str, str], event: Mapping[str, Any]) -> None:
    found = client.search_runs([experiment], f"tags.`{OUR_ID}` = '{event['run']}'", max_results=1)
    if found:  # sent before, but the mark was lost with the driver
        runs[event["run"]] = found[0].info.run_id
        return
    tags = {**event["tags"], OUR_ID: event["run"], "diptych.version": __version__, "mlflow.source.name": "diptych"}
    if event["parent"]:
        tags["mlflow.parentRunId"] = runs[event["parent"]]
    run = client.create_run(experiment, start_time=event["time_ms"], tags=tags, run_name=event["name"])
    runs[event["run"]] = run.info.run_id


def _params(client: Any, run: str, event: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, value) for key, value in event["values"].items()]
    for start in range(0, len(entries), 100):
        client.log_batch(run, params=entries[start : start + 100])


def _metrics(client: Any, run: str, event: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric

    entries = [Metric(key, value, time_ms, step) for key, value, time_ms, step in event["points"]]
    client.log_batch(run, metrics=entries)


def _dataset(client: Any, run: str, event: Mapping[str, Any]) -> None:
    from mlflow.data.http_dataset_source import HTTPDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    dataset = MetaDataset(HTTPDatasetSource(event["source"]), name=event["name"], digest=event["digest"])
    client.log_inputs(run, [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", event["context"])])])


def _artifact(client: Any, run: str, event: Mapping[str, Any]) -> None:
    path = Path(event["path"])
    if path.is_dir():
        client.log_artifacts(run, str(path), event["folder"])
    elif path.exists():
        client.log_artifact(run, str(path), event["folder"])
    else:  # said plainly in the run rather than dropped
        client.set_tag(run, f"diptych.missing.{path.name}", "the file was gone when it was to be sent")


def _model(client: Any, run: str, event: Mapping[str, Any]) -> None:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "text", required=False), ColSpec("binary", "image", required=False)]),
        outputs=Schema([ColSpec("double", "feature")]),
    )
    with mlflow.start_run(run_id=run):
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": event["path"]},
            signature=signature,
            pip_requirements=[f"diptych=={__version__}"],
            registered_model_name=event["name"],
        )
    client.update_run(run, status="RUNNING")


def _tags(client: Any, run: str, event: Mapping[str, Any]) -> None:
    for key, value in event["values"].items():
        client.set_tag(run, key, value)


def _end(client: Any, run: str, event: Mapping[str, Any]) -> None:
    client.set_terminated(run, event["status"], end_time=event["time_ms"])


_HANDLERS = {"params": _params, "metrics": _metrics, "dataset": _dataset, "artifact": _artifact, "model": _model, "tags": _tags, "end": _end}
