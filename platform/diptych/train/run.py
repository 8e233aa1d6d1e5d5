"""One training, from a pair dataset to a model directory: what the engine calls, in process or on each worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import BatchSize, TrainContext, Wants
from diptych.models.decay import decays
from diptych.pairs.reinforced import COLUMN
from diptych.train import sharding, sync, towers, validate
from diptych.train.checkpoint import Checkpoints, TrainState, is_shared_out
from diptych.train.clock import ADVICE
from diptych.train.config import TrainConfig
from diptych.train.contrastive import Contrastive
from diptych.train.ema import Ema
from diptych.train.growth import Growth
from diptych.train.loader import PairLoader
from diptych.train.loop import Record, Run, fit
from diptych.train.validate import Validation

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder
    from diptych.pairs.dataset import PairDataset


@dataclass(frozen=True)
class TrainSummary:
    """What came of a training. Times are wall seconds of this process, of all its steps since it was started or resumed.

    Attributes:
        finished: false if it was asked to stop before the end.
        steps, samples_seen: of the whole run; `resumed_from` of them were made before this process.
        losses: the last record's losses and learning-rate figures.
        limited_by: `data wait`, `decode`, `step` or `synchronise`.
        advice: one sentence on that limit.
    """

    finished: bool
    steps: int
    samples_seen: int
    resumed_from: int
    losses: dict[str, float]
    wall_s: float
    data_wait_s: float
    read_s: float
    decode_s: float
    step_s: float
    sync_s: float
    checkpoint_s: float
    samples_per_s: float
    limited_by: str
    advice: str


def train(
    dataset_root: Path,
    split: str | None,
    config: TrainConfig,
    model_name: str,
    build_objective: Callable[[], Any],
    build_optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
    out: Path,
    scratch: Path,
    seed: int,
    *,
    init: str = "random",
    build_batch_size: Callable[[], BatchSize] | None = None,
    rank: int = 0,
    world: int = 1,
    device: str = "cpu",
    cores: int = 1,
    on_log: Callable[[Record], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    should_save: Callable[[], bool] | None = None,
) -> TrainSummary:
    """Trains a dual encoder on a pair dataset and writes its model directory, or goes on where an earlier call was killed.

    With `world > 1` every rank calls this after it initialised the default process group. The result does not depend on the
    number of ranks beyond the rounding of sums.

    Args:
        dataset_root: a pair dataset.
        split: the rows to train on; None for all.
        config: the loop's settings; `batch_size` is global.
        model_name: an architecture, as `models.clip.create` knows it.
        build_objective: gives the loss, an `nn.Module`; what it wants of the data and of the run it says as `core.points` has it.
        build_optimizer: gives the optimizer of parameter groups; its default `lr` is the schedule's peak.
        out: the model directory, written by rank 0 at the end; averaged weights if `config.ema` is set.
        scratch: `checkpoints/` and `steps.jsonl` lie here; shared by all ranks.
        seed: names the initial weights and every draw.
        init: `"random"`, or a model directory to start from.
        build_batch_size: gives what lets the batch grow (`growth.py`); `config.batch_size` is then that of a micro-batch.
        rank, world, device: this process's place.
        cores: that this process has to itself; those that arithmetic leaves free may decode ahead.
        on_log: called on rank 0 with each record of `steps.jsonl`.
        should_stop: asked after each step; if true on any rank, all stop after a checkpoint, and no model is written.
        should_save: likewise; if true on any rank, a checkpoint is written and training goes on.

    Raises ConfigError for settings that do not fit the data, DataError for broken pictures and for losses that are not finite.
    """
    from diptych.pairs.dataset import PairDataset

    with fixed_arithmetic(config.threads):
        _check_division(config, world)
        scratch.mkdir(parents=True, exist_ok=True)
        dataset = PairDataset.open(dataset_root)
        model = _model(model_name if init == "random" else init, seed, config, device)
        torch.manual_seed(seed)
        objective = build_objective()
        wants = Wants.of(objective)
        rows, place = _rows(dataset, split, config, _columns(dataset, wants)), {"seed": seed, "rank": rank, "world": world}
        loader = PairLoader(rows, dataset.reader(), model.tokenizer, model.image_size, config, wants=wants, cores=cores, **place)
        total_steps = config.total_steps(loader.steps_per_epoch)
        names = _class_names(dataset, split) if "label" in wants.columns else {}
        captions = partial(_captions, rows)
        _start(objective, TrainContext(model, model.tokenizer, rows.height, names, total_steps, rank, world, device, seed, captions))
        state = _first_state(model, objective.to(device), build_optimizer, config, world, total_steps, device)
        precision = resolved_precision(config.precision, device)
        made_of = {"dataset": dataset.digest, "split": split, "model": model_name, "init": init, "seed": seed, "precision": precision}
        growth = _growth(build_batch_size, config, state)
        identity = made_of | _recipe(config, state) | ({} if growth is None else {"batch_size": repr(growth.batch_size)})
        checkpoints = Checkpoints(scratch / "checkpoints", identity)
        resumed_from = _resume(checkpoints, state, world)
        loader.check(state.step)
        task, schedule = _task(state, config, precision, device), config.schedule.build(state.optimizer.defaults["lr"], total_steps)
        run = Run(
            task, loader, schedule, config, total_steps, seed, scratch / "steps.jsonl", checkpoints, rank, world, device,
            on_log=on_log, should_stop=should_stop, should_save=should_save,
            growth=growth, validation=_validation(dataset, config, task, place, device),
        )  # fmt: skip
        record = fit(run, state)
        if state.step == total_steps:
            _finish(state, run, out, identity)
        return _summary(run, state, record, resumed_from)


def _growth(build_batch_size: Callable[[], BatchSize] | None, config: TrainConfig, state: TrainState) -> Growth | None:
    """What lets the batch grow, if anything does."""
    if build_batch_size is None:
        return None
    if config.parallel == "fsdp":
        raise ConfigError.at("A growing batch needs whole gradients", "parallel", "fsdp", "ddp, every worker holding the whole model")
    return Growth(build_batch_size(), config.batch_size, optimizer=state.optimizer)


def _task(state: TrainState, config: TrainConfig, precision: str, device: str) -> Contrastive:
    """The training task, with compiled towers if they are asked for: after everything was copied that is to be copied."""
    if config.compile:
        model: Any = state.model
        towers.compiled(model, device)
    return Contrastive(state.model, state.objective, config.accumulate, precision)


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], no_decay: Sequence[str] = (), scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: parameters that decay as it says, and gains, biases and temperatures, which do not.

    The rule of `models.decay`; names that hold one of `no_decay` do not decay either. Names stand under torch's key `param_names`.
    With `scales`, factors of the learning rate by name, there are two groups a factor, which they carry as `layer_scale`.
    """
    plain: list[dict[str, Any]] = [{"params": [], "param_names": []}, {"params": [], "param_names": [], "weight_decay": 0.0}]
    by_scale: dict[float, list[dict[str, Any]]] = {1.0: plain}
    groups = [*plain]
    for name, parameter in named_parameters:
        scale = 1.0 if scales is None else scales.get(name, 1.0)
        if scale not in by_scale:
            twins = [{"params": [], "param_names": [], "layer_scale": scale, **rest} for rest in ({}, {"weight_decay": 0.0})]
            by_scale[scale] = twins
            groups += twins
        group = by_scale[scale][0 if decays(name, parameter, no_decay) else 1]
        group["params"].append(parameter)
        group["param_names"].append(name)
    return groups


