"""CPU time of an AdamP and an SGDP step beside the authors' and beside torch's AdamW, on 22 M parameters of a ViT-like model.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_adamp.py

Two cases: no weight is scale-invariant, and every matrix is (channel view). Rounds are interleaved, the best of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import adamp
import torch
from torch import Tensor

from diptych.optimizers.adamp import SGDP, AdamP
from diptych.optimizers.projection import View

ROUNDS = 15
HYPER = {"lr": 1e-6, "weight_decay": 0.1}
TARGET_ADAMW, TARGET_AUTHORS = 1.6, 2.0

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw-foreach": lambda params: torch.optim.AdamW(params, foreach=True, **HYPER),
    "adamp-ours": lambda params: AdamP(params, **HYPER),
    "adamp-authors": lambda params: adamp.AdamP(params, **HYPER),
    "sgdp-ours": lambda params: SGDP(params, momentum=0.9, **HYPER),
    "sgdp-authors": lambda params: adamp.SGDP(params, momentum=0.9, **HYPER),
}


def shapes(width: int = 384, layers: int = 12) -> list[tuple[int, ...]]:
    """A ViT-S/16: 149 tensors, 21.9 M parameters."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors = [(3 * width,), (4 * width,), *[(width,)] * 6]
    return (block + vectors) * layers + [(width, 3, 16, 16), (197, width), (512, width), (width,), ()]


def gradient(weight: Tensor, *, invariant: bool) -> Tensor:
    """A gradient orthogonal to every row of the weight, or one with a plain radial part in every row."""
    noise = torch.randn_like(weight) * 1e-3
    if weight.ndim < 2:
        return noise
    rows, flat = weight.reshape(len(weight), -1), noise.reshape(len(weight), -1)
    radial = (rows * flat).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
    orthogonal = flat - radial * rows
    return (orthogonal if invariant else orthogonal + 0.02 * rows).reshape(weight.shape)


def measure(invariant: bool) -> dict[str, float]:
    """Best CPU seconds a step by optimizer, after checking what was projected and that ours and the authors' weights agree."""
    torch.manual_seed(0)
    initial = [torch.randn(shape) * 0.02 for shape in shapes()]
    gradients = [gradient(weight, invariant=invariant) for weight in initial]
    weights = {name: [torch.nn.Parameter(weight.clone()) for weight in initial] for name in OPTIMIZERS}
    for params in weights.values():
        for parameter, grad in zip(params, gradients, strict=True):
            parameter.grad = grad
    optimizers = {name: make(weights[name]) for name, make in OPTIMIZERS.items()}
    best = dict.fromkeys(OPTIMIZERS, float("inf"))
    for _ in range(ROUNDS):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            best[name] = min(best[name], time.process_time() - start)
    for kind in ("adamp", "sgdp"):
        views = [view for parameter, view in optimizers[f"{kind}-ours"].views.items() if parameter.ndim > 1]
        assert set(views) == {View.CHANNEL if invariant else View.NONE}, set(views)
        for ours, authors, start in zip(weights[f"{kind}-ours"], weights[f"{kind}-authors"], initial, strict=True):
            torch.testing.assert_close(ours, authors, rtol=1e-5, atol=1e-8)
            assert not torch.equal(ours, start)
    return best


def main() -> None:
    """Prints a line a case and peer; a ratio to AdamW is ours / peer (at most), one to the authors is peer / ours (at least)."""
    torch.set_num_threads(1)
    for invariant in (False, True):
        case = "every matrix projected" if invariant else "none projected"
        ms = {name: seconds * 1e3 for name, seconds in measure(invariant).items()}
        for kind in ("adamp", "sgdp"):
            ours = ms[f"{kind}-ours"]
            for peer, text, ratio in (
                ("adamw-foreach", f"<= {TARGET_ADAMW}", ours / ms["adamw-foreach"]),
                (f"{kind}-authors", f">= {TARGET_AUTHORS}", ms[f"{kind}-authors"] / ours),
            ):
                print(
                    f"BENCH {kind} step, {case}, against {peer}: ours {ours:.1f} ms, peer {ms[peer]:.1f} ms, ratio {ratio:.2f}, target {text}"
                )


if __name__ == "__main__":
    main()
