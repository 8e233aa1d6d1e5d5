"""Transformer blocks with fewer heads and fewer MLP neurons, and towers of less width, than their configuration says.

A block is cut by what it keeps; the encoder notes in `structure` how many heads and neurons each cut block has left, so that a
directory of it can be read again (`models/store.py`). open_clip's configuration can say only one thing of that kind: one MLP width for all blocks
of a tower, in `mlp_ratio`. Where that is all that was cut, the note is written there, and open_clip opens the model; otherwise it cannot.

Known blocks: open_clip's `ResidualAttentionBlock` and timm's `Block` with plain attention and a plain MLP. The width, the features that all
blocks of a tower hand on, can be cut in open_clip's own vision and text transformers; heads keep their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.models.attention import CutAttention, narrow_linear
from diptych.models.store import MASK

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

Kind = Literal["image", "text"]
FOLDED = (
    ("vision_cfg", "visual.transformer.resblocks."),
    ("text_cfg", "transformer.resblocks."),
    ("text_cfg", "text.transformer.resblocks."),
)
"""The sections of open_clip's configuration that have an `mlp_ratio`, and the blocks that it speaks of."""


@dataclass(frozen=True)
class Parts:
    """A block's attention and MLP under one set of names.

    Attributes:
        heads, head_width: of the attention.
        qkv: where q, k and v are stacked: module, name of the weight, name of the bias.
        out: the attention's output projection.
        inner, outer: the MLP's two layers.
    """

    heads: int
    head_width: int
    qkv: tuple[nn.Module, str, str]
    out: nn.Linear
    inner: nn.Linear
    outer: nn.Linear

    @property
    def neurons(self) -> int:
        """Width of the MLP inside."""
        return self.inner.out_features


def parts(block: nn.Module, name: str = "block") -> Parts:
    """The parts of a block. Raises ConfigError for one that is built otherwise."""
    attention: Any = getattr(block, "attn", None)
    mlp: Any = getattr(block, "mlp", None)
    if isinstance(attention, nn.MultiheadAttention | CutAttention) and hasattr(mlp, "c_fc") and attention.in_proj_weight is not None:
        qkv = (attention, "in_proj_weight", "in_proj_bias")
        return Parts(attention.num_heads, attention.head_dim, qkv, attention.out_proj, mlp.c_fc, mlp.c_proj)
    if _is_timm(attention, mlp):
        return Parts(attention.num_heads, attention.head_dim, (attention.qkv, "weight", "bias"), attention.proj, mlp.fc1, mlp.fc2)
    kind = f"{type(attention).__name__} with {type(mlp).__name__}"
    raise ConfigError.at("Heads and neurons of this block cannot be told apart", name, kind, "open_clip's own or timm's plain blocks")


def _is_timm(attention: Any, mlp: Any) -> bool:
    plain = all(hasattr(attention, name) for name in ("qkv", "proj", "num_heads", "head_dim", "attn_dim")) and hasattr(mlp, "fc2")
    if not plain or getattr(attention, "gate", None) is not None:
        return False
    norms = (getattr(attention, "norm", None), getattr(mlp, "norm", None))  # a norm over all heads or neurons mixes what is cut
    return all(isinstance(norm, nn.Identity | None) for norm in norms) and bool(mlp.fc1.out_features == mlp.fc2.in_features)


@torch.no_grad()
def cut(block: nn.Module, heads: Tensor, neurons: Tensor, name: str = "block") -> None:
    """Removes what is not kept, in place; masks of the cut parameters are cut alike. A block may lose all heads or all neurons.

    Args:
        block: of a known kind.
        heads: bool `[heads]`, True stays.
        neurons: bool `[neurons]`.
        name: for complaints.
    """
    found = parts(block, name)
    if not bool(heads.all()):
        features = heads.repeat_interleave(found.head_width)
        stacked = features.repeat(3)
        module, out = found.qkv[0], _narrowed(found.out, columns=features)
        if module is block.attn:
            block.attn = _cut_attention(found, int(heads.sum()), stacked, out)
        else:
            attention: Any = block.attn
            attention.qkv, attention.proj = _narrowed(module, rows=stacked), out
            attention.num_heads = int(heads.sum())
            attention.attn_dim = attention.num_heads * found.head_width
    if not bool(neurons.all()):
        _replace(block, found.inner, _narrowed(found.inner, rows=neurons))
        _replace(block, found.outer, _narrowed(found.outer, columns=neurons))


def _cut_attention(found: Parts, heads: int, stacked: Tensor, out: nn.Linear) -> CutAttention:
    module, weight, bias = found.qkv
    old_bias = getattr(module, bias)
    new = CutAttention(found.out.out_features, heads, found.head_width, old_bias is not None)
    new.train(module.training)
    _copy(module, new, weight, stacked, None)
    if old_bias is not None:
        _copy(module, new, bias, stacked, None)
    new.out_proj = out
    return new


