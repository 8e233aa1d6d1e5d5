from __future__ import annotations

import numpy as np
import torch
from _ranks import run_ranks

from diptych.train import sync


def on_rank(rank: int, world: int) -> dict[str, object]:
    sync.BUCKET_BYTES = 40  # several buckets, and one tensor larger than a bucket
    shapes, rng = [(3,), (2, 4), (20,), (), (5,)], np.random.default_rng(rank)
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    for parameter in parameters[:-1]:
        parameter.grad = torch.from_numpy(np.asarray(rng.normal(size=parameter.shape), dtype=np.float32))
    parameters[1].grad = parameters[1].grad.double().float()  # type: ignore[union-attr]
    sync.average_gradients(parameters, world)
    start = [torch.full((2,), float(rank)), torch.tensor(rank)]
    sync.broadcast(start, world)
    return {
        "gradients": [None if parameter.grad is None else parameter.grad.numpy() for parameter in parameters],
        "agreed": sync.agree([rank == 1, False, True], world, "cpu"),
        "mean": sync.mean([rank, 10.0], world, "cpu"),
        "start": [tensor.tolist() for tensor in start],
    }


def test_ranks_agree() -> None:
    results = run_ranks(2, on_rank)
    gradients = []
    for rank in range(2):
        rng = np.random.default_rng(rank)
        gradients.append([np.asarray(rng.normal(size=shape), dtype=np.float32) for shape in [(3,), (2, 4), (20,), ()]])
    for result in results:
        for ours, a, b in zip(result["gradients"], *gradients, strict=False):
            np.testing.assert_allclose(ours, (a + b) / 2, rtol=1e-6)
        assert result["gradients"][-1] is None
        assert result["agreed"] == [True, False, True]
        assert result["mean"] == [0.5, 10.0]
        assert result["start"] == [[0.0, 0.0], 0]


def test_alone_nothing_happens() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    sync.average_gradients([parameter], 1)
    assert parameter.grad.tolist() == [1, 1]
    assert sync.agree([True, False], 1, "cpu") == [True, False]
    assert sync.mean([2.0], 1, "cpu") == [2.0]
