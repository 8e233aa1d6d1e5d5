"""The chunked contrastive loss beside open_clip's `ClipLoss`: CPU time and peak memory of forward and backward on one process.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_chunked_loss.py [--batch 8192] [--width 512] [--chunk 256] [--rounds 3]

Each side measures itself in a process of its own, so that its peak is its own: the growth of the resident set over what the process held
with features, imports and a warm-up in place. Losses and the gradient's norm of both sides are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

MEMORY, TIME = 0.25, 1.3


def measure(side: str, batch: int, width: int, chunk: int) -> dict[str, float]:
    """CPU seconds, peak bytes above the start, loss and gradient norm of one forward and backward."""
    import torch

    from diptych.objectives.clip import chunked_clip_loss

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(batch, width, generator=generator)) for _ in range(2))
    text = torch.nn.functional.normalize(text + image)
    scale = torch.tensor(20.0, requires_grad=True)
    image.requires_grad_()
    text.requires_grad_()
    if side == "peer":
        from open_clip.loss import ClipLoss

        plain = ClipLoss()

    def loss(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return plain(left, right, scale) if side == "peer" else chunked_clip_loss(left, right, scale, chunk)[0]

    torch.autograd.grad(loss(image[:64], text[:64]), [scale])
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    started = time.process_time()
    value = loss(image, text)
    gradients = torch.autograd.grad(value, [image, text, scale])
    spent = time.process_time() - started
    return {
        "s": spent,
        "bytes": _status("VmHWM") - before,
        "loss": float(value.detach()),
        "norm": float(torch.nn.utils.get_total_norm(list(gradients))),
    }


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Runs both sides in turn and prints two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8192), ("width", 512), ("chunk", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.batch, options.width, options.chunk)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for side in ("ours", "peer"):
            command = [sys.executable, __file__, "--side", side]
            command += [f"--{name}={getattr(options, name)}" for name in ("batch", "width", "chunk")]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            best[side] = {key: min(value, best.get(side, found)[key]) for key, value in found.items()}
    ours, peer = best["ours"], best["peer"]
    for name in ("loss", "norm"):
        assert abs(ours[name] / peer[name] - 1) < 1e-4, f"another {name}: {ours[name]} and {peer[name]}"
    about = f"batch {options.batch:,} x {options.width}, {options.chunk} rows a chunk; loss {ours['loss']:.4f} on both sides"
    for name, unit, factor, target in (("bytes", "MiB", 2**-20, MEMORY), ("s", "CPU s", 1.0, TIME)):
        what = {"bytes": "peak memory", "s": "time"}[name]
        left, right = ours[name] * factor, peer[name] * factor
        print(
            f"BENCH chunked loss, {what}: ours {left:.2f} {unit}, peer {right:.2f} {unit}, ratio {left / right:.3f}, target <= {target}"
            f" ({about})"
        )


if __name__ == "__main__":
    main()
