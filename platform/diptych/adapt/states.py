"""State dicts: what the methods that edit weights take and give. Names and shapes are checked here, once.

A state is a `Mapping[str, Tensor]` as `nn.Module.state_dict` gives it. The masks of a compressed model (`<parameter>_mask`) are no part of
it: they say which weights stay zero, whatever is done to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych.core.errors import DataError
from diptych.models import clip
from diptych.models.store import MASK

State = Mapping[str, Tensor]


def editable(model: nn.Module) -> nn.Module:
    """The module whose names are open_clip's own: the model inside a dual encoder, or the module itself."""
    inner = getattr(model, "clip", model)
    return inner if isinstance(inner, nn.Module) else model


def of_module(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a module, without masks; the tensors are the module's own, detached."""
    state = editable(model).state_dict()
    return {name: tensor for name, tensor in state.items() if not _is_mask(name, state)}


def of_directory(directory: str, like: nn.Module) -> dict[str, Tensor]:
    """The weights in a model directory, on the device of `like`. Raises DataError if it cannot be read or is another architecture."""
    reference = of_module(like)
    state = of_module(clip.load(Path(directory)))
    require_alike(reference, state, directory)
    return {name: tensor.to(reference[name].device) for name, tensor in state.items()}


def require_alike(reference: State, other: State, where: str, names: Iterable[str] | None = None) -> None:
    """Raises DataError unless `other` holds the same names with the same shapes; with `names`, unless both hold these."""
    wanted = set(reference) | set(other) if names is None else set(names)
    lonely = sorted(name for name in wanted if name not in reference or name not in other)
    if lonely:
        raise DataError.at("The weights have other names", where, lonely[:5], "the names of the other model", "use one architecture")
    unequal = {
        name: (list(reference[name].shape), list(other[name].shape)) for name in wanted if reference[name].shape != other[name].shape
    }
    if unequal:
        raise DataError.at(
            "The weights have other shapes", where, dict(sorted(unequal.items())[:5]), "equal shapes", "use one architecture"
        )


def elementwise(rule: Callable[..., Tensor], *states: State) -> dict[str, Tensor]:
    """`rule` on the floating-point tensors of several states, in float64 and rounded once to the last state's dtype.

    Integer tensors are the last state's. Raises DataError where names or shapes differ.
    """
    last = states[-1]
    for number, state in enumerate(states[:-1]):
        require_alike(last, state, f"model {number}")
    return {
        name: rule(*(state[name].detach().double() for state in states)).to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in last.items()
    }


@torch.no_grad()
def install(model: nn.Module, state: State) -> None:
    """Copies a state into a module, in place; where the module has masks, pruned weights stay zero. Raises DataError on a mismatch."""
    own = editable(model).state_dict()
    require_alike({name: tensor for name, tensor in own.items() if not _is_mask(name, own)}, state, "the edited weights")
    for name, tensor in state.items():
        own[name].copy_(tensor)
        if name + MASK in own:
            own[name].mul_(own[name + MASK])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, as it was before for every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_mask(name: str, state: State) -> bool:
    return name.endswith(MASK) and name.removesuffix(MASK) in state
