"""Re-parameterisation: parallel convolutions with batch norms become one convolution, the same function in evaluation mode.

Vasu et al., "MobileOne" (CVPR 2023), section 3.2, and "FastViT" (ICCV 2023), section 3.2, whose blocks MobileCLIP's towers are made of. Known modules
are timm's: MobileOne block, RepMixer, the large-kernel convolution between stages, the conditional position encoding.

Shape legend: O output channels, I input channels a group, h w a kernel's height and width, both odd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diptych.core.errors import ConfigError

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

EPS = 1e-5
FUSED = "fused"
"""The note of a fused module in an encoder's `structure`."""


class Norm(NamedTuple):
    """A batch norm in evaluation mode: gain, offset, mean and variance `[O]`."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float = EPS

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """That of a module."""
        return cls(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


class Kernel(NamedTuple):
    """A convolution: `[O, I, h, w]` and `[O]`."""

    weight: Tensor
    bias: Tensor


def normed(weight_OIhw: Tensor, norm: Norm, bias_O: Tensor | None = None) -> Kernel:
    """A convolution and the norm behind it."""
    gain_O = norm.weight / (norm.var + norm.eps).sqrt()
    offset_O = -norm.mean if bias_O is None else bias_O - norm.mean
    return Kernel(weight_OIhw * gain_O.reshape(-1, 1, 1, 1), norm.bias + offset_O * gain_O)


def identity(like_OIhw: Tensor) -> Tensor:
    """The kernel that changes nothing, in the shape of another; as many channels come out as go in, in any number of groups."""
    outputs, inputs, height, width = like_OIhw.shape
    assert outputs % inputs == 0, f"{outputs} channels do not divide into groups of {inputs}"
    weight_OIhw = torch.zeros_like(like_OIhw)
    channel_O = torch.arange(outputs, device=like_OIhw.device)
    weight_OIhw[channel_O, channel_O % inputs, height // 2, width // 2] = 1
    return weight_OIhw


def widened(kernel: Kernel, size: tuple[int, int]) -> Kernel:
    """The kernel in the middle of zeros, `[O, I, *size]`. Both sizes are odd, or differ by an even number."""
    rows, columns = (want - have for want, have in zip(size, kernel.weight.shape[2:], strict=True))
    assert min(rows, columns) >= 0 == rows % 2 + columns % 2, f"{tuple(kernel.weight.shape)} has no place in the middle of {size}"
    return Kernel(pad(kernel.weight, (columns // 2, columns // 2, rows // 2, rows // 2)), kernel.bias)


def added(kernels: Iterable[Kernel], size: tuple[int, int]) -> Kernel:
    """Parallel convolutions whose results are added, as one of the kernel size `size`."""
    wide = [widened(kernel, size) for kernel in kernels]
    return Kernel(torch.stack([each.weight for each in wide]).sum(dim=0), torch.stack([each.bias for each in wide]).sum(dim=0))


def mixed(scale_O: Tensor, mixer: Kernel, norm: Kernel) -> Kernel:
    """RepMixer: `x + scale * (mixer(x) - norm(x))` as one depthwise convolution (FastViT, equation 3)."""
    scale_O111 = scale_O.reshape(-1, 1, 1, 1)
    weight_OIhw = identity(mixer.weight) + scale_O111 * (mixer.weight - norm.weight)
    return Kernel(weight_OIhw, scale_O.reshape(-1) * (mixer.bias - norm.bias))


# ---------------------------------------------------------------- timm's modules


def _of_conv_norm(branch: Any) -> Kernel:
    return normed(branch.conv.weight, Norm.of(branch.bn), branch.conv.bias)


def _mobile_one(block: Any) -> Kernel:
    """MobileOne block: convolutions, a 1 x 1 one and the identity, each with its norm."""
    size = (block.kernel_size, block.kernel_size)
    branches = [_of_conv_norm(branch) for branch in block.conv_kxk or ()]
    if block.conv_scale is not None:
        branches.append(_of_conv_norm(block.conv_scale))
    if block.identity is not None:
        shape = (block.in_chs, block.in_chs // block.groups, 1, 1)
        branches.append(normed(identity(block.identity.weight.new_empty(shape)), Norm.of(block.identity)))
    return added(branches, size)


def _rep_mixer(mixer: Any) -> Kernel:
    gamma = getattr(mixer.layer_scale, "gamma", None)
    kernel = _mobile_one(mixer.mixer)
    scale_O = torch.ones_like(kernel.bias) if gamma is None else gamma
    return mixed(scale_O, kernel, _mobile_one(mixer.norm))


def _large_kernel(block: Any) -> Kernel:
    branches = [_of_conv_norm(block.large_conv)]
    if block.small_kernel is not None:
        branches.append(_of_conv_norm(block.small_conv))
    return added(branches, (block.kernel_size, block.kernel_size))


def _position(block: Any) -> Kernel:
    weight_OIhw = block.pos_enc.weight
    return Kernel(weight_OIhw + identity(weight_OIhw), block.pos_enc.bias)


class _Kind(NamedTuple):
    """How a module is fused, which of its convolutions has the stride and padding, and what is left out afterwards."""

    fuse: Callable[[Any], Kernel]
    like: Callable[[Any], nn.Conv2d]
    parts: tuple[str, ...]


def _stride_of_mobile_one(block: Any) -> nn.Conv2d:
    """A convolution with the block's stride and groups, and the padding that keeps the size."""
    kernel, groups = block.kernel_size, block.groups
    return nn.Conv2d(block.in_chs, block.out_chs, kernel, block.stride, kernel // 2 * block.dilation, block.dilation, groups)


def _kinds() -> dict[type[nn.Module], _Kind]:
    from timm.models import fastvit

    def mixes(mixer: Any) -> nn.Conv2d:
        return nn.Conv2d(mixer.dim, mixer.dim, mixer.kernel_size, padding=mixer.kernel_size // 2, groups=mixer.dim)

    return {
        fastvit.RepMixer: _Kind(_rep_mixer, mixes, ("mixer", "norm", "layer_scale")),
        fastvit.MobileOneBlock: _Kind(_mobile_one, _stride_of_mobile_one, ("conv_kxk", "conv_scale", "identity")),
        fastvit.ReparamLargeKernelConv: _Kind(_large_kernel, lambda block: block.large_conv.conv, ("large_conv", "small_conv")),
        fastvit.RepConditionalPosEnc: _Kind(_position, lambda block: block.pos_enc, ("pos_enc",)),
    }


def fusible(model: nn.Module) -> list[str]:
    """The names of the modules that can be fused and are not yet; those inside another such module go with it."""
    kinds, found = tuple(_kinds()), list[str]()
    for name, module in model.named_modules():
        whole = isinstance(module, kinds) and getattr(module, "reparam_conv", None) is None
        if whole and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


@torch.no_grad()
def fuse(model: nn.Module, name: str) -> None:
    """Fuses a module of a model in place: its convolutions and norms go, `reparam_conv` comes. Raises ConfigError for another kind."""
    module: Any = model.get_submodule(name)
    kind = next((kind for known, kind in _kinds().items() if isinstance(module, known)), None)
    if kind is None or module.reparam_conv is not None:
        expected = "a MobileOne block, RepMixer, large-kernel convolution or position encoding of timm, not fused yet"
        raise ConfigError.at("The module cannot be re-parameterised", name, type(module).__name__, expected)
    like, kernel = kind.like(module), kind.fuse(module)
    shape = {key: getattr(like, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
    conv = nn.Conv2d(like.in_channels, like.out_channels, **shape, bias=True, device=kernel.weight.device, dtype=kernel.weight.dtype)
    conv.weight.copy_(kernel.weight)
    conv.bias.copy_(kernel.bias)  # type: ignore[union-attr]
    for part in kind.parts:
        if hasattr(module, part):
            delattr(module, part)
    module.reparam_conv = conv.train(module.training)
    if hasattr(module, "inference_mode"):
        module.inference_mode = True


def fuse_encoder(model: DualEncoder) -> int:
    """Fuses all there is to fuse in an encoder and notes it in its `structure`, so that its directory can be read again. How many it were."""
    names = fusible(model.clip)
    for name in names:
        fuse(model.clip, name)
        model.structure[name] = {FUSED: 1}
    return len(names)
