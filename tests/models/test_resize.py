from __future__ import annotations

import pytest
import torch

from diptych.core.errors import ConfigError
from diptych.models import clip
from diptych.models.resize import features, interpolated


def test_the_interpolation_is_open_clips() -> None:
    from open_clip.model import resize_pos_embed

    model = clip.create("vit-micro-40", 0)
    other = clip.create("vit-micro-40", 0, {"vision_cfg": {"image_size": 24}})
    state = {name: value.clone() for name, value in model.clip.state_dict().items()}
    resize_pos_embed(state, other.clip)
    side = 24 // other.clip.visual.patch_size[0]
    ours = interpolated(model.clip.visual.positional_embedding, (side, side))
    torch.testing.assert_close(ours, state["visual.positional_embedding"])
    other.clip.load_state_dict(state)
    image_NCHW = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encode_image(image_NCHW), other.encode_image(image_NCHW))


@pytest.mark.parametrize(("name", "size"), [("vit-micro-40", 24), ("vit-micro-40", 48), ("rn-nano-64", 32), ("rn-nano-64", 96)])
def test_pictures_of_other_sizes_teach_the_same_weights(name: str, size: int) -> None:
    model = clip.create(name, 0).eval()
    model.check_image_size(size)
    image_NCHW = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model.encode_image(image_NCHW)[:, 0].sum().backward()
    named = dict(model.clip.visual.named_parameters())
    embedding = named.get("positional_embedding", named.get("attnpool.positional_embedding"))
    assert embedding.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert (
        embedding.shape
        == dict(clip.create(name, 0).clip.visual.named_parameters())[
            "positional_embedding" if "positional_embedding" in named else "attnpool.positional_embedding"
        ].shape
    )  # type: ignore[union-attr]


def test_its_own_size_takes_the_plain_way() -> None:
    model = clip.create("vit-micro-40", 0).eval()
    image_NCHW = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(features(model.clip.visual, image_NCHW), model.clip.encode_image(image_NCHW, normalize=False))


@pytest.mark.parametrize("size", [20, 0, 41])
def test_a_size_that_cuts_patches_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="does not divide into patches"):
        clip.create("vit-micro-40", 0).check_image_size(size)


def test_positions_stay_at_their_size_and_keep_their_order_at_another() -> None:
    table = torch.cat([torch.full((1, 1), 9.0), torch.arange(4.0).repeat_interleave(4)[:, None]])
    assert interpolated(table, (4, 4)) is table
    larger = interpolated(table, (8, 8))
    assert larger.shape == (65, 1)
    assert larger[0] == 9
    grid = larger[1:].view(8, 8)
    assert (grid[1:] >= grid[:-1] - 1e-4).all(), "rows stay rows"
    torch.testing.assert_close(grid, grid[:, :1].expand(8, 8))
