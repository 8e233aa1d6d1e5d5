"""A transformer under masks of its width, heads and neurons, and the smaller transformer that computes the same.

Where masks act: on the sum of the embeddings; in each LayerNorm, which sees the features whose mask is not 0 and gives 0 elsewhere, without
being multiplied; on the heads before the output projection; on the neurons behind the activation; on what attention and MLP give, biases
included. Source: Wu et al., TinyCLIP (ICCV 2023), its code.

Shape legend: N samples, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from diptych.compress.hard_concrete import Masks, Sizes
from diptych.core.errors import ConfigError
from diptych.models import structure
from diptych.models.attention import in_the_open
from diptych.models.clip import DualEncoder
from diptych.models.structure import Kind, outside, parts


@dataclass(frozen=True)
class Form:
    """What masks act on in a tower: its blocks, all its norms, and the module whose input is the sum of the embeddings."""

    blocks: Sequence[nn.Module]
    norms: Sequence[nn.LayerNorm]
    stem: nn.Module | None = None

    @classmethod
    def of_blocks(cls, blocks: Sequence[nn.Module]) -> Form:
        """Blocks alone. Raises ConfigError for others than open_clip's own."""
        for block in blocks:
            if not isinstance(getattr(block, "ln_1", None), nn.LayerNorm):
                raise ConfigError.at("Masks act on open_clip's own blocks", "towers", type(block).__name__, "ResidualAttentionBlock")
        return cls(blocks, [norm for block in blocks for norm in block.children() if isinstance(norm, nn.LayerNorm)])

    @classmethod
    def of_tower(cls, model: DualEncoder, kind: Kind) -> Form:
        """A tower. Raises ConfigError for others than open_clip's plain transformers."""
        found = outside(model, kind)
        inner = cls.of_blocks(list(found.transformer.resblocks))
        return cls(inner.blocks, [*inner.norms, *found.norms], found.stem)

    def sizes(self) -> Sizes:
        """Of the blocks as they are."""
        found = [parts(block) for block in self.blocks]
        heads, neurons = tuple(each.heads for each in found), tuple(each.neurons for each in found)
        return Sizes(found[0].out.out_features, heads, found[0].head_width, neurons)


@contextmanager
def masked(form: Form, current: Callable[[], Masks]) -> Iterator[None]:
    """While open, a tower computes under the masks that `current` gives at the time; gradients reach masks and weights."""
    with ExitStack() as stack:
        for norm in form.norms:
            norm.forward = partial(_masked_norm, norm, current)  # type: ignore[method-assign]
            stack.callback(delattr, norm, "forward")
        if form.stem is not None:
            handle = form.stem.register_forward_pre_hook(lambda _, args: (args[0] * current().hidden, *args[1:]))
            stack.callback(handle.remove)
        for place, block in enumerate(form.blocks):
            stack.enter_context(in_the_open(block))
            for handle in _hooks(block, place, current):
                stack.callback(handle.remove)
        yield


def _hooks(block: nn.Module, place: int, current: Callable[[], Masks]) -> list[Any]:
    found, attention = parts(block), block.attn

    def heads(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * current().heads[place].repeat_interleave(found.head_width),)

    def neurons(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * current().neurons[place],)

    def attended(_: nn.Module, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return (output[0] * current().hidden, *output[1:])

    def computed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * current().hidden

    assert isinstance(attention, nn.Module)
    handles = [found.outer.register_forward_pre_hook(neurons), found.outer.register_forward_hook(computed)]
    handles.append(attention.register_forward_hook(attended))
    return [*handles, found.out.register_forward_pre_hook(heads)] if found.heads else handles


def _masked_norm(norm: nn.LayerNorm, current: Callable[[], Masks], x_NLD: Tensor) -> Tensor:
    kept = current().hidden.detach().nonzero()[:, 0]
    weight, bias = (None if each is None else each[kept] for each in (norm.weight, norm.bias))
    normed = layer_norm(x_NLD[..., kept], (len(kept),), weight, bias, norm.eps)
    return torch.zeros_like(x_NLD).index_copy(-1, kept, normed.to(x_NLD.dtype))


@torch.no_grad()
def fuse(model: DualEncoder, kind: Kind, masks: Masks) -> None:
    """Multiplies a tower's weights by its masks and cuts out what is 0, in place, so that it computes what it did under them."""
    for owner, leaf, axis in outside(model, kind).embeddings:
        value = getattr(owner, leaf)
        shape = [1] * value.ndim
        shape[axis] = -1
        value.mul_(masks.hidden.view(shape))
    blocks = outside(model, kind).transformer.resblocks
    for block, heads, neurons in zip(blocks, masks.heads, masks.neurons, strict=True):
        _scale(block, masks.hidden, heads, neurons)
    structure.cut_width(model, kind, masks.hidden != 0)
    names = {id(module): name for name, module in model.clip.named_modules()}
    pairs = zip(blocks, masks.heads, masks.neurons, strict=True)
    structure.cut_encoder(model, {names[id(block)]: (heads != 0, neurons != 0) for block, heads, neurons in pairs})


@torch.no_grad()
def fuse_block(block: nn.Module, hidden: Tensor, heads: Tensor, neurons: Tensor) -> None:
    """`fuse` of one block, whose input then is what is left of the width."""
    _scale(block, hidden, heads, neurons)
    structure.cut_block_width(block, hidden != 0)
    structure.cut(block, heads != 0, neurons != 0)


def _scale(block: nn.Module, hidden: Tensor, heads: Tensor, neurons: Tensor) -> None:
    found = parts(block)
    for layer, columns in ((found.out, heads.repeat_interleave(found.head_width)), (found.outer, neurons)):
        layer.weight.mul_(hidden[:, None] * columns[None, :])
        if layer.bias is not None:
            layer.bias.mul_(hidden)
