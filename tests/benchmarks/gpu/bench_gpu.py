"""The training step on one GPU, without Ray: samples per second, model FLOPs used, peak memory, beside a bare loop over open_clip.

    python tests/benchmarks/gpu/bench_gpu.py                       # everything, minutes on a data centre's card
    python tests/benchmarks/gpu/bench_gpu.py --only step --models ViT-B-32 --batches 1024
    python tests/benchmarks/gpu/bench_gpu.py --tiny                # the same code in a minute on any processor; figures mean nothing

Three parts. `step`: whole updates in bf16 with compiled towers on synthetic pictures and captions of 77 tokens; ours is the real loop from
uint8 pictures in host memory, the peer a bare loop with open_clip's model and `ClipLoss` from normalised pictures that lie on the
card. `loss`: the contrastive loss alone, chunked and plain, at the global batches that one card then has to compare. `optimizer`: AdamW's
update fused, foreach and compiled, and AdamP's, on 300 million parameters. Where the peer runs out of memory its figure is `out of memory`.
MFU counts the matrix products of forward and backward, as torch's FLOP counter finds them, against the card's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diptych.models import clip
from diptych.models.preprocess import normalize as normalize_pixels
from diptych.models.tokenizer import EOT, SOT
from diptych.objectives.clip import Clip, chunked_clip_loss
from diptych.optimizers.adamp import Config as AdamP
from diptych.optimizers.adamw import Config as AdamW
from diptych.train import towers
from diptych.train.checkpoint import Checkpoints, TrainState
from diptych.train.config import TrainConfig
from diptych.train.contrastive import Contrastive
from diptych.train.loader import Batch
from diptych.train.loop import Run, fit
from diptych.train.run import parameter_groups

PEAK_TFLOPS = {"H200": 989, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121}
"""Dense bf16, from the vendor's data sheets, by a part of the card's name."""
PARTS = ("step", "loss", "optimizer")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Place:
    """Where things are measured."""

    device: str
    peak_tflops: float | None

    def wait(self) -> None:
        """Until the card has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Frees what earlier measurements left, and starts the memory's high-water mark anew."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """The high-water mark since `clear`; 0 without a card."""
        return int(torch.cuda.max_memory_allocated()) if self.device == "cuda" else 0


@dataclass(frozen=True)
class Measured:
    """Seconds of one repetition, and the peak of memory."""

    s: float
    peak_bytes: int


def measure(place: Place, work: Callable[[int], Any], warm_up: int, repeats: int) -> Measured | None:
    """The mean time of a repetition of `work(repeats)` after `work(warm_up)`; None where memory did not suffice."""
    place.clear()
    try:
        work(warm_up)
        place.wait()
        started = time.perf_counter()
        work(repeats)
        place.wait()
    except torch.OutOfMemoryError:
        return None
    return Measured((time.perf_counter() - started) / repeats, place.peak_bytes())


def synthetic(pairs: int, size: int, context: int) -> dict[str, Tensor]:
    """A batch of noise with captions that fill the context."""
    draws = torch.Generator().manual_seed(0)
    text_NL = torch.randint(300, 40_000, (pairs, context), generator=draws)
    text_NL[:, 0], text_NL[:, -1] = SOT, EOT
    return {"image_NCHW": torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=draws), "text_NL": text_NL}


class Repeated:
    """Our loader's face on one batch in pinned memory."""

    def __init__(self, batch: dict[str, Tensor], pinned: bool) -> None:
        self.batch = {name: tensor.pin_memory() if pinned else tensor for name, tensor in batch.items()}
        self.steps_per_epoch = 1 << 30

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The same batch each time."""
        yield from (Batch(self.batch, 0.0, 0.0) for _ in range(start, stop))


class NoCheckpoints(Checkpoints):
    """The peer writes none either."""

    def save(self, state: TrainState, *, later: bool = False, write: bool = True) -> Path:
        del state, later, write
        return self.folder


def our_steps(name: str, batch: dict[str, Tensor], place: Place, compile: bool, chunk: int | None, folder: Path) -> Callable[[int], Any]:
    """Gives what makes n more updates through the real loop."""
    config = TrainConfig.parse({"steps": 1 << 20, "batch_size": len(batch["text_NL"]), "precision": "bf16", "log_every": 10})
    model, objective = clip.create(name, 0).to(place.device).train(), Clip(chunk=chunk)
    optimizer = AdamW(lr=1e-4).build(parameter_groups(model.named_parameters()))
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    if compile:
        towers.compiled(model, place.device)
    state, task = TrainState(model, objective, optimizer), Contrastive(model, objective, 1, config.precision)
    loader: Any = Repeated(batch, pinned=place.device == "cuda")

    def steps(count: int) -> None:
        total = state.step + count
        fit(
            Run(task, loader, lambda _: 1e-4, config, total, 0, folder / "steps.jsonl", NoCheckpoints(folder, {}), device=place.device),
            state,
        )

    return steps


def peer_steps(name: str, batch: dict[str, Tensor], place: Place, compile: bool) -> Callable[[int], Any]:
    """Gives what makes n updates of open_clip's model and loss in a bare loop."""
    from open_clip.loss import ClipLoss

    dual = clip.create(name, 0).to(place.device)
    pixels = normalize_pixels(batch["image_NCHW"].to(place.device), dual.mean, dual.std)
    text_NL, model, loss = batch["text_NL"].to(place.device), dual.clip.train(), ClipLoss()
    optimizer = AdamW(lr=1e-4).build(parameter_groups(model.named_parameters()))
    if compile:
        model.visual.compile()
        model.transformer.compile()

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(place.device, dtype=torch.bfloat16):
                image_ND, text_ND = model.encode_image(pixels, normalize=True), model.encode_text(text_NL, normalize=True)
            torch.autograd.backward(loss(image_ND.float(), text_ND.float(), model.logit_scale.exp()))
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)

    return steps


