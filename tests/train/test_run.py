from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from _ranks import run_ranks

from diptych.core.errors import ConfigError
from diptych.pairs.schema import PAIRS
from diptych.train import run as train_run
from diptych.train.config import TrainConfig
from diptych.train.run import TrainSummary, parameter_groups, train

SETTINGS = {"epochs": 3, "batch_size": 16, "log_every": 2, "augment": {"crop_scale": [0.6, 1.0]}}


def run(root: Path, folder: Path, rank: int = 0, world: int = 1, changes: dict[str, Any] | None = None, **options: Any) -> TrainSummary:
    from diptych.objectives.clip import Config as Clip
    from diptych.optimizers.adamw import Config as AdamW

    config = TrainConfig.parse({**SETTINGS, **(changes or {})})
    return train(
        root, options.pop("split", "train"), config, "vit-micro-40", Clip().build, AdamW(lr=5e-4).build,
        folder / "model", folder / "scratch", options.pop("seed", 0), rank=rank, world=world, **options,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model" / "open_clip_model.safetensors")


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "scratch" / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSummary]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(dataset_root, folder)


def test_a_run_leaves_a_model_that_opens_with_its_lineage(straight: tuple[Path, TrainSummary], dataset_root: Path) -> None:
    from diptych.models import clip
    from diptych.pairs.dataset import PairDataset

    folder, summary = straight
    model = clip.load(folder / "model")
    assert model.image_size == 40
    lineage = json.loads((folder / "model" / "lineage.json").read_text())
    assert lineage["dataset"] == PairDataset.open(dataset_root).digest
    assert lineage["samples_seen"] == 96
    assert lineage["seed"] == 0
    assert lineage["config"]["batch_size"] == 16
    assert lineage["optimizer"]["lr"] == 5e-4
    assert summary.finished
    assert summary.steps == 6
    assert summary.samples_seen == 96
    assert summary.resumed_from == 0
    assert set(summary.losses) == {"loss", "accuracy", "lr", "grad_norm", "logit_scale"}
    assert summary.limited_by in ("step", "decode", "data wait", "synchronise")
    assert summary.advice
    parts = summary.data_wait_s + summary.step_s + summary.sync_s + summary.checkpoint_s
    assert 0.8 * summary.wall_s < parts <= summary.wall_s


