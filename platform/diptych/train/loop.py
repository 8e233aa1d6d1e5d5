"""The training loop: plain torch, top to bottom.

One step: take the batch, encode and compare, backward, average the gradients over the ranks, clip, update. An optimizer that asks
for curvature gets it on the way (`curvature.py`). The state is a step number and the tensors; what a step draws depends on
`(seed, step, rank)`, so a run can stop and go on anywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diptych.core import chance
from diptych.core.points import TrainingTask
from diptych.train import best, curvature, sharding, sync
from diptych.train.checkpoint import Checkpoints, TrainState, is_shared_out
from diptych.train.clock import Clock
from diptych.train.config import TrainConfig
from diptych.train.health import Watch
from diptych.train.loader import Batch, PairLoader
from diptych.train.schedule import Schedule

if TYPE_CHECKING:
    from diptych.train.growth import Growth
    from diptych.train.validate import Validation

Record = dict[str, Any]


@dataclass
class Run:
    """What stays the same over a run.

    Attributes:
        task: turns a batch into losses.
        loader: this rank's batches.
        schedule: learning rate by step; a group's own is that times its `lr_scale`.
        config: the loop's settings.
        total_steps: updates of the whole run.
        seed: names what the steps draw.
        log: the file of step records, written by rank 0.
        checkpoints: written by rank 0.
        rank, world, device: this process's place.
        growth: if set, an update takes several of the loader's batches, and ever more; a step is one of them.
        validation: what `validate_every_steps` asks for.
        on_log, should_stop, should_save: called on rank 0 with each record; asked on every rank after each step.
    """

    task: TrainingTask
    loader: PairLoader
    schedule: Schedule
    config: TrainConfig
    total_steps: int
    seed: int
    log: Path
    checkpoints: Checkpoints
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    on_log: Callable[[Record], None] | None = None
    should_stop: Callable[[], bool] | None = None
    should_save: Callable[[], bool] | None = None
    validation: Validation | None = None
    clock: Clock = field(default_factory=Clock)
    growth: Growth | None = None


def fit(run: Run, state: TrainState) -> Record:
    """Trains from `state.step` until the end, or until some rank should stop; the last record logged.

    Leaves a checkpoint at the end. Raises DataError at the first gradient that is not finite, before it touches the weights, and when the
    embeddings have collapsed (`health.py`).
    """
    batches = run.loader.batches(state.step, run.total_steps)
    try:
        return _fit(run, state, batches)
    finally:
        batches.close()  # ends its threads
        with run.clock("checkpoint"):
            run.checkpoints.wait()


def _fit(run: Run, state: TrainState, batches: Generator[Batch, None, None]) -> Record:
    config, clock, optimizer = run.config, run.clock, state.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    backward = curvature.backward(optimizer, run.task, run.seed)
    shared = is_shared_out(state)
    watch = Watch(state, run.checkpoints, run.rank, run.world)
    saved_at, saved_step, logged_step, stop = time.monotonic(), -1, state.step, False
    record = truncate_log(run, state.step)

    while state.step < run.total_steps and not stop:
        tensors, taken = next_tensors(run, batches), 1

        with clock("step"):
            torch.manual_seed(int(chance.mix(run.seed, state.step, run.rank)) >> 1)
            lr = _set_lr(run, state)
            optimizer.zero_grad(set_to_none=True)
            losses = backward(tensors, state.step)

        with clock("sync"):
            sync.average_gradients(parameters, run.world)
            sync.average(backward.to_average, run.world)
        if run.growth is not None:
            taken, losses = run.growth.complete(run, state, batches, parameters, losses)
        after = state.step + taken
        log_due = passes(after, taken, config.log_every) or after == run.total_steps

        with clock("step"):
            grad_norm = clip_gradients(parameters, config.clip_grad_norm)
            watch.refuse_non_finite(grad_norm, losses)
            if log_due or state.step == saved_step:
                watch.look(getattr(run.task, "features", {}))
            backward.supply_curvature(state.step)
            optimizer.step()
            run.task.after_step()
            if state.ema is not None:
                state.ema.update(state.model)

        state.step = after
        state.samples_seen += taken * config.batch_size
        due = state.step == run.total_steps or is_checkpoint_due(config, state.step, time.monotonic() - saved_at, taken)
        with clock("sync"):
            wanted = _asked(run.should_save)  # asked equally often on every rank, so not only where nothing else is due
            stop, due = sync.agree([_asked(run.should_stop), due or wanted], run.world, run.device)
        if log_due or stop:
            extra = {
                "lr": lr,
                "grad_norm": grad_norm,
                **backward.figures(),
                **({} if run.growth is None else {"batch_size": taken * config.batch_size}),
                **(watch.figures if log_due else {}),
                **_validated(run, state.step, taken),
            }
            record = log_step(run, state, state.step - logged_step, losses, extra)
            logged_step = state.step
        if due or stop:
            with clock("checkpoint"):
                if config.keep_best is not None and (state.step == run.total_steps or is_due_by_steps(config, state.step, taken)):
                    best.compete(state.best, state.step, config.keep_best)
                if run.rank == 0 or shared:
                    run.checkpoints.save(state, later=config.checkpoint_async, write=run.rank == 0)
                saved_at, saved_step = time.monotonic(), state.step
    return record


def _set_lr(run: Run, state: TrainState) -> float:
    """Sets the learning rates of the next update; that of a group without a scale of its own."""
    lr = run.schedule(state.step) * (1.0 if run.growth is None else run.growth.lr_factor(state))
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def _asked(question: Callable[[], bool] | None) -> bool:
    return question is not None and question()


def _validated(run: Run, step: int, taken: int) -> Record:
    """The loss of the validation pairs, where it is due."""
    every = run.config.validate_every_steps
    if run.validation is None or every is None or not (passes(step, taken, every) or step == run.total_steps):
        return {}
    with run.clock("step"):
        return {best.VALIDATION: run.validation.loss()}


def clip_gradients(parameters: list[Tensor], max_norm: float | None) -> float:
    """The L2 norm of all gradients together, before they are scaled down to `max_norm` where it is exceeded."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = sharding.total_norm(gradients)
    if max_norm is not None:
        sharding.scale_down(parameters, max_norm, norm)
    return float(norm)


