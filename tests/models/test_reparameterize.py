"""Fused blocks are the same function in evaluation mode, whatever they are made of, and are kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.models.fastvit import encoder, unsettled
from timm.models import fastvit
from torch import Tensor, nn

from diptych.core.errors import ConfigError, DataError
from diptych.models import clip, reparameterize, structure

BLOCKS: dict[str, Any] = {
    "stem": lambda: fastvit.MobileOneBlock(3, 8, 3, stride=2),
    "several": lambda: fastvit.MobileOneBlock(6, 6, 3, num_conv_branches=3),
    "groups": lambda: fastvit.MobileOneBlock(6, 6, 3, group_size=3),
    "depthwise": lambda: fastvit.MobileOneBlock(6, 6, 5, group_size=1, use_act=False),
    "pointwise": lambda: fastvit.MobileOneBlock(6, 6, 1),
    "squeeze": lambda: fastvit.MobileOneBlock(6, 12, 3, use_se=True),
    "norm-alone": lambda: fastvit.MobileOneBlock(6, 6, 3, group_size=1, use_scale_branch=False, num_conv_branches=0),
    "mixer": lambda: fastvit.RepMixer(6, layer_scale_init_value=0.7),
    "mixer-unscaled": lambda: fastvit.RepMixer(6, layer_scale_init_value=None),
    "large": lambda: fastvit.ReparamLargeKernelConv(6, 12, 7, stride=2, group_size=1, small_kernel=3),
    "position": lambda: fastvit.RepConditionalPosEnc(6, spatial_shape=(7, 7)),
}


def picture(channels: int = 6) -> Tensor:
    return torch.randn(2, channels, 9, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_fused_block_is_the_same_function(kind: str) -> None:
    block: nn.Module = unsettled(nn.Sequential(BLOCKS[kind]())).double().eval()
    x = picture(3 if kind == "stem" else 6)
    with torch.no_grad():
        expected = block(x)
        reparameterize.fuse(block, "0")
        found = block(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01
    assert not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())


def test_it_is_the_same_in_evaluation_mode_alone() -> None:
    block = unsettled(nn.Sequential(BLOCKS["several"]())).double().train()
    with torch.no_grad():
        batch = block(picture())
        reparameterize.fuse(block, "0")
        assert not torch.allclose(block(picture()), batch, atol=1e-2)


def test_a_kernel_of_one_row_is_fused_too() -> None:
    """MobileCLIP's text tower mixes along a caption: kernels of 1 x k."""
    torch.manual_seed(0)
    wide, narrow = nn.Conv2d(4, 4, (1, 5), padding=(0, 2), groups=4).double(), nn.Conv2d(4, 4, 1, groups=4, bias=False).double()
    norm = unsettled(nn.BatchNorm2d(4)).double().eval()
    x = torch.randn(2, 4, 1, 9, dtype=torch.float64)
    with torch.no_grad():
        kernels = [
            reparameterize.Kernel(wide.weight, wide.bias),
            reparameterize.normed(narrow.weight, reparameterize.Norm.of(norm)),
            reparameterize.normed(reparameterize.identity(narrow.weight), reparameterize.Norm.of(norm)),
        ]
        whole = reparameterize.added(kernels, (1, 5))
        found = nn.functional.conv2d(x, *whole, padding=(0, 2), groups=4)
        torch.testing.assert_close(found, wide(x) + norm(narrow(x)) + norm(x), rtol=1e-9, atol=1e-12)


def test_a_convolutions_own_bias_is_kept() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3), unsettled(nn.BatchNorm2d(5)).eval()
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        kernel = reparameterize.normed(conv.weight, reparameterize.Norm.of(norm), conv.bias)
        torch.testing.assert_close(nn.functional.conv2d(x, *kernel), norm(conv(x)), rtol=1e-5, atol=1e-5)


def test_every_part_of_a_whole_tower_is_found() -> None:
    tower = unsettled(timm.create_model("fastvit_sa12", num_classes=0)).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tower(x)
        names = reparameterize.fusible(tower)
        assert {type(tower.get_submodule(name)) for name in names} == set(reparameterize._kinds())
        for name in names:
            reparameterize.fuse(tower, name)
        torch.testing.assert_close(tower(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert reparameterize.fusible(tower) == []


def test_a_fused_encoder_is_read_again(tmp_path: Path) -> None:
    model = encoder()
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert reparameterize.fuse_encoder(model) == 20
    assert structure.open_clip_says(model).startswith("no: ")
    clip.save(model, tmp_path / "fused", {})
    again = clip.load(tmp_path / "fused").eval()
    with torch.no_grad():
        assert torch.equal(again.encode_image(x), model.encode_image(x))
    assert again.structure == model.structure
    assert reparameterize.fuse_encoder(again) == 0, "once is enough"


def test_a_note_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = encoder()
    model.structure["visual.head"] = {"fused": 1}
    clip.save(model, tmp_path / "odd", {})
    with pytest.raises(DataError, match="structure cannot be read"):
        clip.load(tmp_path / "odd")


def test_what_cannot_be_fused_is_refused() -> None:
    block = nn.Sequential(BLOCKS["mixer"](), nn.Conv2d(6, 6, 3))
    with pytest.raises(ConfigError, match="cannot be re-parameterised"):
        reparameterize.fuse(block, "1")
    reparameterize.fuse(block, "0")
    with pytest.raises(ConfigError, match="not fused yet"):
        reparameterize.fuse(block, "0")