def test_the_same_run_gives_the_same_bytes(straight: tuple[Path, TrainSummary], dataset_root: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # whatever was drawn before
    run(dataset_root, tmp_path)
    for name in ("open_clip_model.safetensors", "lineage.json", "open_clip_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (straight[0] / "model" / name).read_bytes()


def test_stopped_in_the_middle_of_an_epoch_and_run_again(straight: tuple[Path, TrainSummary], dataset_root: Path, tmp_path: Path) -> None:
    steps = iter(range(100))
    first = run(dataset_root, tmp_path, should_stop=lambda: next(steps) == 2)
    assert not first.finished
    assert first.steps == 3
    assert not (tmp_path / "model").exists()
    second = run(dataset_root, tmp_path)
    assert second.finished
    assert second.resumed_from == 3
    ours, theirs = weights(tmp_path), weights(straight[0])
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def on_rank(rank: int, world: int, root: str, folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return vars(run(Path(root), Path(folder), rank, world))


@pytest.mark.slow
def test_two_workers_do_what_one_does(straight: tuple[Path, TrainSummary], dataset_root: Path, tmp_path: Path) -> None:
    summaries = run_ranks(2, on_rank, str(dataset_root), str(tmp_path))
    assert all(summary["samples_seen"] == 96 and summary["finished"] for summary in summaries)
    for ours, theirs in zip(log(tmp_path), log(straight[0]), strict=True):
        for name in ("step", "samples_seen", "lr"):
            assert ours[name] == theirs[name]
        for name in ("loss", "grad_norm", "logit_scale"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    # Adam divides by the root of squared gradients, so weights with next to no gradient may part by a step.
    ours, theirs = weights(tmp_path), weights(straight[0])
    apart = np.concatenate([np.abs(ours[name] - theirs[name]).ravel() for name in theirs])
    assert np.quantile(apart, 0.99) < 1e-5
    assert apart.max() < 4e-3


def test_a_checkpoint_of_other_settings_is_refused(dataset_root: Path, tmp_path: Path) -> None:
    run(dataset_root, tmp_path, should_stop=lambda: True)
    with pytest.raises(ConfigError, match="another run") as error:
        run(dataset_root, tmp_path, seed=1)
    assert "seed" in str(error.value)


def test_averaged_weights_are_what_is_saved(dataset_root: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run(dataset_root, tmp_path, changes={"ema": 0.8, "steps": 2, "epochs": None})
    saved = weights(tmp_path)["visual.proj"]
    (last,) = (tmp_path / "scratch" / "checkpoints").iterdir()
    averaged, latest = (load_file(last / name)["clip.visual.proj"] for name in ("ema.safetensors", "model.safetensors"))
    assert np.array_equal(saved, averaged)
    assert not np.array_equal(saved, latest)


def test_training_starts_from_a_model(straight: tuple[Path, TrainSummary], dataset_root: Path, tmp_path: Path) -> None:
    run(dataset_root, tmp_path, changes={"steps": 1, "epochs": None}, init=str(straight[0] / "model"), seed=5)
    ours, theirs = weights(tmp_path), weights(straight[0])
    assert max(np.abs(ours[name] - theirs[name]).max() for name in theirs) < 1e-3, "one step of Adam at 5e-4"


def test_an_empty_split_and_a_large_batch_are_refused(dataset_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to train on"):
        run(dataset_root, tmp_path, split="val")
    with pytest.raises(ConfigError, match="smaller than one batch"):
        run(dataset_root, tmp_path, changes={"batch_size": 64})
    with pytest.raises(ConfigError, match="multiple of"):
        run(dataset_root, tmp_path, changes={"batch_size": 6, "accumulate": 3, "steps": 1, "epochs": None}, rank=0, world=4)


def test_what_was_set_before_is_restored(dataset_root: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    run(dataset_root, tmp_path, changes={"steps": 1, "epochs": None, "threads": before[0] + 1})
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_gains_biases_and_the_temperature_do_not_decay() -> None:
    shapes = {
        "visual.proj": (4, 3),
        "visual.ln_pre.weight": (4,),
        "text.bias_table": (2, 2),
        "logit_scale": (),
        "token_embedding.weight": (9, 2),
    }
    decayed, plain = parameter_groups([(name, torch.zeros(shape)) for name, shape in shapes.items()])
    assert [tuple(value.shape) for value in decayed["params"]] == [(4, 3), (9, 2)]
    assert "weight_decay" not in decayed
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0.0


def test_tags_are_trained_on_only_where_asked_for_or_alone() -> None:
    def captions(*pairs: tuple[str, str]) -> list[dict[str, object]]:
        return [{"text": text, "source": source, "score": None} for text, source in pairs]

    frame = pl.DataFrame(
        {
            "key": ["a", "b"],
            "image": [{"shard": "s", "offset": 0, "size": 1, "width": 1, "height": 1}] * 2,
            "captions": [captions(("cat", "human"), ("pet, fur", "tag"), ("kitty", "rewrite:laclip")), captions(("pet", "tag"))],
            "split": ["train"] * 2,
        },
        schema=PAIRS,
    )

    class Dataset:
        def read(self, columns: list[str]) -> pl.DataFrame:
            return frame.select(columns)

    def texts(**settings: bool) -> list[list[str]]:
        rows = train_run._rows(Dataset(), "train", TrainConfig(steps=1, **settings))
        return [[caption["text"] for caption in row] for row in rows["captions"].to_list()]

    assert texts() == [["cat", "kitty"], ["pet"]]
    assert texts(tags=True) == [["cat", "pet, fur", "kitty"], ["pet"]]
