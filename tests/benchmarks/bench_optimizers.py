"""CPU time of the optimizers' steps beside torch's AdamW(foreach) and beside plain loops over the parameters, on 22 M parameters.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_optimizers.py [--rounds N] [--no-compiled]

The plain loops are the methods' formulas a tensor at a time with new intermediate results, the way their authors' programs are
written; after the rounds their weights and ours must agree. `torch.compile` of our steps is measured as well, and takes minutes to compile. Curvature is handed in: what it costs to estimate is the model's backward, not the optimizer's. Sophia is
measured for a step, and for a tenth of an estimate beside it; AdaHessian for an estimate and a step together.

AdamW(foreach) and the loops take new memory for intermediate results of any size, ours for at most a lot of a megabyte.
What that costs them depends on the C library's allocator and on what ran before: so every method has a process of its own, once as
the library comes, and once told to keep freed memory (glibc only), which leaves arithmetic and caches alone to compare. The targets were
set for the library as it comes. AdamP and SGDP have a benchmark of their own.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from diptych.optimizers.adadagrad import AdaGradNorm
from diptych.optimizers.adahessian import AdaHessian
from diptych.optimizers.diffgrad import DiffGrad
from diptych.optimizers.elementwise import Curved
from diptych.optimizers.sophia import SophiaG

ROUNDS, COMPILED_ROUNDS = 12, 8
LR, DECAY = 1e-6, 0.1
TARGET_ADAMW, TARGET_AMORTISED, TARGET_ADAHESSIAN, TARGET_LOOP, TARGET_COMPILED = 1.3, 1.15, 1.5, 1.0, 0.6
EVERY = 10
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}

Tensors = list[Tensor]


def shapes(width: int = 384, layers: int = 12) -> list[tuple[int, ...]]:
    """A ViT-S/16: 149 tensors, 21.9 M parameters."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors = [(3 * width,), (4 * width,), *[(width,)] * 6]
    return (block + vectors) * layers + [(width, 3, 16, 16), (197, width), (512, width), (width,), ()]


@dataclass
class Loop:
    """A method as one writes it down: a loop over tensors, a line a formula."""

    weights: Tensors
    state: list[dict[str, Tensor]] = field(init=False)
    t: int = 0

    def __post_init__(self) -> None:
        self.state = [{name: torch.zeros_like(w) for name in ("m", "v", "previous")} for w in self.weights]

    @torch.no_grad()
    def step(self) -> None:
        """One update from the weights' gradients."""
        self.t += 1
        for w, state in zip(self.weights, self.state, strict=True):
            assert w.grad is not None
            self.update(w, w.grad, state["m"], state["v"], state)

    def update(self, w: Tensor, g: Tensor, m: Tensor, v: Tensor, state: dict[str, Tensor]) -> None:
        """One tensor's."""
        raise NotImplementedError


class DiffGradLoop(Loop):
    """diffGrad with coupled decay."""

    def update(self, w: Tensor, g: Tensor, m: Tensor, v: Tensor, state: dict[str, Tensor]) -> None:
        g = g.add(w, alpha=DECAY)
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        friction = 1.0 / (1.0 + torch.exp(-torch.abs(state["previous"] - g)))
        state["previous"] = g.clone()
        w.addcdiv_(m * friction, v.sqrt().add_(1e-8), value=-LR * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t))


class SophiaGLoop(Loop):
    """SophiaG."""

    def update(self, w: Tensor, g: Tensor, m: Tensor, v: Tensor, state: dict[str, Tensor]) -> None:
        w.mul_(1 - LR * DECAY)
        m.mul_(0.965).add_(g, alpha=1 - 0.965)
        ratio = (m.abs() / (0.04 * v + 1e-15)).clamp(None, 1)
        w.addcmul_(m.sign(), ratio, value=-LR)

    def estimate(self, estimates: Tensors) -> None:
        """Takes in the diagonal."""
        for state, estimate in zip(self.state, estimates, strict=True):
            state["v"].mul_(0.99).add_(estimate, alpha=1 - 0.99)


