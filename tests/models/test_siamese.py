from __future__ import annotations

import numpy as np
import pytest
import torch

from diptych.models.siamese import KINDS, Kind, augment


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_pictures_and_passes_gradients(kind: Kind) -> None:
    image = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    changed = augment(image, [kind], draw())
    assert changed.shape == image.shape
    assert not torch.equal(changed, image)
    (slope,) = torch.autograd.grad(changed.square().sum(), image)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_equal_draws_give_equal_pictures(kind: Kind) -> None:
    image = torch.randn(4, 1, 8, 8)
    assert torch.equal(augment(image, [kind], draw(3)), augment(image, [kind], draw(3)))


def test_without_kinds_nothing_happens() -> None:
    image = torch.randn(2, 1, 8, 8)
    assert augment(image, [], draw()) is image


def test_a_flip_mirrors_and_a_cutout_hides_at_most_a_quarter() -> None:
    image = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(40, 1, 8, 8)
    flipped = augment(image, ["flip"], draw())
    mirrored = [torch.equal(picture, image[0].flip(2)) for picture in flipped]
    assert 0 < sum(mirrored) < 40
    assert all(now or torch.equal(picture, image[0]) for now, picture in zip(mirrored, flipped, strict=True))
    hidden = (augment(image, ["cutout"], draw()) == 0).flatten(1).sum(dim=1)
    assert hidden.max() == 16
    assert hidden.min() > 0
