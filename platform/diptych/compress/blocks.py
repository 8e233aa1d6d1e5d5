"""A walk through the transformer blocks of both towers: every weight matrix by name, and exactly what it is multiplied with.

Works on open_clip's own towers, on timm's vision transformers, hierarchical ones included, and on text encoders of the BERT family. Fused attention hides the
input of its output projection from hooks, so attention computes in the open while inputs are looked at (`models/attention.py`).
Memory: the inputs of one block at a time, for all calibration pairs, and nothing of the others.

Shape legend: N samples (pictures or captions), L tokens, D model width, T tokens of all samples that count, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych.core.errors import ConfigError
from diptych.models import clip
from diptych.models.attention import in_the_open
from diptych.models.maps import real_tokens

Which = Literal["both", "image", "text"]
Kind = Literal["image", "text"]
Batch = Mapping[str, Tensor]

BLOCKS: dict[Kind, tuple[str, ...]] = {
    "image": ("transformer.resblocks", "trunk.blocks", "trunk.layers"),
    "text": ("transformer.resblocks", "transformer.encoder.layer"),
}
"""Where the blocks of a tower are: open_clip's own, then timm's (of hierarchical ones the stages) or Hugging Face's."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block, out x in: the parameter `leaf` of the module `owner`. `name` is its full name in the model."""

    name: str
    owner: nn.Module
    leaf: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now."""
        return cast(nn.Parameter, getattr(self.owner, self.leaf))


@dataclass(frozen=True)
class Tower:
    """One tower's blocks, in order, by their full names in the model."""

    kind: Kind
    blocks: Mapping[str, nn.Module]

    def encode(self, model: Any, batch: Batch, normalize: bool = True) -> Tensor:
        """Features `[N, D]` of the tower's half of a batch of the calibration."""
        if self.kind == "image":
            return cast(Tensor, model.encode_image(batch["image_NCHW"].to(device_of(model)), normalize=normalize))
        return cast(Tensor, model.encode_text(batch["text_NL"].to(device_of(model)), normalize=normalize))

    def matrices(self) -> list[Matrix]:
        """Every weight matrix of the tower's blocks, in order."""
        return [matrix for name, block in self.blocks.items() for matrix in matrices(block, name)]


@dataclass
class Inputs:
    """What a block is called with for one calibration batch. `valid_NL` says which tokens count; None: all of them do."""

    hidden_NLD: Tensor
    rest: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    valid_NL: Tensor | None = None

    @property
    def samples(self) -> int:
        """N."""
        return len(self.hidden_NLD)

    def call(self, block: nn.Module) -> Tensor:
        """The block's output `[N, L, D]`."""
        output = block(self.hidden_NLD, *self.rest, **self.options)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def tokens(self, x_NLI: Tensor) -> Tensor:
        """The tokens that count, `[T, I]`."""
        return x_NLI.flatten(0, -2) if self.valid_NL is None else x_NLI[self.valid_NL]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def towers(model: nn.Module, which: Which = "both") -> list[Tower]:
    """The towers of a dual encoder. Raises ConfigError for one without transformer blocks."""
    kinds: tuple[Kind, ...] = ("image", "text") if which == "both" else (which,)
    return [_tower(model, kind) for kind in kinds]


def _tower(model: nn.Module, kind: Kind) -> Tower:
    modules = dict(model.named_modules())
    outer = "clip." if "clip" in modules else ""
    root = f"{outer}visual." if kind == "image" else f"{outer}text." if f"{outer}text" in modules else outer
    for path in BLOCKS[kind]:
        if (blocks := modules.get(root + path)) is not None:
            return Tower(kind, {f"{root}{path}.{name}": block for name, block in blocks.named_children()})
    other = "text" if kind == "image" else "image"
    fix = f"choose `towers: {other}`, or a method that needs no blocks, e.g. magnitude"
    raise ConfigError.at(f"The {kind} tower has no transformer blocks", "towers", kind, "a vision transformer or a text transformer", fix)


def matrices(block: nn.Module, prefix: str) -> list[Matrix]:
    """Every weight matrix of a block: its linear layers, and q, k, v where attention packs them into a parameter of its own."""
    found = []
    for name, module in block.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        if isinstance(module, nn.Linear):
            found.append(Matrix(f"{full}.weight", module, "weight"))
        elif getattr(module, "in_proj_weight", None) is not None:
            found.append(Matrix(f"{full}.in_proj_weight", module, "in_proj_weight"))
    return found


@contextmanager
def watched(block: nn.Module, prefix: str, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see(name, x_NLI)` is called with the input of every weight matrix of the block whenever it is used."""

    def look(name: str, module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        del module
        see(name, (args[0] if args else next(iter(options.values()))).detach())

    with ExitStack() as stack:
        stack.enter_context(in_the_open(block))
        for matrix in matrices(block, prefix):
            handle = matrix.owner.register_forward_pre_hook(partial(look, matrix.name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _Reached(Exception):  # noqa: N818 - it says that the first block was reached, nothing went wrong
    pass


@torch.no_grad()
def first_inputs(model: nn.Module, tower: Tower, batch: Batch) -> Inputs:
    """What the tower's first block is called with for a batch; the blocks themselves do not run."""
    seen: list[Inputs] = []

    def stop(module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        del module
        seen.append(Inputs(args[0], args[1:], dict(options)))
        raise _Reached

    handle = next(iter(tower.blocks.values())).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        tower.encode(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    (inputs,) = seen
    if tower.kind == "text":
        inputs.valid_NL = _valid(model, batch["text_NL"].to(device_of(model)), inputs.hidden_NLD.shape[1])
    return inputs


def _valid(model: Any, text_NL: Tensor, length: int) -> Tensor | None:
    """The tokens up to a caption's end. Where padding can reach a caption's feature, it counts as all else does, unless it is masked."""
    inner = getattr(model, "clip", model)
    text = getattr(inner, "text", inner)
    if not clip.ignores_padding(text) and not hasattr(text, "config"):  # Hugging Face's encoders mask their padding
        return None
    return nn.functional.pad(real_tokens(text, text_NL), (0, length - text_NL.shape[1]), value=False)


@torch.no_grad()
def through(blocks: Mapping[str, nn.Module], states: Sequence[Inputs]) -> Iterator[tuple[str, nn.Module, Sequence[Inputs]]]:
    """Each block with its inputs. Then they go through the block as the caller left it, so that later blocks see earlier ones compressed."""
    for name, block in blocks.items():
        yield name, block, states
        for inputs in states:
            inputs.hidden_NLD = inputs.call(block)


def walk(model: nn.Module, tower: Tower, batches: Iterable[Batch]) -> Iterator[tuple[str, nn.Module, Sequence[Inputs]]]:
    """`through` a tower's blocks, from calibration batches. The model should be in evaluation mode."""
    return through(tower.blocks, [first_inputs(model, tower, batch) for batch in batches])


@torch.no_grad()
def collect(block: nn.Module, prefix: str, states: Iterable[Inputs], add: Callable[[str, Inputs, Tensor], None]) -> None:
    """Runs a block on its inputs; `add(name, inputs, x_NLI)` gets what each matrix was multiplied with, batch by batch."""
    for inputs in states:

        def see(name: str, x_NLI: Tensor, inputs: Inputs = inputs) -> None:
            add(name, inputs, x_NLI)

        with watched(block, prefix, see):
            inputs.call(block)


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, a backward pass keeps the inputs of blocks only, and computes one block anew at a time."""
    patched = list(blocks)
    for block in patched:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in patched:
            del block.forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in evaluation mode: no dropout, no batch statistics. Each module then has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
