"""Which tokens of a picture are worth keeping: maps of attention moved from one crop of a picture to another, and the cells that stay.

Yang et al., "Attentive Mask CLIP" (ICCV 2023), section 3.2. Maps are over a square grid of patches, row by row.

Shape legend: N pictures, G patches a side, P = G * G patches, K patches that are kept; a box is left, top, width, height in pixels of the whole
picture, and 1 if its contents are mirrored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def kept_cells(cells: int, share: float) -> int:
    """How many of the cells stay: `int(cells * share) + 1`, at most all of them; for 49 cells and a half 25."""
    return min(cells, int(cells * share) + 1)


def keep(score_NP: Tensor, share: float, cell: int = 2) -> Tensor:
    """Which patches stay, bool `[N, P]`: those of the cells of the highest scores, equally many in every picture.

    Args:
        score_NP: the higher, the rather a patch stays.
        share: of the cells that stay, in (0, 1].
        cell: patches along each side of a cell; divides G. A cell's score is the map, resized (bilinear) to one value a cell.
    """
    side = math.isqrt(score_NP.shape[1])
    assert side * side == score_NP.shape[1], f"{score_NP.shape[1]} patches are no square"
    assert side % cell == 0, f"{side} patches do not divide into cells of {cell}"
    cells = side // cell
    score_NC = interpolate(score_NP.view(-1, 1, side, side), (cells, cells), mode="bilinear", align_corners=False).flatten(1)
    best_NC = score_NC.argsort(dim=1, descending=True, stable=True)[:, : kept_cells(cells * cells, share)]
    kept_NC = torch.zeros_like(score_NC, dtype=torch.bool).scatter(1, best_NC, True)
    kept_NGG = kept_NC.view(-1, cells, cells).repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
    return kept_NGG.flatten(1)


def places(kept_NP: Tensor) -> Tensor:
    """The places of what stays, int64 `[N, K]`, rising; every row must keep equally many."""
    return kept_NP.nonzero()[:, 1].view(len(kept_NP), -1)


def moved(map_NP: Tensor, from_N5: Tensor, to_N5: Tensor) -> Tensor:
    """A map over one crop of a picture as a map over another, `[N, P]`.

    As if it were resized to the pixels of its crop, cut where the other one lies (0 outside), and resized to the grid again, bilinear both
    times. Both steps work on rows and columns apart, so that each is a matrix a picture.
    """
    side = math.isqrt(map_NP.shape[1])
    (left_N, top_N, width_N, height_N, mirrored_N), (x_N, y_N, w_N, h_N, flip_N) = from_N5.unbind(dim=1), to_N5.unbind(dim=1)
    map_NGG = map_NP.view(-1, side, side)
    map_NGG = torch.where(mirrored_N[:, None, None] > 0, map_NGG.flip(2), map_NGG)
    row_NGG = _resampled(side, y_N - top_N, h_N, height_N).to(map_NP)
    column_NGG = _resampled(side, x_N - left_N, w_N, width_N).to(map_NP)
    other_NGG = row_NGG @ map_NGG @ column_NGG.transpose(1, 2)
    return torch.where(flip_N[:, None, None] > 0, other_NGG.flip(2), other_NGG).flatten(1)


def _resampled(side: int, start_N: Tensor, length_N: Tensor, whole_N: Tensor) -> Tensor:
    """Along one axis: from G values over `whole_N` pixels to G values over `length_N` pixels from `start_N` on; float64 `[N, G, G]`."""
    out_G = torch.arange(side, dtype=torch.float64, device=start_N.device) + 0.5
    down_NG = (out_G * length_N[:, None] / side - 0.5).clamp(min=0)
    result_NGG = torch.zeros(len(start_N), side, side, dtype=torch.float64, device=start_N.device)
    for pixel_NG, weight_NG in _neighbours(down_NG, length_N[:, None] - 1):
        source_NG = pixel_NG + start_N[:, None]
        inside_NG = (source_NG >= 0) & (source_NG < whole_N[:, None])
        up_NG = ((source_NG + 0.5) * side / whole_N[:, None] - 0.5).clamp(min=0, max=side - 1)
        for value_NG, share_NG in _neighbours(up_NG, torch.full_like(whole_N, side - 1)[:, None]):
            result_NGG.scatter_add_(2, value_NG[..., None], (inside_NG * weight_NG * share_NG)[..., None])
    return result_NGG


def _neighbours(place_NG: Tensor, last_N1: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two whole places around each, none beyond the last, with their weights."""
    low_NG = place_NG.floor().long()
    rest_NG = place_NG - low_NG
    return (torch.minimum(low_NG, last_N1), 1 - rest_NG), (torch.minimum(low_NG + 1, last_N1), rest_NG)