def resolved_precision(precision: str, device: str) -> str:
    """`fp32` or `bf16`; `auto` is bf16 where the device computes in it, which most processors only emulate."""
    if precision != "auto":
        return precision
    cpu: Any = torch.cpu
    able = torch.cuda.is_bf16_supported() if device.startswith("cuda") else cpu._is_avx512_bf16_supported()
    return "bf16" if able else "fp32"


@contextmanager
def fixed_arithmetic(threads: int) -> Iterator[None]:
    """Sums in a fixed order while training: a fixed number of threads, deterministic kernels. Restores what was set before."""
    deterministic: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        deterministic.fill_uninitialized_memory = fill


def _model(name: str, seed: int, config: TrainConfig, device: str) -> DualEncoder:
    """The model of a name or a directory, ready to be trained; a frozen tower stays as it is."""
    from diptych.models import clip

    model = clip.create(name, seed).to(device).train()
    towers.prepare(model, config)
    if config.freeze != "none":
        clip.freeze(model, config.freeze)
    return model


def _first_state(
    model: DualEncoder,
    objective: nn.Module,
    build_optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
    config: TrainConfig,
    world: int,
    total_steps: int,
    device: str = "cpu",
) -> TrainState:
    """The state of step 0, equal on all ranks."""
    sync.broadcast([*model.parameters(), *model.buffers(), *objective.parameters(), *objective.buffers()], world)
    shared = config.parallel == "fsdp" and world > 1
    if shared:
        sharding.refuse_objective(objective)
        sharding.shard(model, world, device)
    named = [*model.named_parameters(), *((f"objective.{name}", parameter) for name, parameter in objective.named_parameters())]
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = parameter_groups(trained, config.no_decay, _scales(model, objective, config))
    optimizer = build_optimizer(sharding.split(groups) if shared else groups)
    if shared:
        sharding.refuse_optimizer(optimizer)
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr"] / optimizer.defaults["lr"] * group.get("layer_scale", 1.0)
    towers.refuse_second_derivatives(config, optimizer)
    _plan(optimizer, total_steps)
    return TrainState(model, objective, optimizer, None if config.ema is None else Ema(model, config.ema))


def _scales(model: DualEncoder, objective: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Factors of the learning rate by parameter: of the layers, if it decays over them, and those that an objective asks for its own."""
    scales = {} if config.layer_decay is None else dict(towers.layer_scales(model, config.layer_decay))
    asked: Mapping[str, float] = getattr(objective, "lr_scales", {})
    own = (name for name, _ in objective.named_parameters())
    return scales | {f"objective.{name}": asked[part] for name in own if (part := name.split(".")[0]) in asked}


def _plan(optimizer: torch.optim.Optimizer, total_steps: int) -> None:
    """Tells an optimizer how many updates it will make, if it wants to know: one that lays a budget over the run has `plan`."""
    plan = getattr(optimizer, "plan", None)
    if plan is not None:
        plan(total_steps)


def _check_division(config: TrainConfig, world: int) -> None:
    parts = world * config.accumulate
    if config.batch_size % parts:
        raise ConfigError.at("The batch does not divide", "batch_size", config.batch_size, f"a multiple of {parts}: workers x accumulate")


def _columns(dataset: PairDataset, wants: Wants) -> list[str]:
    """The columns that an objective wants; what teachers said only where they were asked, which the loader sees to."""
    stored = wants.reinforced and COLUMN in dataset.scan().collect_schema()
    return [*wants.columns, *([COLUMN] if stored else [])]


def _rows(dataset: PairDataset, split: str | None, config: TrainConfig, wanted: Sequence[str] = ()) -> pl.DataFrame:
    """The training pairs, without the columns and captions that training does not look at."""
    more = {*wanted, *([config.avoid] if config.avoid else []), *(["label"] if config.labelled else [])}
    frame = dataset.read(["key", "image", "captions", "split", *sorted(more)])
    frame = frame if split is None else frame.filter(pl.col("split") == split)
    if not config.tags:
        others = pl.col("captions").list.eval(pl.element().filter(pl.element().struct.field("source") != "tag"))
        frame = frame.with_columns(captions=pl.when(others.list.len() > 0).then(others).otherwise("captions"))
    if frame.is_empty():
        raise ConfigError.at("There is nothing to train on", "split", split, "a split that the data set has")
    return frame


def _validation(dataset: PairDataset, config: TrainConfig, task: Contrastive, place: dict[str, int], device: str) -> Validation | None:
    """The validation that a run asks for. Raises ConfigError if the data set has no pairs for it."""
    if config.validate_every_steps is None:
        return None
    frame = dataset.read(["key", "image", "captions", "split"]).filter(pl.col("split") == "val")
    model: Any = task.model
    own = validate.settings(config, frame.height, place["world"])
    loader = PairLoader(
        frame, dataset.reader(), model.tokenizer, model.image_size, own, seed=place["seed"], rank=place["rank"], world=place["world"]
    )
    return Validation(loader, task, model, place["world"], device)


def _class_names(dataset: PairDataset, split: str | None) -> dict[int, str]:
    """The name of each label of the training pairs, by rising label; none if there is no such column.

    Raises DataError for a label with several names or none.
    """
    if "label_name" not in dataset.scan().collect_schema():
        return {}
    rows = dataset.read(["split", "label", "label_name"]).drop_nulls("label")
    rows = rows if split is None else rows.filter(pl.col("split") == split)
    names = rows.group_by("label").agg(pl.col("label_name").drop_nulls().unique().sort()).sort("label")
    odd = names.filter(pl.col("label_name").list.len() != 1)
    if odd.height:
        raise DataError.at("A label has not one name", f"label {odd['label'][0]}", odd["label_name"][0].to_list(), "one name a label")
    return dict(names.explode("label_name").iter_rows())


def _captions(rows: pl.DataFrame) -> list[list[str]]:
    """The captions of each training pair, by row."""
    texts: list[list[str]] = rows["captions"].list.eval(pl.element().struct.field("text")).to_list()
    return texts


def _start(objective: nn.Module, context: TrainContext) -> None:
    """Lets an objective make what depends on the run, before the optimizer is built."""
    start = getattr(objective, "start", None)
    if start is not None:
        start(context)


def _recipe(config: TrainConfig, state: TrainState) -> dict[str, Any]:
    """How a run trains, as plain data: with the data, the model and the seed it names the result."""
    optimizer = {name: value for name, value in state.optimizer.defaults.items() if isinstance(value, bool | int | float | str | tuple)}
    return {
        "objective": repr(state.objective),
        "optimizer": {"class": type(state.optimizer).__name__, **optimizer},
        "config": config.plain(),
    }


def _resume(checkpoints: Checkpoints, state: TrainState, world: int) -> int:
    """Continues from the newest checkpoint, if there is one; all ranks from the one that rank 0 finds. The step that it goes on from."""
    found: list[Path | None] = [checkpoints.latest()]
    if world > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    if found[0] is not None:
        checkpoints.restore(found[0], state)
    return state.step


def _refuse_short_run(state: TrainState, planned: int) -> None:
    if state.samples_seen != planned:
        raise DataError.at(
            "The run saw another number of pairs than planned", "samples_seen", state.samples_seen, str(planned), "train afresh"
        )


def _finish(state: TrainState, run: Run, out: Path, identity: dict[str, Any]) -> None:
    """Checks that all pairs were seen; rank 0 writes the model directory."""
    from diptych.models import clip

    _refuse_short_run(state, run.total_steps * run.config.batch_size)
    weights = sharding.whole(state.model.state_dict()) if is_shared_out(state) else None
    if run.rank == 0:
        model: Any = state.model if state.ema is None else state.ema.model
        if weights is not None:
            model = clip.create(str(identity["model"] if identity["init"] == "random" else identity["init"]), run.seed).to(run.device)
            model.load_state_dict(weights)
        chosen = int(state.best.get("step", state.step))
        if chosen != state.step:
            folder = run.checkpoints.of_step(chosen)
            load_model(model, folder / ("model.safetensors" if state.ema is None else "ema.safetensors"), strict=True, device=run.device)
        lineage = {**identity, "steps": state.step, "samples_seen": state.samples_seen}
        clip.save(model, out, lineage if run.config.keep_best is None else {**lineage, "best": state.best})
        save_adapter: Any = getattr(state.optimizer, "save_adapter", None)
        if save_adapter is not None:  # of optimizers that train adapters, and only if asked for one
            save_adapter(state.model, out, identity["init"])


def _summary(run: Run, state: TrainState, record: Record, resumed_from: int) -> TrainSummary:
    spent, wall_s, limited_by = run.clock.total_s, run.clock.wall_s, run.clock.limit()
    not_losses = {"step", "steps", "epoch", "samples_seen", "samples_per_s"}
    return TrainSummary(
        finished=state.step == run.total_steps,
        steps=state.step,
        samples_seen=state.samples_seen,
        resumed_from=resumed_from,
        losses={name: value for name, value in record.items() if name not in not_losses and not name.endswith("_s")},
        wall_s=wall_s,
        data_wait_s=spent["data_wait"],
        read_s=spent["read"],
        decode_s=spent["decode"],
        step_s=spent["step"],
        sync_s=spent["sync"],
        checkpoint_s=spent["checkpoint"],
        samples_per_s=(state.step - resumed_from) * run.config.batch_size / wall_s,
        limited_by=limited_by,
        advice=ADVICE[limited_by],
    )
