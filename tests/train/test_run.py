from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from _ranks import run_ranks
from torch.nn.functional import cross_entropy

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoded, TrainContext
from diptych.pairs.schema import PAIRS
from diptych.train import run as train_run
from diptych.train.config import TrainConfig
from diptych.train.run import TrainSummary, parameter_groups, train

SETTINGS = {"epochs": 3, "batch_size": 16, "log_every": 2, "augment": {"crop_scale": [0.6, 1.0]}}


def run(
    root: Path,
    folder: Path,
    rank: int = 0,
    world: int = 1,
    changes: dict[str, Any] | None = None,
    objective: Any = None,
    **options: Any,
) -> TrainSummary:
    from diptych.objectives.clip import Config as Clip
    from diptych.optimizers.adamw import Config as AdamW

    config = TrainConfig.parse({**SETTINGS, **(changes or {})})
    return train(
        root, options.pop("split", "train"), config, "vit-micro-40", objective or Clip().build, AdamW(lr=5e-4).build,
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
    watched = {"image_rank", "text_rank", "image_uniformity", "text_uniformity", "alignment"}
    assert set(summary.losses) == {"loss", "accuracy", "lr", "grad_norm", "logit_scale"} | watched
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
    third = run(dataset_root, tmp_path)  # killed after its last step, before its result was taken over
    assert third.resumed_from == third.steps
    assert third.losses == straight[1].losses


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


class Stateful(torch.nn.Module):
    """All that an objective may have: a head made at the start, a table by row, a slow copy of a weight, views, a column."""

    views, columns, captions, encodes = ("weak", "strong"), ("label",), 1, ("image",)

    def start(self, context: TrainContext) -> None:
        self.context = {name: value for name, value in vars(context).items() if name not in ("model", "tokenizer")}
        self.head = torch.nn.Linear(context.model.clip.visual.proj.shape[1], len(context.class_names))
        self.register_buffer("seen_R", torch.zeros(context.rows))
        self.register_buffer("slow", context.model.clip.visual.proj.detach().clone())

    def forward(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        strong_ND = encoded.encode_image(encoded.batch["view1_NCHW"])
        wanted_N = encoded.batch["label_N"]
        wrong_N = cross_entropy(self.head(strong_ND), wanted_N, reduction="none")
        self.seen_R[encoded.batch["row_N"]] += wrong_N.detach()
        weight_N = self.seen_R[encoded.batch["row_N"]]
        apart = (strong_ND - encoded.image_ND).square().sum(dim=1).mean()
        return {"loss": (weight_N * wrong_N).mean() + apart + 0.1 * self.slow.mean() * apart}

    def after_step(self, step: int, model: torch.nn.Module) -> None:
        self.slow.lerp_(model.clip.visual.proj, 1 / step)


@pytest.fixture(scope="module")
def named_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty drawings with named labels, of which 3 is not used and some pairs have none."""
    from tiny import write_dataset

    root = tmp_path_factory.mktemp("named") / "data"
    label = pl.when(pl.col("label") < 3).then("label").when(pl.col("label") > 7).then(4).cast(pl.Int64)
    write_dataset(root, rows=40, extra={"label": label, "label_name": pl.concat_str(pl.lit("thing "), label.cast(pl.String))})
    return root


@pytest.fixture(scope="module")
def named_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty drawings, all of them with a named label."""
    from tiny import write_dataset

    root = tmp_path_factory.mktemp("all") / "data"
    write_dataset(root, rows=40, extra={"label_name": pl.col("label").cast(pl.String)})
    return root


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "scratch" / "checkpoints").glob("step-*"))
    return torch.load(newest / "objective.pt", weights_only=True)


def test_an_objective_with_state_goes_on_exactly(named_all: Path, tmp_path: Path) -> None:
    for name, stops in (("straight", ()), ("stopped", (2, 4))):
        for stop in (*stops, 100):
            steps = iter(range(100))
            done = run(named_all, tmp_path / name, objective=Stateful, should_stop=lambda steps=steps, stop=stop: next(steps) >= stop)
            if done.finished:
                break
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "straight")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    state, expected = checkpoint(tmp_path / "stopped"), checkpoint(tmp_path / "straight")
    assert state.keys() == expected.keys() == {"head.weight", "head.bias", "seen_R", "slow"}
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert (state["seen_R"] > 0).sum() > 32, "more than two batches of rows"
    assert not np.array_equal(state["slow"].numpy(), theirs["visual.proj"])


def test_what_an_objective_makes_at_the_start_is_trained(named_all: Path, tmp_path: Path) -> None:
    first: list[torch.Tensor] = []

    class Watched(Stateful):
        def forward(self, encoded: Encoded) -> dict[str, torch.Tensor]:
            first.append(self.head.weight.detach().clone())
            return super().forward(encoded)

    run(named_all, tmp_path, objective=Watched)
    assert len(first) == 6
    assert not torch.equal(first[0], first[-1])


