from __future__ import annotations

import pytest
import torch

from diptych.models import convnet
from diptych.models.convnet import NetShape

SMALL = NetShape(channels=3, classes=4, width=5, depth=2, size=8)


@pytest.mark.parametrize(("channels", "size"), [(3, 8), (3, 9), (1, 8), (1, 28)])
def test_logits_of_every_size_and_of_grey_pictures(channels: int, size: int) -> None:
    net = convnet.create(NetShape(channels, 4, 5, 2, size), seed=0)
    assert net(torch.randn(2, channels, size, size)).shape == (2, 4)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (convnet.flatten(convnet.create(SMALL, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_flat_parameters_are_a_copy_and_run_as_the_module_does() -> None:
    net, image = convnet.create(SMALL, 0), torch.randn(3, 3, 8, 8)
    flat = convnet.flatten(net)
    torch.testing.assert_close(convnet.run(net, flat, image), net(image))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert flat.abs().sum() > 0
    assert not torch.equal(convnet.run(net, flat, image), net(image))


def test_a_training_step_can_be_differentiated_twice() -> None:
    net = convnet.create(SMALL, 0).double()
    flat = convnet.flatten(net).requires_grad_(True)
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(convnet.run(net, flat, image).square().sum(), flat, create_graph=True)
    (mixed,) = torch.autograd.grad(slope.square().sum(), image)
    assert mixed.abs().sum() > 0