def flops(name: str, batch: dict[str, Tensor], place: Place) -> float:
    """Floating-point operations of one forward and backward, scaled up from a few pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    model, pairs = clip.create(name, 0).to(place.device), min(8, len(batch["text_NL"]))
    counter = FlopCounterMode(display=False)
    with counter:
        image_ND = model.encode_image(batch["image_NCHW"][:pairs].to(place.device))
        (image_ND * model.encode_text(batch["text_NL"][:pairs].to(place.device))).sum().backward()
    return float(counter.get_total_flops()) / pairs * len(batch["text_NL"])


def line(name: str, ours: str, peer: str, ratio: float, bound: str, about: str) -> None:
    """One figure, as `run.py` reads it."""
    print(f"BENCH gpu {name}: ours {ours}, peer {peer}, ratio {ratio:.3f}, target {bound} ({about})", flush=True)


def bench_step(options: argparse.Namespace, place: Place) -> None:
    """Whole updates of each model at each batch size."""
    for name in options.models:
        model = clip.create(name, 0)
        size, context = model.image_size, model.context_length
        del model
        for pairs in options.batches:
            batch = synthetic(pairs, size, context)
            with tempfile.TemporaryDirectory() as folder:
                ours = measure(
                    place, our_steps(name, batch, place, options.compile, options.chunk, Path(folder)), options.warm_up, options.repeats
                )
            peer = measure(place, peer_steps(name, batch, place, options.compile), options.warm_up, options.repeats)
            if ours is None:
                print(f"gpu step {name} at {pairs:,}: {OUT_OF_MEMORY} on our side", flush=True)
                continue
            about = f"bf16, {'compiled' if options.compile else 'eager'}, {pairs:,} pictures of {size} px, {options.chunk or 'all'} rows of logits at once"
            if place.peak_tflops:
                about += f"; MFU {flops(name, batch, place) / ours.s / place.peak_tflops / 1e12:.1%}"
            theirs = OUT_OF_MEMORY if peer is None else f"{pairs / peer.s:,.0f}/s"
            line(
                f"step {name} at {pairs:,}",
                f"{pairs / ours.s:,.0f}/s",
                theirs,
                float("inf") if peer is None else peer.s / ours.s,
                ">= 0.98",
                about,
            )
            if ours.peak_bytes and peer is not None:
                left, right = ours.peak_bytes / 2**30, peer.peak_bytes / 2**30
                line(f"memory {name} at {pairs:,}", f"{left:.2f} GiB", f"{right:.2f} GiB", left / right, "<= 1.0", about)


def bench_loss(options: argparse.Namespace, place: Place) -> None:
    """The contrastive loss with its gradients, chunked and plain."""
    from open_clip.loss import ClipLoss

    for pairs in options.loss_batches:
        draws = torch.Generator().manual_seed(0)
        features = [
            normalize(torch.randn(pairs, options.width, generator=draws), dim=1).to(place.device).requires_grad_() for _ in range(2)
        ]
        scale, plain = torch.tensor(20.0, device=place.device, requires_grad=True), ClipLoss()

        def chunked(count: int, features: list[Tensor] = features, scale: Tensor = scale) -> None:
            for _ in range(count):
                torch.autograd.grad(chunked_clip_loss(features[0], features[1], scale, options.loss_chunk)[0], [*features, scale])

        def whole(count: int, features: list[Tensor] = features, scale: Tensor = scale, plain: nn.Module = plain) -> None:
            for _ in range(count):
                torch.autograd.grad(plain(features[0], features[1], scale), [*features, scale])

        ours = measure(place, chunked, 1, options.repeats)
        peer = measure(place, whole, 1, options.repeats)
        assert ours is not None, f"the chunked loss does not fit at {pairs:,}"
        about = f"float32, {pairs:,} x {options.width}, {options.loss_chunk} rows at once"
        theirs = OUT_OF_MEMORY if peer is None else f"{peer.s * 1e3:.1f} ms"
        line(f"loss at {pairs:,}", f"{ours.s * 1e3:.1f} ms", theirs, 0.0 if peer is None else ours.s / peer.s, "<= 1.3", about)
        if ours.peak_bytes and peer is not None:
            left, right = ours.peak_bytes / 2**30, peer.peak_bytes / 2**30
            line(f"loss memory at {pairs:,}", f"{left:.2f} GiB", f"{right:.2f} GiB", left / right, "<= 0.25", about)


def bench_optimizer(options: argparse.Namespace, place: Place) -> None:
    """Updates of AdamW in torch's ways, and of ours, on many parameters."""
    side = 2048 if options.parameters >= 1 << 24 else 128
    count = max(1, options.parameters // (side * side))

    def weights() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(side, side, device=place.device)) for _ in range(count)]
        for each in made:
            each.grad = torch.full_like(each, 1e-3)
        return made

    def compiled() -> Callable[[int], Any]:
        optimizer = torch.optim.AdamW(weights(), lr=torch.tensor(1e-3), foreach=True, capturable=place.device == "cuda")
        step = torch.compile(optimizer.step)
        return lambda repeats: [step() for _ in range(repeats)]

    def plain(optimizer: torch.optim.Optimizer) -> Callable[[int], Any]:
        return lambda repeats: [optimizer.step() for _ in range(repeats)]

    ways: dict[str, Callable[[], Callable[[int], Any]]] = {
        "foreach": lambda: plain(torch.optim.AdamW(weights(), lr=1e-3, foreach=True)),
        "fused": lambda: plain(torch.optim.AdamW(weights(), lr=1e-3, fused=True)),
        "adamw of ours": lambda: plain(AdamW(lr=1e-3).build([{"params": weights()}])),
        "adamp of ours": lambda: plain(AdamP(lr=1e-3).build([{"params": weights()}])),
        **({"compiled": compiled} if options.compile else {}),
    }
    found = {name: measure(place, make(), 3, options.repeats) for name, make in ways.items()}
    peer = found["foreach"]
    assert peer is not None, "not even the foreach update fits"
    for name, ours in found.items():
        if ours is not None and name != "foreach":
            about = f"{count * side * side / 1e6:,.0f}M parameters; the peer is torch's AdamW with foreach"
            line(f"optimizer {name}", f"{ours.s * 1e3:.2f} ms", f"{peer.s * 1e3:.2f} ms", ours.s / peer.s, "<= 1.0", about)