class AdaHessianLoop(Loop):
    """AdaHessian; the estimate of the diagonal is averaged over kernels."""

    estimates: Tensors

    def update(self, w: Tensor, g: Tensor, m: Tensor, v: Tensor, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """An estimate and an update."""
        self.t += 1
        for w, state, estimate in zip(self.weights, self.state, self.estimates, strict=True):
            assert w.grad is not None
            d = estimate.abs()
            if d.ndim == 4:
                d = torch.mean(d, dim=[2, 3], keepdim=True).expand_as(w).clone()
            m, v = state["m"], state["v"]
            m.mul_(0.9).add_(w.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(d, d, value=1 - 0.999)
            denominator = v.sqrt() / math.sqrt(1 - 0.999**self.t) + 1e-4
            w.sub_(LR * (m / (1 - 0.9**self.t) / denominator + DECAY * w))


def timed(action: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def best_of(rounds: int, actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Best CPU seconds by name, over interleaved rounds."""
    best = dict.fromkeys(actions, math.inf)
    for _ in range(rounds):
        for name, action in actions.items():
            best[name] = min(best[name], timed(action))
    return best


class Bench:
    """Equal weights, gradients and curvature for AdamW, a method of ours and its plain loop, and what each does in a round."""

    def __init__(self, method: str) -> None:
        torch.manual_seed(0)
        self.method = method
        self.initial = [torch.randn(shape) * 0.02 for shape in shapes()]
        self.estimates = [torch.randn_like(w).square_() for w in self.initial]
        self.weights = {name: [torch.nn.Parameter(w.clone()) for w in self.initial] for name in ("adamw", "ours", "loop")}
        grads = [torch.randn_like(w) * 1e-3 for w in self.initial]
        for weights in self.weights.values():
            for w, grad in zip(weights, grads, strict=True):
                w.grad = grad
        self.adamw = torch.optim.AdamW(self.weights["adamw"], lr=LR, weight_decay=DECAY, foreach=True)
        ours, loop = METHODS[method]
        self.ours, self.loop = ours(self.weights["ours"], LR, weight_decay=DECAY), loop(self.weights["loop"])

    def estimate(self) -> None:
        """Hands ours its curvature."""
        assert isinstance(self.ours, Curved)
        self.ours.update_curvature(dict(zip(self.weights["ours"], self.estimates, strict=True)))

    def step(self) -> None:
        """A step of ours, with an estimate before it if there is one a step."""
        if self.method == "adahessian":
            self.estimate()
        self.ours.step()

    def actions(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        actions: dict[str, Callable[[], object]] = {"adamw": self.adamw.step, "ours": self.step, "loop": self.loop.step}
        if isinstance(self.loop, AdaHessianLoop):
            self.loop.estimates = self.estimates
        if isinstance(self.loop, SophiaGLoop):
            actions |= {"estimate": self.estimate, "loop estimate": partial(self.loop.estimate, self.estimates)}
        return actions

    def compare(self) -> None:
        """Checks that ours and the plain loop came to the same weights."""
        for ours, plain, start in zip(self.weights["ours"], self.weights["loop"], self.initial, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
            assert not torch.equal(ours, start)


class AdaGradNormLoop(Loop):
    """AdaGrad with one number for all parameters."""

    total = 1e-2

    @torch.no_grad()
    def step(self) -> None:
        """One update from the weights' gradients."""
        grads = [w.grad for w in self.weights if w.grad is not None]
        for g in grads:
            self.total += float(g.double().square().sum())
        for w, g in zip(self.weights, grads, strict=True):
            w.mul_(1 - LR * DECAY)
            w.add_(g, alpha=-LR / math.sqrt(self.total))


METHODS: Mapping[str, tuple[Any, type[Loop]]] = {
    "diffgrad": (DiffGrad, DiffGradLoop),
    "sophiag": (SophiaG, SophiaGLoop),
    "adahessian": (AdaHessian, AdaHessianLoop),
    "adagrad-norm": (AdaGradNorm, AdaGradNormLoop),
}


def line(name: str, ours: float, peer: float, target: str) -> None:
    """Prints a figure; a target `<=` is of ours / peer, `>=` of peer / ours."""
    ratio = ours / peer if target.startswith("<") else peer / ours
    print(f"BENCH {name}: ours {ours * 1e3:.1f} ms, peer {peer * 1e3:.1f} ms, ratio {ratio:.2f}, target {target}", flush=True)


def report(method: str, best: Mapping[str, float], remark: str) -> None:
    """A method's figures."""
    what = "estimate and step" if method == "adahessian" else "step"
    target = TARGET_ADAHESSIAN if method == "adahessian" else TARGET_LOOP
    line(f"{method} {what}{remark}, against AdamW(foreach)", best["ours"], best["adamw"], f"<= {TARGET_ADAMW}")
    line(f"{method} {what}{remark}, against a plain loop", best["ours"], best["loop"], f">= {target}")
    if "estimate" in best:
        amortised = best["ours"] + best["estimate"] / EVERY
        name = f"{method} with an estimate every {EVERY} steps{remark}, against AdamW(foreach)"
        line(name, amortised, best["adamw"], f"<= {TARGET_AMORTISED}")


def compiled(bench: Bench) -> None:
    """The step under `torch.compile`, its count of steps and all."""
    step = torch.compile(bench.ours.step)
    for _ in range(2):
        step()
    best = best_of(COMPILED_ROUNDS, {"ours": step, "adamw": bench.adamw.step})
    line(f"{bench.method} compiled step, against AdamW(foreach)", best["ours"], best["adamw"], f"<= {TARGET_COMPILED}")


def measure(method: str, rounds: int, remark: str, *, with_compiled: bool) -> None:
    """One method, in this process."""
    bench = Bench(method)
    best = best_of(rounds, bench.actions())
    bench.compare()
    report(method, best, remark)
    if with_compiled and method != "adagrad-norm":  # its sum of squares lives on the host
        compiled(bench)


def training_steps(steps: int = 2 * EVERY, model_name: str = "vit-micro-40", batch: int = 32) -> None:
    """Whole training steps of a small CLIP with SophiaG, its estimates of the curvature included, beside AdamW's."""
    from diptych.models import clip
    from diptych.objectives.clip import Config as ClipConfig
    from diptych.optimizers.sophia import SophiaGConfig
    from diptych.train import curvature
    from diptych.train.contrastive import Contrastive
    from diptych.train.run import parameter_groups

    generator = torch.Generator().manual_seed(0)
    spent = {"sophiag": math.inf, "adamw": math.inf}
    runs = {}
    for name in spent:
        model = clip.create(model_name, 0)
        groups = parameter_groups(model.named_parameters())
        optimizer = SophiaGConfig(lr=1e-6).build(groups) if name == "sophiag" else torch.optim.AdamW(groups, lr=1e-6, foreach=True)
        runs[name] = (optimizer, curvature.backward(optimizer, Contrastive(model, ClipConfig().build(), 1, "fp32"), 0))
    image_NCHW = torch.randint(0, 256, (batch, 3, model.image_size, model.image_size), dtype=torch.uint8, generator=generator)
    text_NL = torch.randint(1, 1000, (batch, model.tokenizer.context_length), generator=generator)
    text_NL[:, -1] = 49407
    tensors = {"image_NCHW": image_NCHW, "text_NL": text_NL}

    def train(name: str, first: int) -> None:
        optimizer, backward = runs[name]
        for step in range(first, first + EVERY):
            optimizer.zero_grad()
            backward(tensors, step)
            backward.supply_curvature(step)
            optimizer.step()

    for name in runs:
        train(name, 0)
    for first in range(EVERY, EVERY + 3 * steps, EVERY):
        for name in runs:
            spent[name] = min(spent[name], timed(partial(train, name, first)) / EVERY)
    line(
        f"training step with sophiag, curvature every {EVERY}, against AdamW(foreach)",
        spent["sophiag"],
        spent["adamw"],
        f"<= {TARGET_AMORTISED}",
    )


def main() -> None:
    """Every method in a process of its own: no memory settings, then memory kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="measure torch.compile too")
    parser.add_argument("--method", choices=list(METHODS), help="measure this one here, in this process")
    parser.add_argument("--remark", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.method:
        measure(options.method, options.rounds, options.remark, with_compiled=options.compiled)
        return
    for (remark, settings), method in product((("", {}), (", memory kept", KEEP_MEMORY)), METHODS):
        command = [sys.executable, __file__, "--method", method, "--remark", remark, "--rounds", str(options.rounds)]
        command += [] if options.compiled and not remark else ["--no-compiled"]
        subprocess.run(command, env={**os.environ, **settings}, check=True)
    training_steps()


if __name__ == "__main__":
    main()
