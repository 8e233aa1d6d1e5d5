"""What the platform costs a training step: the real loop beside a bare one with the same model, loss, optimizer and batches.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step_overhead.py [--model vit-nano-64] [--batch 256] [--steps 10] [--workers 2]

The bare loop is what one would write by hand: encode, compare, backward, update, clamp. Ours also names its draws, follows the schedule,
clocks itself, looks at the embeddings and writes its log, at the default intervals. Losses of both are equal to the bit. The second line is
the wall time of one process beside two gloo processes that share the batch; it needs as many idle cores, and its remark says where the two
spend their time.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from diptych.models import clip
from diptych.models.tokenizer import EOT, SOT
from diptych.objectives.clip import Clip, clamp_logit_scale
from diptych.optimizers.adamw import Config as AdamW
from diptych.train import sync
from diptych.train.checkpoint import Checkpoints, TrainState
from diptych.train.config import TrainConfig
from diptych.train.contrastive import Contrastive
from diptych.train.loader import Batch
from diptych.train.loop import Run, fit
from diptych.train.run import fixed_arithmetic, parameter_groups

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

ROUNDS, LR = 5, 1e-3
OVERHEAD, SPEEDUP = 1.02, 1.7


def synthetic(model: clip.DualEncoder, pairs: int) -> dict[str, Tensor]:
    """A batch of noise pictures and captions of 16 tokens."""
    rng = np.random.default_rng(0)
    text_NL = rng.integers(300, 40_000, (pairs, 16))
    text_NL[:, 0], text_NL[:, -1] = SOT, EOT
    size = model.image_size
    return {
        "image_NCHW": torch.from_numpy(rng.integers(0, 256, (pairs, 3, size, size), dtype=np.uint8)),
        "text_NL": torch.from_numpy(text_NL),
    }


class Repeated:
    """Our loader's face on one batch in memory."""

    steps_per_epoch = 1 << 30

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The same batch each time."""
        yield from (Batch(self.batch, 0.0, 0.0) for _ in range(start, stop))


class NoCheckpoints(Checkpoints):
    """Their cost is that of a disk."""

    def save(self, state: TrainState, *, later: bool = False, write: bool = True) -> Path:
        del state, later, write
        return self.folder


def trained(model: clip.DualEncoder, batch: dict[str, Tensor], steps: int, rank: int = 0, world: int = 1) -> tuple[list[float], Run]:
    """The losses of `steps` updates of the real loop, and the run with its clock."""
    config = TrainConfig.parse({"steps": steps, "batch_size": world * len(batch["text_NL"]), "schedule": {"kind": "constant", "warmup": 0}})
    objective, losses = Clip(), []
    optimizer = AdamW(lr=LR).build(parameter_groups(model.named_parameters()))
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    objective.register_forward_hook(lambda _module, _args, output: losses.append(output["loss"].detach()))
    loader: Any = Repeated(batch)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            Contrastive(model, objective), loader, config.schedule.build(LR, steps), config, steps, 0, Path(folder) / "steps.jsonl",
            NoCheckpoints(Path(folder), {}), rank=rank, world=world,
        )  # fmt: skip
        fit(run, TrainState(model, objective, optimizer))
    return [float(loss) for loss in losses], run


def bare(model: clip.DualEncoder, batch: dict[str, Tensor], steps: int) -> list[float]:
    """The same updates by hand."""
    objective, losses = Clip(), []
    optimizer = AdamW(lr=LR).build(parameter_groups(model.named_parameters()))
    task = Contrastive(model, objective)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        parts = task.losses(batch, 0)
        torch.autograd.backward(parts["loss"])
        optimizer.step()
        clamp_logit_scale(model.logit_scale)
        losses.append(parts["loss"].detach())
    return [float(loss) for loss in losses]


def on_a_rank(rank: int, world: int, name: str, pairs: int, steps: int) -> tuple[float, dict[str, float]]:
    """(wall seconds, seconds by activity) of one process's share of the batch, after an update to warm up."""
    model = clip.create(name, 0).train()
    batch = {key: tensor.chunk(world)[rank] for key, tensor in synthetic(model, pairs).items()}
    with fixed_arithmetic(1):
        trained(copy.deepcopy(model), batch, 1, rank, world)
        sync.agree([True], world, "cpu")
        started = time.perf_counter()
        _, run = trained(model, batch, steps, rank, world)
        return time.perf_counter() - started, dict(run.clock.total_s)


def overhead(name: str, pairs: int, steps: int) -> None:
    """CPU time of both loops, in turn, best of the rounds."""
    start = clip.create(name, 0).train()
    batch, best = synthetic(start, pairs), {"ours": float("inf"), "peer": float("inf")}
    losses: dict[str, list[float]] = {}
    with fixed_arithmetic(1):
        for _ in range(ROUNDS):
            for side in ("ours", "peer"):
                model = copy.deepcopy(start)
                started = time.process_time()
                losses[side] = trained(model, batch, steps)[0] if side == "ours" else bare(model, batch, steps)
                best[side] = min(best[side], time.process_time() - started)
    assert losses["ours"] == losses["peer"], f"other losses: {losses}"
    ours_ms, peer_ms = (1e3 * best[side] / steps for side in ("ours", "peer"))
    print(
        f"BENCH step overhead: ours {ours_ms:.1f} CPU ms, peer {peer_ms:.1f} CPU ms, ratio {ours_ms / peer_ms:.3f}, target <= {OVERHEAD}"
        f" ({name}, batch {pairs}, log every 10 steps; same losses to the bit, {losses['ours'][-1]:.4f} at the end)"
    )


def workers(name: str, pairs: int, steps: int, count: int) -> None:
    """Wall time of one process and of several on the same global batch."""
    from _ranks import run_ranks

    alone, _ = run_ranks(1, on_a_rank, name, pairs, steps, timeout_s=900)[0]
    several = run_ranks(count, on_a_rank, name, pairs, steps, timeout_s=900)
    together = max(wall for wall, _ in several)
    spent = several[0][1]
    shares = ", ".join(f"{activity} {spent[activity] / together:.0%}" for activity in ("data_wait", "step", "sync") if activity in spent)
    print(
        f"BENCH {count} workers: ours {steps * pairs / together:.1f} pictures/s, peer {steps * pairs / alone:.1f} pictures/s,"
        f" ratio {alone / together:.2f}, target {SPEEDUP} ({name}, batch {pairs}, gloo; wall time, load {os.getloadavg()[0]:.1f}"
        f" on {len(os.sched_getaffinity(0))} cores; {shares} of it on rank 0)"
    )


def main() -> None:
    """Prints two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-nano-64")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="0: only the first line")
    options = parser.parse_args()
    overhead(options.model, options.batch, options.steps)
    if options.workers:
        workers(options.model, options.batch, options.steps, options.workers)


if __name__ == "__main__":
    main()
