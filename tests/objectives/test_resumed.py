"""Through the real loop: stopped in the middle and run again, an objective leaves the bits of a run that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from diptych.core import catalogue
from diptych.optimizers.adamw import Config as AdamW
from diptych.pairs.schema import CAPTIONS
from diptych.train.config import TrainConfig
from diptych.train.run import TrainSummary, train

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 4, "batch_size": 8, "log_every": 1, "augment": {"flip": True}}


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings with a label each and a synthetic caption beside their own."""
    from tiny import COLOURS, write_dataset

    root = tmp_path_factory.mktemp("pairs") / "data"
    made_up = pl.lit([{"text": "a drawing", "source": "synthetic:test", "score": None}], dtype=CAPTIONS)
    label = pl.int_range(pl.len()) % 5
    names = label.replace_strict(range(5), list(COLOURS), return_dtype=pl.String)
    write_dataset(root, 24, {"captions": pl.concat_list("captions", made_up), "label": label, "label_name": names})
    return root


@pytest.fixture(scope="module")
def start_model(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("start")
    run(dataset_root, folder, {"method": "clip"}, seed=7)
    return str(folder / "model")


def run(root: Path, folder: Path, objective: dict[str, Any], **options: Any) -> TrainSummary:
    config: Any = catalogue.config_class(catalogue.find(objective["method"], "objective")).parse(objective)
    return train(
        root, "train", TrainConfig.parse(SETTINGS), "vit-micro-40", config.build, AdamW(lr=5e-4).build,
        folder / "model", folder / "scratch", options.pop("seed", 0), **options,
    )  # fmt: skip


def left(folder: Path) -> dict[str, np.ndarray]:
    """The weights of the model, and the objective's state at the end."""
    from safetensors.numpy import load_file

    last = max((folder / "scratch" / "checkpoints").iterdir())
    state = torch.load(last / "objective.pt", weights_only=True)
    return {**load_file(folder / "model" / "open_clip_model.safetensors"), **{f"objective.{k}": v.numpy() for k, v in state.items()}}


@pytest.mark.parametrize(
    ("objective", "state"),
    [
        ({"method": "alip"}, {"objective.history_3"}),
        ({"method": "siglip"}, {"objective.logit_bias"}),
        ({"method": "vr-lwf", "sentences": 6, "words": 2, "replay": ["vocabulary", "classes"]}, set()),
        ({"method": "distillation", "teacher": "@start", "features": 1.0}, set()),
        ({"method": "lightclip", "vocabulary": "seen", "probe": ["red"]}, None),
        ({"method": "clip-rocket", "hidden": 8, "width": 4, "extra_width": 4, "extra": "byolip"}, None),
        ({"method": "a-clip", "hidden": 8, "width": 4, "cell": 1}, None),
        ({"method": "tinyclip", "teacher": "@start", "alpha": 0.5, "inherit": True}, set()),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_stopped_and_run_again(
    objective: dict[str, Any], state: set[str] | None, dataset_root: Path, start_model: str, tmp_path: Path
) -> None:
    objective = {key: start_model if value == "@start" else value for key, value in objective.items()}
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    run(dataset_root, straight, objective, init=start_model)
    steps = iter(range(9))
    assert run(dataset_root, parts, objective, init=start_model, should_stop=lambda: next(steps) == 1).steps == 2
    assert run(dataset_root, parts, objective, init=start_model).resumed_from == 2
    expected, found = left(straight), left(parts)
    kept = {name for name in expected if name.startswith("objective.")}
    assert kept == state if state is not None else kept, "None: it has some, by its own test"
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name