def test_an_objective_learns_of_the_run_at_its_start(named_root: Path, tmp_path: Path) -> None:
    made: list[Stateful] = []

    class Curious(Stateful):
        def start(self, context: TrainContext) -> None:
            super().start(context)
            made.append(self)
            raise ConfigError.at("Enough", "start", 0, "1")

    with pytest.raises(ConfigError, match="Enough"):
        run(named_root, tmp_path, objective=Curious, seed=7)
    names = {0: "thing 0", 1: "thing 1", 2: "thing 2", 4: "thing 4"}
    expected = {"rows": 40, "class_names": names, "total_steps": 6, "rank": 0, "world": 1, "device": "cpu", "seed": 7}
    context = dict(made[0].context)
    captions = context.pop("captions")
    assert context == expected
    assert callable(captions)


def test_a_label_with_two_names_or_none_is_refused(tmp_path: Path) -> None:
    from tiny import write_dataset

    for index, name in enumerate((pl.col("key"), pl.when(pl.col("label") != 3).then(pl.lit("one")))):
        root = tmp_path / str(index) / "data"
        write_dataset(root, rows=40, extra={"label_name": name})
        with pytest.raises(DataError, match="A label has not one name"):
            run(root, tmp_path / str(index), objective=Stateful)


def test_a_column_that_the_data_lacks_is_named(dataset_root: Path, tmp_path: Path) -> None:
    class Weighted(Stateful):
        columns = ("weight",)

    with pytest.raises(DataError, match="no such column"):
        run(dataset_root, tmp_path, objective=Weighted)


@pytest.mark.parametrize(("tower", "others"), [("image", "text"), ("text", "image")])
def test_a_frozen_tower_keeps_its_weights(dataset_root: Path, tmp_path: Path, tower: str, others: str) -> None:
    from diptych.models import clip

    changes = {"freeze": tower, "steps": 2, "epochs": None, "accumulate": 2}
    run(dataset_root, tmp_path, changes=changes)
    before = clip.create("vit-micro-40", 0).clip.state_dict()
    moved = {name for name, value in weights(tmp_path).items() if not np.array_equal(value, before[name].numpy())}
    parts = {clip.part_of(name) for name in moved}
    assert parts == {others, "logit"}
    trained = torch.load(next((tmp_path / "scratch" / "checkpoints").glob("step-*")) / "optimizer.pt", weights_only=True)
    sizes = clip.parameters_by_part(clip.create("vit-micro-40", 0))
    left = sizes["logit"] + (sizes["image"] if others == "image" else sizes["text"] + sizes["token_table"])
    assert sum(state["exp_avg"].numel() for state in trained["state"].values()) == left


def test_a_frozen_tower_behaves_as_in_evaluation() -> None:
    from diptych.models import clip

    model = clip.create("vit-micro-40", 0).train()
    clip.freeze(model, "image")
    assert not any(module.training for module in model.clip.visual.modules())
    assert model.clip.transformer.training
    assert not any(parameter.requires_grad for parameter in model.clip.visual.parameters())


@pytest.mark.parametrize(
    ("method", "settings", "changes"),
    [
        ("shrinkmatch", {"threshold": 0.12}, {"labelled": 0.25, "freeze": "text"}),
        ("shrinkmatch", {"threshold": 0.12, "search": "raw", "alignment": "average"}, {"accumulate": 2}),
        ("adawac", {"eta_w": 4.0}, {"accumulate": 2, "ema": 0.9}),
        ("adawac", {"supervised": "label", "mode": "pseudo"}, {"freeze": "text"}),
    ],
)
def test_objectives_with_state_go_on_exactly(
    named_root: Path, tmp_path: Path, method: str, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    from diptych.objectives import adawac, shrinkmatch

    config = {"adawac": adawac, "shrinkmatch": shrinkmatch}[method].Config.parse({"method": method, **settings})
    for name, stops in (("straight", (100,)), ("stopped", (1, 100))):
        for stop in stops:
            steps = iter(range(100))
            run(
                named_root,
                tmp_path / name,
                objective=config.build,
                changes=changes,
                should_stop=lambda steps=steps, stop=stop: next(steps) >= stop,
            )
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "straight")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    state, expected = checkpoint(tmp_path / "stopped"), checkpoint(tmp_path / "straight")
    assert len(expected) > 0
    assert all(torch.equal(state[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)
    assert all(np.isfinite(record["loss"]) for record in log(tmp_path / "stopped"))


def stopped_on_rank(rank: int, world: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    steps = iter(range(100))
    run(Path(root), Path(folder), rank, world, should_stop=lambda: next(steps) == 2)


@pytest.mark.slow
def test_two_workers_begin_and_one_goes_on(straight: tuple[Path, TrainSummary], dataset_root: Path, tmp_path: Path) -> None:
    """As an elastic training does that loses a worker: the same pairs, each once, and the losses of a run that one worker made."""
    run_ranks(2, stopped_on_rank, str(dataset_root), str(tmp_path))
    second = run(dataset_root, tmp_path)
    assert (second.resumed_from, second.finished, second.samples_seen) == (3, True, 96)
    ours = {record["step"]: record for record in log(tmp_path)}
    theirs = {record["step"]: record for record in log(straight[0])}
    assert set(ours) == {2, 3, 4, 6}
    for step in (2, 4, 6):
        for name in ("loss", "grad_norm", "logit_scale", "image_rank", "alignment"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-3), name
