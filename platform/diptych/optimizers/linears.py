"""Which parameters of a dual encoder are linear maps, by name, and how many maps a packed one holds.

Low-rank methods work on the weights, not on layers that are called: fused multi-head attention never calls `out_proj.forward` and
packs q, k and v into one `in_proj_weight`, so a wrapped layer would silently do nothing there, but a weight is always read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from diptych.core.errors import ConfigError

LINEAR_LEAVES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "proj", "text_projection")
"""Last parts of the names of linear maps: `nn.Linear`, torch's attention, open_clip's bare projections (stored in x out)."""
TABLES = ("embedding", "embed_tokens", "shared.weight", "wte.", "wpe.", "relative_attention_bias", "objective.")
"""Parts of the names of matrices that are looked up rather than multiplied by, and of what an objective owns."""
PACKED = {"in_proj_weight": 3, "qkv.weight": 3, "kv.weight": 2, "Wqkv.weight": 3}
"""Ends of the names of stacked projections: torch's, then timm's, then others'."""


def is_linear(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is the matrix of a linear map, by its full dotted name.

    >>> import torch
    >>> [is_linear(name, torch.empty(2, 2)) for name in ("attn.in_proj_weight", "visual.proj", "token_embedding.weight")]
    [True, True, False]
    """
    return parameter.ndim == 2 and name.rpartition(".")[2] in LINEAR_LEAVES and not any(part in name for part in TABLES)


def is_bare(name: str) -> bool:
    """Whether a linear map is a parameter of no layer, as open_clip's `visual.proj` and `text_projection` are."""
    return name.rpartition(".")[2] in ("proj", "text_projection")


def maps_in(name: str | None, parameter: Tensor) -> int:
    """How many maps of equal height are stacked in a matrix: 3 where q, k and v are; 1 without a name."""
    ends = (count for end, count in PACKED.items() if name is not None and f".{name}".endswith(f".{end}"))
    count = next(ends, 1)
    if parameter.shape[0] % count:
        raise ConfigError.at("A packed projection does not divide", str(name), tuple(parameter.shape), f"a multiple of {count} rows")
    return count


def named(group: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """The parameters of an optimizer's group with their names, None where it has none (`param_names`, torch's own key)."""
    names = group.get("param_names") or [None] * len(group["params"])
    return zip(names, group["params"], strict=True)


def is_adaptable(name: str | None, parameter: Tensor) -> bool:
    """`is_linear`; without a name every matrix is taken for a linear map."""
    return parameter.ndim == 2 if name is None else is_linear(name, parameter)


def split(
    groups: Iterable[Mapping[str, Any]],
    linear: Mapping[str, Any],
    other: Mapping[str, Any],
    chooses: Callable[[str | None, Tensor], bool] = is_adaptable,
) -> list[dict[str, Any]]:
    """Two groups out of each: its linear maps with the values `linear`, the rest with `other`; each in the given order.

    A group may be empty, so that saved states of one model always fit.

    Args:
        groups: as for a torch optimizer; parameters may be `(name, tensor)`, or a group holds `param_names` beside `params`.
        linear, other: values that each kind of group gets beside what it has.
        chooses: whether a parameter goes to the first kind.
    """
    halves: list[dict[str, Any]] = []
    for group in groups:
        params = list(group["params"])
        has_tuples = bool(params) and isinstance(params[0], tuple)
        pairs = params if has_tuples else list(named({**group, "params": params}))
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for wanted, values in ((True, linear), (False, other)):
            chosen = [(name, each) for name, each in pairs if chooses(name, each) is wanted]
            names = {"param_names": [name for name, _ in chosen]} if has_tuples or "param_names" in group else {}
            halves.append({**rest, **values, "params": [each for _, each in chosen], **names})
    return halves
