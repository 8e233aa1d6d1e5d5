"""Trains the tiny encoder through the real loop: `python fit_tiny.py SCRATCH [KILL_AFTER_STEPS]`, also used in process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import TinyEncoder, TinyLoss, drawings

from diptych.train.checkpoint import Checkpoints, TrainState
from diptych.train.config import TrainConfig
from diptych.train.contrastive import Contrastive
from diptych.train.ema import Ema
from diptych.train.loader import PairLoader
from diptych.train.loop import Record, Run, fit
from diptych.train.run import parameter_groups

SETTINGS = {
    "epochs": 4,
    "batch_size": 12,
    "accumulate": 2,
    "ema": 0.9,
    "clip_grad_norm": 1.0,
    "log_every": 3,
    "checkpoint_every_s": 1e6,
    "checkpoint_every_steps": 2,
    "augment": {"flip": True, "crop_scale": [0.5, 1.0], "brightness": 0.2},
}
STEPS = 12


def start(
    scratch: Path,
    build_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    build_objective: Callable[[], torch.nn.Module] = TinyLoss,
    **settings: object,
) -> tuple[Run, TrainState]:
    """A run over 40 drawings (three batches an epoch), continued from the newest checkpoint."""
    torch.set_num_threads(1)
    config = TrainConfig.parse({**SETTINGS, **settings})
    frame, reader = drawings(40)
    model, objective = TinyEncoder(), build_objective()
    groups = parameter_groups([*model.named_parameters(), *((f"objective.{name}", value) for name, value in objective.named_parameters())])
    optimizer = build_optimizer(groups, lr=0.01)
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    state = TrainState(model, objective, optimizer, Ema(model, config.ema) if config.ema else None)
    loader = PairLoader(frame, reader, model.tokenizer, model.image_size, config, seed=0)
    checkpoints = Checkpoints(scratch / "checkpoints", {"test": "tiny"})
    if (latest := checkpoints.latest()) is not None:
        checkpoints.restore(latest, state)
    total = config.total_steps(loader.steps_per_epoch)
    task = Contrastive(model, objective, config.accumulate, config.precision)
    scratch.mkdir(parents=True, exist_ok=True)
    run = Run(task, loader, config.schedule.build(0.01, total), config, total, 0, scratch / "steps.jsonl", checkpoints)
    return run, state


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    found = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    found |= {f"objective.{name}": value.detach().clone() for name, value in state.objective.named_parameters()}
    if state.ema is not None:
        found |= {f"ema.{name}": value.clone() for name, value in state.ema.model.named_parameters()}
    return found


def main() -> None:
    run, state = start(Path(sys.argv[1]))
    kill_after = int(sys.argv[2]) if len(sys.argv) > 2 else None

    def killed() -> bool:
        if state.step == kill_after:
            run.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    run.should_stop = killed
    fit(run, state)
    torch.save(weights(state), Path(sys.argv[1]) / "weights.pt")


__all__ = ["STEPS", "Record", "fit", "start", "weights"]

if __name__ == "__main__":
    main()
