"""A trained model in MLflow: beside the run that made it, and as a version in the registry. Loads anywhere, with its own code.

What MLflow stores is the model directory, `served_model.py` as code, the two rooms that a model needs (`core/`, `models/`) and
the versions of the libraries. Nothing is pickled.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diptych

ROOMS = ("core", "models")
LIBRARIES = (
    "mlflow",
    "torch",
    "torchvision",
    "open_clip_torch",
    "safetensors",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "instant-clip-tokenizer",
)


def register(client: Any, experiment: str, run: str, directory: Path, name: str) -> None:
    """Stores a model directory with the run and as a new version of the registered model `name`; a second call changes nothing.

    Every step looks first whether it was made before, so that a driver killed between two of them does no harm.
    """
    from mlflow.entities import LoggedModelOutput

    if not directory.is_dir():
        client.set_tag(run, f"diptych.missing.{directory.name}", "the model was gone when it was to be sent")
        return
    model = _logged(client, experiment, run, name) or client.create_logged_model(
        experiment, name, source_run_id=run, model_type="dual-encoder"
    )
    if str(model.status) != "READY":
        outputs = client.get_run(run).outputs
        if not (outputs and outputs.model_outputs):
            client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
        with tempfile.TemporaryDirectory(prefix="diptych-model-") as scratch:
            package(directory, Path(scratch) / "model", model_id=model.model_id, run_id=run, location=model.artifact_location)
            client.log_model_artifacts(model.model_id, str(Path(scratch) / "model"))
        model = client.finalize_logged_model(model.model_id, "READY")
    _version(client, name, run, model)


def _logged(client: Any, experiment: str, run: str, name: str) -> Any | None:
    found = client.search_logged_models([experiment], f"source_run_id = '{run}' AND name = '{name}'", max_results=1)
    return found[0] if found else None


def _version(client: Any, name: str, run: str, model: Any) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="A dual encoder: texts and pictures in, unit-norm features out.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not client.search_model_versions(f"name = '{name}' AND run_id = '{run}'", max_results=1):
        client.create_model_version(name, model.artifact_location, run_id=run, model_id=model.model_id)


def package(directory: Path, target: Path, *, model_id: str | None = None, run_id: str | None = None, location: str | None = None) -> None:
    """Writes a model directory in MLflow's format to `target`, which must not exist."""
    import mlflow
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="diptych-code-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow asks for an input example, which a signature makes unnecessary
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": str(directory)},
            code_paths=[str(_code(Path(scratch)))],
            signature=signature(directory),
            pip_requirements=[f"{library}=={version(library)}" for library in LIBRARIES],
            mlflow_model=Model(artifact_path=location, run_id=run_id, model_id=model_id, model_uuid=model_id),
        )


def signature(directory: Path) -> Any:
    """The signature: an optional text and an optional picture a row, float32 `[rows, features]` out."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    from diptych.models import store

    features = int(store.read_config(directory)["model_cfg"]["embed_dim"])
    inputs = Schema([ColSpec("string", "text", required=False), ColSpec("binary", "image", required=False)])
    return ModelSignature(inputs=inputs, outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, features), "feature")]))


def _code(scratch: Path) -> Path:
    """The package cut down to the rooms that a model needs."""
    whole, cut = Path(diptych.__file__).parent, scratch / "diptych"
    cut.mkdir()
    shutil.copy2(whole / "__init__.py", cut)
    for room in ROOMS:
        shutil.copytree(whole / room, cut / room, ignore=shutil.ignore_patterns("__pycache__"))
    return cut
