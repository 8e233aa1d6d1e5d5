"""Cells that stay, and maps that move between crops: against the plain way over pixels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from diptych.objectives.token_selection import keep, kept_cells, moved, places


def test_half_of_the_cells_and_one_more_stay() -> None:
    assert [kept_cells(49, share) for share in (0.25, 0.5, 0.75, 1.0)] == [13, 25, 37, 49]
    score = torch.arange(64.0).view(1, 64)
    kept = keep(score, 0.5).view(8, 8)
    assert int(kept.sum()) == 9 * 4
    assert kept[-4:].all()
    assert kept[2:4].sum() == 4
    assert kept[2:4, 6:].all(), "the ninth cell is the last of its row"
    assert places(kept.view(1, 64))[0].tolist() == kept.flatten().nonzero()[:, 0].tolist()


def test_equal_scores_keep_equally_many() -> None:
    kept = keep(torch.zeros(3, 16), 0.5, cell=1)
    assert kept.sum(dim=1).tolist() == [9, 9, 9]


def by_pixels(map_GG: torch.Tensor, source: list[int], target: list[int]) -> torch.Tensor:
    """Resize, cut, resize."""
    (left, top, width, height, mirrored), (x, y, w, h, flip) = source, target
    side = len(map_GG)
    map_GG = map_GG.flip(1) if mirrored else map_GG
    large = interpolate(map_GG[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    canvas = torch.zeros(200, 200, dtype=map_GG.dtype)
    canvas[top : top + height, left : left + width] = large
    small = interpolate(canvas[None, None, y : y + h, x : x + w], (side, side), mode="bilinear", align_corners=False)[0, 0]
    return small.flip(1) if flip else small


@pytest.mark.parametrize("side", [4, 7])
def test_moving_a_map_is_resizing_cutting_and_resizing(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    maps = torch.rand(5, side, side, generator=generator, dtype=torch.float64)
    source = torch.tensor([[0, 0, 50, 40, 0], [10, 20, 90, 60, 0], [5, 5, 3, 2, 0], [0, 10, 64, 64, 1], [30, 30, 20, 20, 0]])
    target = torch.tensor([[0, 0, 50, 40, 0], [30, 25, 40, 50, 0], [5, 5, 3, 2, 1], [7, 13, 33, 21, 1], [20, 40, 40, 40, 0]])
    found = moved(maps.flatten(1), source, target).view(5, side, side)
    for row in range(5):
        torch.testing.assert_close(found[row], by_pixels(maps[row], source[row].tolist(), target[row].tolist()))


def test_a_mirrored_view_has_a_mirrored_map() -> None:
    maps, box = torch.rand(1, 16, dtype=torch.float64), torch.tensor([[0, 0, 32, 32, 0]])
    mirrored = moved(maps, box, torch.tensor([[0, 0, 32, 32, 1]])).view(4, 4)
    torch.testing.assert_close(mirrored.flip(1), moved(maps, box, box).view(4, 4))
