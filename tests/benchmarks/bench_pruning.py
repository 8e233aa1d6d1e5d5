"""ViT-B/32 with random weights pruned to 50 % by each method: seconds, peak memory beside the model's own size, and how fast the cut model is.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_pruning.py [--pairs N] [--batch N] [--only METHOD …]

Each method runs in a process of its own. Memory is the process's resident peak while it compresses, above what the process held before
the model was built; it includes the model, its masks and the calibration pairs. The peer is one copy of the model, the target twice that.
Outputs are checked: every pruned matrix has its share of zeros, or the blocks their share of weights, and features are finite.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.core import catalogue
from diptych.models import clip

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "gblm": {"method": "gblm", "sparsity": 0.5},
    "wanda-2:4": {"method": "wanda", "pattern": "2:4"},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "flap": {"method": "flap", "ratio": 0.5},
    "dimap": {"method": "dimap", "ratio": 0.5},
    "rd-prune": {"method": "rd-prune", "sparsity": 0.5, "levels": 4},
    "ap": {"method": "ap", "percent": 29.29, "ap_percent": 2.9, "rounds": 2, "steps": 2, "calibration_batch": 16},
    "perp-reconstruct": {"method": "perp", "mode": "reconstruct", "sparsity": 0.5, "steps": 4, "rank": 4},
}
MEMORY_TARGET, SPEED_TARGET = 2.0, 1.3
TRAINING = {"ap": 5.0, "perp-reconstruct": 5.0}
"""Methods that train on the way, and their targets: the model, its gradients, two moments and what is kept to rewind to."""
FEWER = {"rd-prune": 16}
"""Pairs of a method that passes over them once a matrix and level."""
UNEVEN = ("dimap", "rd-prune", "ap")
"""Methods that share the budget out over the matrices."""
PAIRS, BATCH, SPEED_BATCH = 64, 16, 64


def memory_kb(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def calibration(model: clip.DualEncoder, pairs: int, batch: int) -> list[dict[str, Tensor]]:
    """Random pictures, and captions of 5 to 19 tokens."""
    generator = torch.Generator().manual_seed(0)
    words = ["cat", "dog", "house", "tree", "red", "blue", "car", "photo"]
    texts = [" ".join(words[(i * k) % len(words)] for k in range(3 + i % 15)) for i in range(pairs)]
    return [
        {
            "image_NCHW": torch.randint(0, 256, (batch, 3, model.image_size, model.image_size), generator=generator, dtype=torch.uint8),
            "text_NL": torch.from_numpy(model.tokenizer.encode_cut(texts[start : start + batch])),
        }
        for start in range(0, pairs, batch)
    ]


def one(name: str, pairs: int, batch: int) -> dict[str, Any]:
    """Compresses a fresh model by a method."""
    torch.set_num_threads(1)
    plain = METHODS[name]
    config = catalogue.config_class(catalogue.find(plain["method"], "compress")).parse(plain)
    tiny = clip.create("digits-16", 0).eval()
    config.build().compress(tiny, calibration(tiny, batch, batch))  # type: ignore[attr-defined] # whatever is imported late, is now
    del tiny
    before_kb = memory_kb("VmRSS")
    model = clip.create("ViT-B-32", 0).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    batches = calibration(model, pairs, batch)
    dense_ms = latency_ms(model) if plain["method"] == "flap" else 0.0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    compressor = config.build()  # type: ignore[attr-defined]
    compressor.compress(model, batches)
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    figures |= {"peak_mb": (memory_kb("VmHWM") - before_kb) / 1024, "model_mb": size / 2**20}
    check(plain, model, compressor.report(model))
    return figures | ({"dense_ms": dense_ms, "cut_ms": latency_ms(model)} if dense_ms else {})


def check(plain: dict[str, Any], model: clip.DualEncoder, report: dict[str, Any]) -> None:
    """Stops the benchmark where a method did not do what it is measured at."""
    if "kept_share" in report:
        assert all(abs(share - 0.5) < 0.02 for share in report["kept_share"].values()), report["kept_share"]
    else:
        shares = [share for share in report["matrices"].values() if share > 0]
        if plain["method"] in UNEVEN:
            assert 0.4 < report["overall"] < 0.51, report["overall"]
        else:
            assert len(shares) >= 96
            assert all(abs(share - 0.5) < 0.01 for share in shares), (plain, shares)
    with torch.no_grad():
        assert torch.isfinite(model.encode_image(torch.zeros(1, 3, 224, 224))).all()


@torch.no_grad()
def latency_ms(model: clip.DualEncoder, rounds: int = 3) -> float:
    """The best CPU time of the image tower on a batch."""
    image_NCHW, times = torch.zeros(SPEED_BATCH, 3, 224, 224), []
    for _ in range(rounds):
        started = time.process_time()
        model.encode_image(image_NCHW)
        times.append(1000 * (time.process_time() - started))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--inside", choices=list(METHODS), help="run one method in this process and print its figures as JSON")
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(one(options.inside, options.pairs, options.batch)))
        return
    for name in options.only:
        pairs = min(options.pairs, FEWER.get(name, options.pairs))
        command = [sys.executable, __file__, "--inside", name, "--pairs", str(pairs), "--batch", str(options.batch)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        peak, size = found["peak_mb"], found["model_mb"]
        print(
            f"BENCH prune-{name}: ours {peak:.0f} MB, peer {size:.0f} MB, ratio {peak / size:.2f}, target <= {TRAINING.get(name, MEMORY_TARGET):g}"
            f" ({found['cpu_s']:.1f} CPU s, {found['wall_s']:.1f} s wall; {pairs} pairs)",
            flush=True,
        )
        if "cut_ms" in found:
            ours, peer = found["cut_ms"], found["dense_ms"]
            print(
                f"BENCH flap-speed: ours {ours:.0f} ms, peer {peer:.0f} ms, ratio {peer / ours:.2f}, target >= {SPEED_TARGET} (image tower, batch {SPEED_BATCH}, half of the blocks' weights)"
            )


if __name__ == "__main__":
    main()