def _narrowed(layer: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    outputs = layer.out_features if rows is None else int(rows.sum())
    inputs = layer.in_features if columns is None else int(columns.sum())
    new = narrow_linear(inputs, outputs, layer.bias is not None)
    new.train(layer.training)
    _copy(layer, new, "weight", rows, columns)
    if layer.bias is not None:
        _copy(layer, new, "bias", rows, None)
    return new


def _copy(old: nn.Module, new: nn.Module, leaf: str, rows: Tensor | None, columns: Tensor | None) -> None:
    """A parameter with its mask, if it has one, less some rows and columns."""
    value: Tensor = getattr(old, leaf)
    setattr(new, leaf, nn.Parameter(_taken(value.detach(), rows, columns).clone(), requires_grad=value.requires_grad))
    mask = getattr(old, leaf + MASK, None)
    if isinstance(mask, Tensor):
        new.register_buffer(leaf + MASK, _taken(mask, rows, columns).clone())


def _taken(value: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    value = value if rows is None else value[rows.to(value.device)]
    return value if columns is None else value[:, columns.to(value.device)]


def _replace(block: nn.Module, old: nn.Module, new: nn.Module) -> None:
    (name,) = (name for name, module in block.named_modules() if module is old)
    owner, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(owner), leaf, new)


def cut_encoder(model: DualEncoder, kept: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Cuts blocks of an encoder, named as in `model.clip`, and notes it in the configuration or, where that cannot say it, in `structure`."""
    for name, (heads, neurons) in kept.items():
        block = model.clip.get_submodule(name)
        cut(block, heads, neurons, name)
        if not (bool(heads.all()) and bool(neurons.all())):
            left = parts(block, name)
            model.structure[name] = {"heads": left.heads, "neurons": left.neurons}
    for section, prefix in FOLDED:
        _fold(model, section, prefix)


def _fold(model: DualEncoder, section: str, prefix: str) -> None:
    """Writes one MLP width for all blocks of an open_clip tower into its `mlp_ratio`, if that is all there is to say."""
    cfg = model.config.get(section, {})
    blocks = {name: block for name, block in model.clip.named_modules() if name.startswith(prefix) and name.removeprefix(prefix).isdigit()}
    if not (blocks.keys() & model.structure.keys()) or "width" not in cfg:
        return
    found = [parts(block, name) for name, block in blocks.items()]
    widths = {each.neurons for each in found}
    if ("visual" if section == "vision_cfg" else "text") in model.structure:
        return  # the configuration's width is not the tower's
    whole = all(each.heads * each.head_width == each.out.out_features for each in found)
    neurons = next(iter(widths))
    ratio = neurons / cfg["width"]
    if whole and len(widths) == 1 and neurons and int(cfg["width"] * ratio) == neurons:
        cfg["mlp_ratio"] = ratio
        for name in blocks:
            model.structure.pop(name, None)


def shape(model: DualEncoder, structure: Mapping[str, Mapping[str, int]]) -> None:
    """Gives a model's blocks the shapes that were noted, and fuses what was; what the weights are does not matter yet.

    Raises ConfigError for unknown blocks.
    """
    from diptych.models import reparameterize

    kept = {}
    for name, counts in structure.items():
        if "width" in counts:
            kind: Kind = "image" if name == "visual" else "text"
            full = len(outside(model, kind).norms[-1].weight)
            cut_width(model, kind, torch.arange(full) < counts["width"])
    for name, counts in structure.items():
        if reparameterize.FUSED in counts:
            reparameterize.fuse(model.clip, name)
        if "width" in counts or reparameterize.FUSED in counts:
            continue
        try:
            found = parts(model.clip.get_submodule(name), name)
        except AttributeError as error:
            raise ConfigError.at("The model has no such block", name, str(error), "a block of the configuration") from error
        kept[name] = (torch.arange(found.heads) < counts["heads"], torch.arange(found.neurons) < counts["neurons"])
    for name, (heads, neurons) in kept.items():
        cut(model.clip.get_submodule(name), heads, neurons, name)
    model.structure.update({name: dict(counts) for name, counts in structure.items()})


def open_clip_says(model: DualEncoder) -> str:
    """Whether open_clip can open the model as it is, and if not, why."""
    from diptych.models import reparameterize

    if not model.structure:
        return "yes"
    some = ", ".join(list(model.structure)[:2])
    if any("width" in counts for counts in model.structure.values()):
        return f"no: towers or blocks ({some}, …) have their own widths and numbers of heads and neurons, which open_clip's configuration cannot say"
    if any(reparameterize.FUSED in counts for counts in model.structure.values()):
        return f"no: {len(model.structure)} modules ({some}, …) are fused or cut, which open_clip's configuration cannot say"
    return (
        f"no: {len(model.structure)} blocks ({some}, …) have their own numbers of heads and neurons, which open_clip's configuration cannot say; "
        "the masked form opens there"
    )


class Place(NamedTuple):
    """A parameter, `leaf` of `owner`, and which of its dimensions is a tower's width."""

    owner: nn.Module
    leaf: str
    axis: int


class Outside(NamedTuple):
    """Of a tower, what has its width outside the blocks.

    Attributes:
        stem: the module whose input is the sum of the embeddings.
        embeddings: what is summed.
        norms: in front of and behind the blocks.
        projections: to the shared space.
        transformer: what holds the blocks.
    """

    stem: nn.Module
    embeddings: tuple[Place, ...]
    norms: tuple[nn.LayerNorm, ...]
    projections: tuple[Place, ...]
    transformer: Any


def outside(model: DualEncoder, kind: Kind) -> Outside:
    """The parts of a tower beside its blocks. Raises ConfigError for other towers than open_clip's plain transformers."""
    from open_clip.transformer import TextTransformer, VisionTransformer

    clip = model.clip
    tower: Any = clip.visual if kind == "image" else getattr(clip, "text", clip)
    position = Place(tower, "positional_embedding", 1)
    if kind == "image" and isinstance(tower, VisionTransformer) and tower.attn_pool is None:
        summed = (Place(tower.conv1, "weight", 0), Place(tower, "class_embedding", 0), position)
        norms = tuple(norm for norm in (tower.ln_pre, tower.ln_post) if isinstance(norm, nn.LayerNorm))
        return Outside(tower.ln_pre, summed, norms, (Place(tower, "proj", 0),), tower.transformer)
    plain = isinstance(tower, TextTransformer) or (tower is clip and hasattr(tower, "token_embedding"))
    if kind == "text" and plain and getattr(tower, "cls_emb", None) is None and not hasattr(clip, "text_decoder"):
        projection: Any = tower.text_projection
        places = (Place(projection, "weight", 1) if isinstance(projection, nn.Module) else Place(tower, "text_projection", 0),)
        embeddings = (Place(tower.token_embedding, "weight", 1), position)
        return Outside(tower.transformer, embeddings, (tower.ln_final,), () if projection is None else places, tower.transformer)
    raise ConfigError.at(
        f"The width of the {kind} tower cannot be told apart", "towers", type(tower).__name__, "open_clip's own transformers"
    )


@torch.no_grad()
def cut_width(model: DualEncoder, kind: Kind, keep: Tensor) -> None:
    """Removes features of a tower's width, in place, from everything that has it, and notes what is left in `structure`.

    Args:
        keep: bool `[D]`, True stays; at least one does.
    """
    assert bool(keep.any()), "a tower without width gives nothing"
    if bool(keep.all()):
        return
    found, left = outside(model, kind), int(keep.sum())
    for place in (*found.embeddings, *found.projections):
        _narrow(place, keep)
    for norm in found.norms:
        _narrow_norm(norm, keep)
    for block in found.transformer.resblocks:
        cut_block_width(block, keep)
    for owner in {place.owner for place in (*found.embeddings, *found.projections)}:
        for name in ("out_channels", "embedding_dim", "in_features"):
            if hasattr(owner, name):
                setattr(owner, name, left)
    found.transformer.width = left
    model.structure["visual" if kind == "image" else "text"] = {"width": left}


@torch.no_grad()
def cut_block_width(block: nn.Module, keep: Tensor, name: str = "block") -> None:
    """`cut_width` of one of open_clip's own blocks."""
    found = parts(block, name)
    if not isinstance(getattr(block, "ln_1", None), nn.LayerNorm):
        raise ConfigError.at("The width of this block cannot be cut", name, type(block).__name__, "open_clip's own blocks")
    features = torch.ones(3 * found.heads * found.head_width, dtype=torch.bool)
    attention = _cut_attention(found, found.heads, features, found.out)
    block.attn = attention
    layers = (Place(attention, "in_proj_weight", 1), Place(found.inner, "weight", 1))
    outputs = [Place(layer, leaf, 0) for layer in (found.out, found.outer) for leaf in ("weight", "bias")]
    scales = [Place(module, "gamma", 0) for module in block.children() if isinstance(getattr(module, "gamma", None), nn.Parameter)]
    for place in (*layers, *outputs, *scales):
        _narrow(place, keep)
    for norm in block.children():
        if isinstance(norm, nn.LayerNorm):
            _narrow_norm(norm, keep)
    attention.embed_dim = found.inner.in_features = found.out.out_features = found.outer.out_features = int(keep.sum())


def _narrow_norm(norm: nn.LayerNorm, keep: Tensor) -> None:
    norm.normalized_shape = (int(keep.sum()),)
    for leaf in ("weight", "bias"):
        _narrow(Place(norm, leaf, 0), keep)


def _narrow(place: Place, keep: Tensor) -> None:
    """A parameter, where there is one, and its mask, less some of a dimension."""
    owner, leaf, axis = place
    value = getattr(owner, leaf, None)
    if value is None:
        return
    chosen = keep.nonzero()[:, 0].to(value.device)
    setattr(owner, leaf, nn.Parameter(value.detach().index_select(axis, chosen).clone(), requires_grad=value.requires_grad))
    mask = getattr(owner, leaf + MASK, None)
    if isinstance(mask, Tensor):
        owner.register_buffer(leaf + MASK, mask.index_select(axis, chosen).clone())
