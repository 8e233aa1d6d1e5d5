"""CPU time and optimizer memory of the low-rank optimizers beside torch's AdamW, on 22 M parameters in 149 tensors.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_low_rank.py [--rounds N]

A step is one between two bases; finding all bases anew is measured on its own. Memory is the sum over the state's tensors. The authors of
GradNormLoRP need 1.92 times an AdamW(foreach) step for their weight-normalised form, and 0.51 for GaLore. Outputs are
compared where the two must agree: on a basis of all axes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diptych.optimizers import adalora, gradnormlorp
from diptych.optimizers.low_rank import LowRankAdamW

ROUNDS, RANK = 8, 8
TARGETS = {"weight-norm": 1.6, "galore": 1.0, "dora": 1.6, "adalora": 1.6}
"""Largest ratio of a step to AdamW(foreach): the bound for methods that project; for GaLore that it is no dearer than AdamW."""
STATE_TARGETS = {"weight-norm": 0.3, "galore": 0.25, "dora": 0.75, "adalora": 1.0}
"""Largest ratio of the state's bytes. Those with adapters hold the weights of the start, half of what AdamW holds, beside their moments."""


def shapes(width: int = 384, layers: int = 12) -> dict[str, tuple[int, ...]]:
    """A ViT-S/16 under open_clip's names."""
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.out_proj.weight": (width, width),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_proj.weight": (width, 4 * width),
        "attn.in_proj_bias": (3 * width,),
        "mlp.c_fc.bias": (4 * width,),
        **dict.fromkeys(("attn.out_proj.bias", "mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"), (width,)),
    }
    found: dict[str, tuple[int, ...]] = {f"resblocks.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    return found | {"positional_embedding": (197, width), "proj": (width, 512), "conv1.weight": (width, 3, 16, 16), "logit_scale": ()}


def weights() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    named = []
    for name, shape in shapes().items():
        parameter = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * 1e-3
        named.append((name, parameter))
    return named


def built(kind: str) -> torch.optim.Optimizer:
    named = weights()
    groups = [{"params": [p for _, p in named], "param_names": [name for name, _ in named]}]
    common: dict[str, Any] = {"lr": 1e-6, "rank": RANK, "update_proj_gap": 1_000_000}
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw-foreach": lambda: torch.optim.AdamW(groups, lr=1e-6, foreach=True),
        "adamw-fused": lambda: torch.optim.AdamW(groups, lr=1e-6, fused=True),
        "galore": lambda: gradnormlorp.Config(variant="galore", **common).build(groups),
        "weight-norm": lambda: gradnormlorp.Config(variant="weight-norm", **common).build(groups),
        "dora": lambda: gradnormlorp.Config(variant="dora", lr=1e-6, rank=4, lora_rank=RANK, update_proj_gap=1_000_000).build(groups),
        "adalora": lambda: planned(adalora.Config(lr=1e-6, rank=12, target_rank=RANK, mask_interval=10).build(groups)),
    }
    return makers[kind]()


def planned(optimizer: adalora.AdaLoRA) -> adalora.AdaLoRA:
    optimizer.plan(1_000_000)
    return optimizer


def seconds(step: Callable[[], object]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def state_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(state_bytes(part) for part in parts)


def agree() -> bool:
    """With every singular vector of a gradient whose vectors are the axes, GaLore's first step is AdamW's."""
    [weight, other] = [nn.Parameter(torch.zeros(6, 4)) for _ in range(2)]
    grad = torch.eye(6, 4)
    weight.grad, other.grad = grad.clone(), grad.clone()
    LowRankAdamW([weight], lr=0.1, rank=4, eps=1e-8).step()
    torch.optim.AdamW([other], lr=0.1, weight_decay=0.0, eps=1e-8).step()
    return torch.allclose(weight, other, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    if not agree():
        raise SystemExit("a full basis does not give the step without one")
    kinds = ("adamw-foreach", "adamw-fused", "galore", "weight-norm", "dora", "adalora")
    optimizers = {kind: built(kind) for kind in kinds}
    first_s = {kind: seconds(partial(optimizer.step)) for kind, optimizer in optimizers.items()}
    best_s = dict.fromkeys(kinds, float("inf"))
    for _ in range(rounds):
        for kind, optimizer in optimizers.items():
            best_s[kind] = min(best_s[kind], seconds(partial(optimizer.step)))
    peer_s, peer_bytes = best_s["adamw-foreach"], state_bytes(dict(optimizers["adamw-foreach"].state))
    for kind in kinds[1:]:
        ratio, figures = best_s[kind] / peer_s, f"{best_s[kind] * 1e3:.1f} ms"
        if kind not in TARGETS:
            print(f"{kind} step: {figures}, {ratio:.2f} of AdamW(foreach)")
            continue
        target = f"target <= {TARGETS[kind]}"
        print(f"BENCH {kind} step, against AdamW(foreach): ours {figures}, peer {peer_s * 1e3:.1f} ms, ratio {ratio:.2f}, {target}")
    for kind in kinds[2:]:
        own = state_bytes(dict(optimizers[kind].state))
        ratio, target = own / peer_bytes, f"target <= {STATE_TARGETS[kind]}"
        print(f"BENCH {kind} state, against AdamW: ours {own / 1e6:.1f} MB, peer {peer_bytes / 1e6:.1f} MB, ratio {ratio:.2f}, {target}")
    for kind in ("galore", "weight-norm", "dora"):
        print(f"{kind}, a first step, which finds all bases: {first_s[kind]:.2f} s")


if __name__ == "__main__":
    main()