def parsed() -> argparse.Namespace:
    """The command line; `--tiny` replaces what was not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds on any processor: does the script work?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", help="default: ViT-B-32 ViT-B-16")
    parser.add_argument("--batches", nargs="+", type=int, help="pairs of an update; default: 1024 2048 4096")
    parser.add_argument("--loss-batches", nargs="+", type=int, help="default: 32768 65536")
    parser.add_argument("--loss-chunk", type=int, help="default: 2048")
    parser.add_argument("--chunk", type=int, default=None, help="rows of logits at once in the step; default: all")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--parameters", type=int, help="default: 300 million")
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the card, where its name is not known here")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    options = parser.parse_args()
    full = {"models": ["ViT-B-32", "ViT-B-16"], "batches": [1024, 2048, 4096], "loss_batches": [32768, 65536], "loss_chunk": 2048,
            "parameters": 300_000_000, "warm_up": 5, "repeats": 20, "compile": True}  # fmt: skip
    tiny = {"models": ["vit-micro-40"], "batches": [16], "loss_batches": [128], "loss_chunk": 32, "parameters": 1 << 16, "warm_up": 1,
            "repeats": 2, "compile": False}  # fmt: skip
    for name, value in (tiny if options.tiny else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny tries the script without one")
    return options


def main() -> None:
    """Runs the parts that were asked for."""
    options = parsed()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "no card"
    known = next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)
    place = Place(device, options.peak_tflops or (known and float(known)))
    torch.backends.cuda.matmul.allow_tf32 = True
    print(f"{card}, torch {torch.__version__}", flush=True)
    for part, work in (("step", bench_step), ("loss", bench_loss), ("optimizer", bench_optimizer)):
        if part in options.only:
            work(options, place)


if __name__ == "__main__":
    main()
