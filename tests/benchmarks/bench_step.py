"""CPU time of a training step beside open_clip_train's `train_one_epoch`: the same model, weights, pictures and captions.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py [--cases small nano-16 …]

Three models: a small tower of patch 32 at batch 64, whose captions have 12 to 20 tokens, mean 16; and, at batch 256, `vit-nano-64` and
`vit-small-32-224` (a ViT-S/32), each with captions of 16 tokens and with captions that fill the context of 77. The data lie in memory on both sides, so that only the loops are compared: the peer gets
normalised floats and 77 ids, as its loader delivers them, ours uint8 and captions cut to the longest of the batch.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.models.clip import DualEncoder, build, create
from diptych.models.tokenizer import EOT, SOT
from diptych.objectives.clip import Clip
from diptych.optimizers.adamw import Config as AdamW
from diptych.train.checkpoint import Checkpoints, TrainState
from diptych.train.config import TrainConfig
from diptych.train.contrastive import Contrastive
from diptych.train.loader import Batch
from diptych.train.loop import Run, fit
from diptych.train.run import fixed_arithmetic, parameter_groups

LR, WARMUP = 1e-3, 2
SMALL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 4, "width": 128, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}


@dataclass(frozen=True)
class Case:
    """A model and its batches; captions have from `shortest` to `longest` tokens."""

    model: str
    batch: int
    steps: int
    rounds: int
    shortest: int
    longest: int
    target: float

    def build(self) -> DualEncoder:
        """The model with its first weights."""
        return build(SMALL) if self.model == "small" else create(self.model, 0)


CASES = {
    "small": Case("small", 64, 4, 5, 12, 20, 1.5),
    "nano-16": Case("vit-nano-64", 256, 2, 3, 16, 16, 1.5),
    "nano-77": Case("vit-nano-64", 256, 2, 3, 77, 77, 1.05),
    "s32-16": Case("vit-small-32-224", 256, 1, 2, 16, 16, 1.5),
    "s32-77": Case("vit-small-32-224", 256, 1, 2, 77, 77, 1.05),
}
"""With full captions there is nothing to cut: what is left is the last blocks, which work for the token that is read alone."""


def data(case: Case, model: DualEncoder) -> list[dict[str, torch.Tensor]]:
    """Batches of noise pictures and random captions."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(case.steps):
        text_NL = np.zeros((case.batch, model.context_length), dtype=np.int64)
        for row, length in enumerate(rng.integers(case.shortest, case.longest + 1, case.batch)):
            text_NL[row, :length] = [SOT, *rng.integers(300, 40_000, length - 2), EOT]
        image_NCHW = rng.integers(0, 256, (case.batch, 3, model.image_size, model.image_size), dtype=np.uint8)
        batches.append({"image_NCHW": torch.from_numpy(image_NCHW), "text_NL": torch.from_numpy(text_NL)})
    return batches


class NoCheckpoints(Checkpoints):
    """The peer's loop writes none either."""

    def save(self, state: TrainState, *, later: bool = False, write: bool = True) -> Path:
        del state, later, write
        return self.folder


class Memory:
    """Our loader's face on batches in memory."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.steps_per_epoch = len(batches)
        self.ready = []
        for batch in batches:
            used = int((batch["text_NL"] != 0).sum(dim=1).max())
            self.ready.append({**batch, "text_NL": batch["text_NL"][:, :used].contiguous()})

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches in turn."""
        yield from (Batch(tensors, 0.0, 0.0) for tensors in self.ready[start:stop])


def ours(model: DualEncoder, batches: list[dict[str, torch.Tensor]], folder: Path) -> tuple[float, list[float]]:
    """(CPU seconds, losses) of one pass."""
    pairs, steps = len(batches[0]["text_NL"]), len(batches)
    config = TrainConfig.parse({"epochs": 1, "batch_size": pairs, "log_every": 100, "schedule": {"warmup": WARMUP}})
    objective, losses = Clip(), []
    optimizer = AdamW(lr=LR).build(parameter_groups(model.named_parameters()))
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    state = TrainState(model.train(), objective, optimizer)
    task = Contrastive(model, objective)
    objective.register_forward_hook(lambda _module, _args, output: losses.append(output["loss"].detach()))
    loader: Any = Memory(batches)
    run = Run(task, loader, config.schedule.build(LR, steps), config, steps, 0, folder / "steps.jsonl", NoCheckpoints(folder, {}))
    started = time.process_time()
    with fixed_arithmetic(1):
        fit(run, state)
    return time.process_time() - started, [float(loss) for loss in losses]


def peer(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[float]]:
    """(CPU seconds, losses) of one pass through `train_one_epoch`, set up as open_clip_train's `main` does."""
    from open_clip.loss import ClipLoss
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    loader, losses = _PeerLoader(batches), []
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    plain = [value for name, value in named if value.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))]
    decayed = [value for _, value in named if not any(value is other for other in plain)]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}], lr=LR, betas=(0.9, 0.98), eps=1e-6
    )
    loss = ClipLoss()
    loss.register_forward_hook(lambda _module, _args, output: losses.append(output["contrastive_loss"].detach()))
    args = argparse.Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, grad_clip_norm=None, horovod=False,
        batch_size=loader.num_samples // loader.num_batches, world_size=1, log_every_n_steps=100, wandb=False, rank=0, local_rank=0, log_local=False,
    )  # fmt: skip
    started = time.process_time()
    train_one_epoch(model, {"train": loader}, loss, 0, optimizer, None, cosine_lr(optimizer, LR, WARMUP, loader.num_batches), None, args)
    return time.process_time() - started, [float(value) for value in losses]


class _PeerLoader:
    """open_clip_train's `DataInfo` and its loader in one."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.num_samples, self.num_batches = sum(len(batch["text_NL"]) for batch in batches), len(batches)
        from diptych.models.preprocess import MEAN, STD, normalize

        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        self.ready = [(normalize(batch["image_NCHW"], mean, std), batch["text_NL"]) for batch in batches]

    @property
    def dataloader(self) -> _PeerLoader:
        return self

    def set_epoch(self, epoch: int) -> None:
        del epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.ready)


def compare(name: str, case: Case, folder: Path) -> None:
    """Runs both sides of a case in turn and prints one line."""
    torch.manual_seed(0)
    model = case.build()
    batches, best = data(case, model), {"ours": float("inf"), "peer": float("inf")}
    for _ in range(case.rounds):
        our_s, our_losses = ours(copy.deepcopy(model), batches, folder)
        twin: Any = copy.deepcopy(model).clip
        twin.output_dict = True
        peer_s, peer_losses = peer(twin.train(), batches)
        np.testing.assert_allclose(our_losses, peer_losses, rtol=2e-4)
        best = {"ours": min(best["ours"], our_s), "peer": min(best["peer"], peer_s)}
    our_rate, peer_rate = (case.batch * case.steps / best[side] for side in ("ours", "peer"))
    print(
        f"BENCH step {name}: ours {our_rate:.1f} samples/CPU s, peer {peer_rate:.1f} samples/CPU s, ratio {our_rate / peer_rate:.2f},"
        f" target {case.target} (batch {case.batch}, {case.shortest} to {case.longest} tokens; losses equal: {our_losses[-1]:.4f} and"
        f" {peer_losses[-1]:.4f} after {case.steps} steps)",
        flush=True,
    )


def main() -> None:
    """Prints one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            compare(name, CASES[name], Path(folder))


if __name__ == "__main__":
    main()
