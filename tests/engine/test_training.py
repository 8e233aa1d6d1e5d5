"""A job as the engine runs it: batches that grow stop and go on to the bit, adapters are written beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diptych.engine import training
from diptych.models import clip
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources.digits import Config as DigitsConfig
from diptych.train.config import TrainConfig

GROWTH = {"method": "adadagrad", "eta": 0.2, "max_batch_size": 40, "interval": 1}
CONFIG = {"steps": 14, "batch_size": 10, "log_every": 1, "checkpoint_every_s": 1e6}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "pairs"
    ingest_all(DigitsConfig(train=60).build(), out, version="0")
    return out


def job_of(folder: Path, dataset: Path, optimizer: Mapping[str, Any], growth: Mapping[str, Any] | None, init: str) -> training.Job:
    config = TrainConfig.parse(CONFIG)
    objective = {"method": "clip"}
    return training.Job(
        dataset, config, "digits-16", init, objective, optimizer, folder / "model", folder / "scratch", 3, 1, batch_growth=growth
    )


def test_a_grown_batch_stops_and_goes_on_to_the_bit(tmp_path: Path, dataset: Path) -> None:
    optimizer = {"method": "adagrad", "lr": 1e-3}
    straight = job_of(tmp_path / "straight", dataset, optimizer, GROWTH, "random")
    whole = training.work(straight, 0, 1)
    sizes = [json.loads(line)["batch_size"] for line in (straight.scratch / "steps.jsonl").read_text().splitlines()]
    assert sizes == sorted(sizes)
    assert sizes[-2] > sizes[0]  # the last may take what is left

    stopped = job_of(tmp_path / "stopped", dataset, optimizer, GROWTH, "random")
    grown: list[int] = []
    seen: dict[str, Any] = {}

    def note(record: Mapping[str, Any]) -> None:
        seen.update(record)
        grown.append(record["batch_size"])

    first = training.work(stopped, 0, 1, on_log=note, should_stop=lambda: bool(seen) and seen["batch_size"] > sizes[0])
    assert not first["finished"]
    assert grown[-1] > grown[0]
    rest = training.work(stopped, 0, 1)
    assert rest["finished"]
    assert rest["samples_seen"] == whole["samples_seen"] == 140
    weights = [load_file(job.out / "open_clip_model.safetensors") for job in (straight, stopped)]
    assert all((weights[0][name] == value).all() for name, value in weights[1].items())


def test_an_adapter_stands_beside_the_merged_model(tmp_path: Path, dataset: Path) -> None:
    start = tmp_path / "start"
    clip.save(clip.create("digits-16", 5), start, {})
    optimizer = {"method": "adalora", "rank": 3, "target_rank": 2, "lr": 0.02, "mask_interval": 2, "projections": False}
    plain = job_of(tmp_path / "plain", dataset, optimizer, None, str(start))
    training.work(plain, 0, 1)
    assert not (plain.out / "adapter").exists()

    job = job_of(tmp_path / "with", dataset, {**optimizer, "adapter": "peft"}, None, str(start))
    training.work(job, 0, 1)
    config = json.loads((job.out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(start)
    pairs = load_file(job.out / "adapter" / "adapter_model.safetensors")
    before, after = clip.load(start).clip.state_dict(), clip.load(job.out).clip.state_dict()
    name = "transformer.resblocks.0.mlp.c_fc"
    delta = pairs[f"base_model.model.{name}.lora_B.weight"] @ pairs[f"base_model.model.{name}.lora_A.weight"]
    assert delta.abs().max() > 1e-4
    assert (after[f"{name}.weight"] - before[f"{name}.weight"] - delta).abs().max() < 1e-6
