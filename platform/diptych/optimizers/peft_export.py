"""AdaLoRA's adapters as a directory that 🤗 peft's `PeftModel.from_pretrained(model, directory)` opens.

They are written as LoRA and not as peft's own AdaLoRA, which knows `nn.Linear` only: LoRA also reaches torch's fused attention, and
B diag(E) A is a LoRA pair once E is multiplied into B. Ranks that were cut are left out. q, k and v of a packed projection become one pair
whose A are stacked and whose B stand on a diagonal of blocks. Fused attention has one rank for both of its projections in peft, so
the smaller one is filled up with zeros.

What is written is the adapter as LoRA defines it. peft up to 0.21.2 at least counts the one of a fused attention's output projection
twice, forward and merged (huggingface/peft#3774): for such a version, `export_peft(…, doubles_output=True)` writes half of it.

Shape legend: M rows, N columns of a weight, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.optimizers.adalora import AdaLoRA
from diptych.optimizers.linears import is_bare

PREFIX = "base_model.model."


class Pair(NamedTuple):
    """delta = B A: `[R, N]` and `[M, R]`."""

    A: Tensor
    B: Tensor

    def padded(self, rank: int) -> Pair:
        """The same delta at a larger rank."""
        missing = rank - len(self.A)
        return Pair(nn.functional.pad(self.A, (0, 0, 0, missing)), nn.functional.pad(self.B, (0, missing)))


@torch.no_grad()
def lora_pairs(optimizer: AdaLoRA, model: nn.Module) -> dict[str, Pair]:
    """The adapters of a model's parameters by name, at the ranks that are left; those with none are not there."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = {}
    for group, parameter in optimizer.adapted():
        each, scale = optimizer.triplets(parameter), optimizer.scale(group, parameter)
        kept = [E.squeeze(-1) != 0 for E in each.E]
        if any(bool(mask.any()) for mask in kept) and id(parameter) in names:
            A_RN = torch.cat([A[mask] for A, mask in zip(each.A, kept, strict=True)])
            blocks = [B[:, mask] * E[mask].T * scale for B, E, mask in zip(each.B, each.E, kept, strict=True)]
            pairs[names[id(parameter)]] = Pair(A_RN, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]
    return pairs


def export_peft(optimizer: AdaLoRA, model: nn.Module, directory: Path, base_model: str = "", *, doubles_output: bool = False) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        optimizer: after training; its state holds the adapters.
        model: the module that peft will wrap, with the names it has there: open_clip's model, not a wrapper around it.
        directory: is made; files of these names are replaced.
        base_model: what the adapters belong to, for `base_model_name_or_path`.
        doubles_output: the peft that will open it counts output projections of fused attention twice.

    Raises ConfigError if a bare projection such as `visual.proj` was adapted, which peft cannot reach, if no rank is left, or if the
    parameters are another model's.
    """
    pairs = lora_pairs(optimizer, model)
    if bare := [name for name in pairs if is_bare(name)]:
        fix = "save the merged model, or train with projections: false"
        raise ConfigError.at("peft does not reach projections that are no layers", "model", bare, "linear layers and attention", fix)
    if not pairs:
        raise ConfigError.at("There is no adapter to export", "optimizer", "no rank left in this model", "at least one")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, members in _by_target(model, pairs):
        ranks[module] = max(len(pair.A) for pair in members.values())
        for inner, pair in members.items():
            full = pair.padded(ranks[module])
            if doubles_output and inner != module:
                full = full._replace(B=full.B / 2)
            tensors[f"{PREFIX}{inner}.lora_A.weight"], tensors[f"{PREFIX}{inner}.lora_B.weight"] = full.A.contiguous(), full.B.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(_config(ranks, base_model), indent=2) + "\n")


def _by_target(model: nn.Module, pairs: dict[str, Pair]) -> Iterator[tuple[str, dict[str, Pair]]]:
    """The modules that peft is told to wrap, each with the adapters in it by the name that peft keeps them under."""
    attentions = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    targets: dict[str, dict[str, str]] = {}
    for name in pairs:
        module = name.rpartition(".")[0]
        owner = next((each for each in attentions if module in (each, f"{each}.out_proj")), module)
        inner = f"{owner}.base_layer.out_proj" if owner in attentions and module != owner else module
        targets.setdefault(owner, {})[inner] = name
    for owner, inside in targets.items():
        members = {inner: pairs[name] for inner, name in inside.items()}
        if owner in attentions:  # peft wraps both projections, so both must be there
            attention: Any = model.get_submodule(owner)
            for inner, weight in ((owner, attention.in_proj_weight), (f"{owner}.base_layer.out_proj", attention.out_proj.weight)):
                members.setdefault(inner, Pair(weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)))
        yield owner, members


def _config(ranks: dict[str, int], base_model: str) -> dict[str, object]:
    """peft's LoraConfig; alpha equals the rank, so that the pairs count once."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