def next_tensors(run: Run, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """The tensors of the next batch, on the run's device."""
    with run.clock("data_wait"):
        batch = next(batches)
        tensors = {name: tensor.to(run.device) for name, tensor in batch.tensors.items()}
    run.clock.add("read", batch.read_s)
    run.clock.add("decode", batch.decode_s)
    return tensors


def passes(step: int, taken: int, every: int) -> bool:
    """Whether one of the `taken` steps up to `step` was a multiple of `every`."""
    return step // every > (step - taken) // every


def is_checkpoint_due(config: TrainConfig, step: int, since_s: float, taken: int = 1) -> bool:
    """Whether enough steps or seconds have passed since the last checkpoint."""
    return is_due_by_steps(config, step, taken) or since_s >= config.checkpoint_every_s


def is_due_by_steps(config: TrainConfig, step: int, taken: int = 1) -> bool:
    """Whether the checkpoint of this step is one that every run of these settings writes."""
    return config.checkpoint_every_steps is not None and passes(step, taken, config.checkpoint_every_steps)


def log_step(run: Run, state: TrainState, steps: int, losses: Mapping[str, Tensor], extra: Record) -> Record:
    """Averages the losses over the ranks and, on rank 0, appends a record. Times are means over the last `steps` steps."""
    means = sync.mean([float(value.detach()) for value in losses.values()], run.world, run.device)
    spent = run.clock.window()
    wall_s = sum(spent[activity] for activity in ("data_wait", "step", "sync", "checkpoint"))
    logit_scale = getattr(state.model, "logit_scale", None)
    record = {
        "step": state.step,
        "steps": run.total_steps,
        "epoch": state.step / run.loader.steps_per_epoch,
        "samples_seen": state.samples_seen,
        **dict(zip(losses, means, strict=True)),
        **extra,
        **({"logit_scale": float(logit_scale.detach().exp())} if logit_scale is not None else {}),
        **{f"{activity}_s": spent[activity] / steps for activity in ("data_wait", "read", "decode", "step", "sync")},
        "samples_per_s": steps * run.config.batch_size / wall_s,
    }
    if run.config.keep_best is not None:
        best.follow(state.best, record, run.config.keep_best)
    if run.rank == 0:
        with run.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if run.on_log is not None:
            run.on_log(record)
    return record


def truncate_log(run: Run, step: int) -> Record:
    """Drops the records of steps after `step`, which a run that was killed had made since its last checkpoint, and a torn last line.

    Gives the last record that stays; empty where there is none.
    """
    if run.rank != 0 or not run.log.exists():
        return {}
    lines = [line for line in run.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    partial = run.log.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(run.log)
    return dict(json.loads(kept[-1])) if kept else {}
