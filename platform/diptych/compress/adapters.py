"""Low-rank updates of pruned matrices that are trained in place of the weights, and merged into them with every zero where it was.

Source: Zimmer, Andoni, Spiegel, Pokutta, PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (arXiv 2312.15230), section 3.2.
With M the mask, A `[r, I]`, B `[O, r]` and s = alpha / r a layer computes with

| form         | in training       | merged            | at the start                             |
|--------------|-------------------|-------------------|------------------------------------------|
| `lora`       | W + s B A         | W + s B A: dense  | A uniform as torch's linear layer, B = 0 |
| `lora_prune` | W + s B A         | W + s M * (B A)   | the same                                 |
| `mask_lora`  | W + s M * (B A)   | the same          | the same                                 |
| `scale_lora` | W * (B A)         | the same          | A and B are 1 / sqrt(r): B A = 1         |

The updates are torch parametrizations of the weights themselves: fused attention never calls its layers, but it reads its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Form = Literal["lora", "lora_prune", "mask_lora", "scale_lora"]


class LowRank(nn.Module):
    """The update of one weight.

    Args:
        weight: of any shape with at least two dimensions; all but the first count as inputs.
        mask: bool, of its shape, True stays; None: nothing of it is pruned.
        form: see the table.
        rank, alpha: r and alpha.
        generator: of A's first values, on the CPU.

    Attributes:
        A, B: the factors.
        is_merging: whether `forward` gives what the merge leaves; it differs in training for `lora_prune` only.
    """

    def __init__(self, weight: Tensor, mask: Tensor | None, form: Form, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.form, self.scale, self.is_merging = form, alpha / rank, False
        self.register_buffer("mask", mask, persistent=False)
        if form == "scale_lora":
            a_RI, b_OR = (torch.full(shape, rank**-0.5, dtype=weight.dtype) for shape in ((rank, inputs), (outputs, rank)))
        else:
            bound = 1 / math.sqrt(inputs)  # Kaiming's uniform with a = sqrt 5
            a_RI = torch.empty(rank, inputs, dtype=weight.dtype).uniform_(-bound, bound, generator=generator)
            b_OR = torch.zeros(outputs, rank, dtype=weight.dtype)
        self.A, self.B = nn.Parameter(a_RI.to(weight)), nn.Parameter(b_OR.to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        product = (self.B @ self.A).view_as(weight)
        if self.form == "scale_lora":
            return weight * product
        mask = cast("Tensor | None", self.mask)
        if mask is not None and (self.form == "mask_lora" or (self.form == "lora_prune" and self.is_merging)):
            product = product * mask
        return weight + self.scale * product


class Selection:
    """What is trained of a model: everything else is frozen until `merge`, which leaves a plain model with its zeros in place.

    Args:
        model: any module; its own parameters' `requires_grad` is kept and given back.
        targets: by parameter name, the weights that get a low-rank update, with their masks; None where nothing is pruned.
        form: of the updates of masked weights; unmasked ones get plain LoRA.
        rank, alpha: of the updates.
        biases: train every bias of every module.
        norms: train weights and biases of the normalisation layers.
        also: names of further parameters to train.
        seed: names the draws of A.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Tensor | None], form: Form = "mask_lora", rank: int = 16, alpha: float = 32.0, *,
        biases: bool = True, norms: bool = True, also: tuple[str, ...] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        self.model = model
        self._before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        chosen = {name for name, _ in model.named_parameters() if name in also or (biases and name.endswith("bias"))}
        chosen |= set(norm_parameters(model)) if norms else set()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.adapters: dict[str, LowRank] = {}
        self._orders: dict[nn.Module, list[str]] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, mask in targets.items():
            owner, leaf = _place(model, name)
            self._orders.setdefault(owner, list(owner._parameters))
            kind: Form = "lora" if mask is None else form
            adapter = LowRank(getattr(owner, leaf), mask, kind, rank, alpha, generator)
            parametrize.register_parametrization(owner, leaf, adapter)
            self.adapters[name] = adapter

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; the factors as `<weight>.A` and `<weight>.B`."""
        found = {
            name: each for name, each in self.model.named_parameters() if each.requires_grad and ".parametrizations." not in f".{name}"
        }
        factors = {f"{name}.{which}": getattr(adapter, which) for name, adapter in self.adapters.items() for which in ("A", "B")}
        return found | factors

    def merge(self) -> None:
        """Puts the updates into the weights, in place, and lets go of them."""
        for name, adapter in self.adapters.items():
            adapter.is_merging = True
            owner, leaf = _place(self.model, name)
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=True)
        for owner, names in self._orders.items():  # as they were, rather than behind the others
            for name in names:
                owner._parameters[name] = owner._parameters.pop(name)
        self.adapters = {}
        for parameter, required in self._before:
            parameter.requires_grad_(required)
            parameter.grad = None


def norm_parameters(model: nn.Module) -> list[str]:
    """The names of the weights and biases of normalisation layers, by the layers' class names."""
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf
