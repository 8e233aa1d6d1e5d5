"""Training with the weights, gradients and moments shared out over the workers: torch's FSDP2 (`fully_shard`).

Every transformer block is a unit that is gathered when it is needed; what lies outside the blocks is one more unit. Gradients come averaged,
in the arithmetic of `sync.py`. Parameters that the loop reads between passes (the logit scale) and the objective's own stay whole on
every worker. What is stored is whole, too: a checkpoint does not know how many workers made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

Value = TypeVar("Value")
ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def shard(model: DualEncoder, world: int, device: str) -> None:
    """Shares a model out over the workers of the default process group, in place; names stay. With one worker nothing is done.

    Raises ConfigError on a device for which torch cannot.
    """
    if world == 1:
        return
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ConfigError.at("Weights cannot be shared out on this device", "parallel", kind, "cpu or cuda", "set parallel: ddp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(kind, (world,))
    for tower in (model.clip.visual, getattr(model.clip, "text", model.clip)):
        for block in getattr(getattr(tower, "transformer", None), "resblocks", ()):
            fully_shard(block, mesh=mesh)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def is_sharded(tensor: object) -> bool:
    """Whether this worker holds a part of it only."""
    return hasattr(tensor, "full_tensor")


def split(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of one kind each: an optimizer's fused kernels take shared-out tensors or whole ones, not both together."""
    parts: list[dict[str, Any]] = []
    for group in groups:
        for kind in (True, False):
            places = [place for place, parameter in enumerate(group["params"]) if is_sharded(parameter) == kind]
            if places:
                parts.append({**group, **{key: [group[key][place] for place in places] for key in ("params", "param_names")}})
    return parts


def refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError for an optimizer whose update looks at more than one number at a time."""
    if not isinstance(optimizer, ELEMENTWISE):
        expected = "an optimizer that updates each number by itself, such as adamw"
        raise ConfigError.at("The optimizer needs whole weights, which no worker has", "parallel", type(optimizer).__name__, expected)


def refuse_objective(objective: object) -> None:
    """Raises ConfigError for an objective that looks inside the towers or keeps a copy of them."""
    if getattr(objective, "whole_weights", False):
        expected = "an objective that only asks the model for features, such as clip"
        raise ConfigError.at(
            "The objective needs whole weights, which no worker has", "parallel", type(objective).__name__, expected, "set parallel: ddp"
        )


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, of whole ones and of those that are shared out."""
    shared = [gradient for gradient in gradients if is_sharded(gradient)]
    if not shared:
        return torch.nn.utils.get_total_norm(gradients)
    norm: Any = torch.nn.utils.get_total_norm(shared)
    whole = torch.nn.utils.get_total_norm([gradient for gradient in gradients if not is_sharded(gradient)])
    together: Tensor = torch.linalg.vector_norm(torch.stack([norm.full_tensor(), whole.to(norm.device)]))
    return together


def scale_down(parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales the gradients to `max_norm` where their norm exceeds it."""
    for kind in (True, False):
        some = [parameter for parameter in parameters if is_sharded(parameter) == kind]
        if some:
            torch.nn.utils.clip_grads_with_norm_(some, max_norm, norm)


def whole(value: Value) -> Value:
    """Plain data with every tensor put together from its parts. Every worker must call it, on the same structure."""
    if isinstance(value, Tensor):
        tensor: Any = value
        return tensor.detach().full_tensor() if is_sharded(value) else value
    if isinstance(value, Mapping):
        return {key: whole(entry) for key, entry in value.items()}  # type: ignore[return-value]
    return type(value)(whole(entry) for entry in value) if isinstance(value, list) else value


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This worker's part of a whole tensor, shared out as another one of its shape is."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shared: Any = like
    found: Tensor = distribute_tensor(tensor.to(shared.device), shared.device_mesh, shared.placements)
    return found


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads whole tensors into a module that is shared out. Raises RuntimeError for names that are missing or too many."""
    own = module.state_dict()
    module.load_state_dict({name: part(tensor, own[name]) if name in own else tensor for name, tensor in tensors.items()})


def optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state of an optimizer as one whose parameters are shared out loads it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        index: {key: part(value, parameters[index]) if isinstance(value, Tensor) else value for key, value in moments.items()}
        for index, moments in state["state"].items()
    }
    return {**state, "state": parts}
