from __future__ import annotations

import numpy as np
import pytest
import torch

from diptych.objectives.cgt_reward import advantage, aggregate, clip_reward, clip_weight, combined, discriminator_loss, policy_loss


def test_the_target_is_a_mean_of_raw_features_by_direction_alone() -> None:
    corpus = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    image = torch.tensor([[5.0, 0.0]])
    assert aggregate(image, corpus, 1e-9)[0].tolist() == pytest.approx([1.5, 0.5])
    assert aggregate(image, corpus, 1e4)[0].tolist() == pytest.approx([3.0, 0.0])  # no overflow
    torch.testing.assert_close(aggregate(image * 7, corpus * 1, 3.0), aggregate(image, corpus, 3.0))
    assert aggregate(image, corpus, 1.0).dtype == torch.float64


def test_the_reward_is_made_of_its_parts() -> None:
    text, target, image = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    reward = clip_reward(text, target, image, 100.0, cos_weight=0.25, clip_weight=0.5)
    assert [float(part[0]) for part in reward] == pytest.approx([80.0, 100.0, 100.0, 60.0])
    far = clip_reward(text * 10, target, image, 100.0, cos_weight=0.0)
    assert far.l1_N[0] < -1000  # norms count
    assert far.cos_N[0] == pytest.approx(100)


def test_baselines() -> None:
    reward = torch.tensor([[1.0, 2.0, 6.0]])
    assert advantage(reward, torch.tensor([2.0])).tolist() == [[-1, 0, 4]]
    assert advantage(reward, None).tolist() == [[-3, -1.5, 4.5]]


def test_the_policys_gradient_raises_what_was_better() -> None:
    logprob = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    policy_loss(logprob, torch.tensor([[2.0, -4.0]])).backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [[-1.0, 2.0]]


def test_weights_over_the_run() -> None:
    assert [clip_weight(step, 10, 20, 0.5) for step in (0, 10, 20, 30, 99)] == pytest.approx([0, 0, 0.25, 0.5, 0.5])
    assert [clip_weight(step, 3, 0, 1.0) for step in (2, 3)] == [0, 1]
    assert float(combined(torch.tensor(4.0), torch.tensor(2.0), 0.25)) == 2.5


def test_the_discriminators_loss() -> None:
    zero = discriminator_loss(torch.zeros(3), torch.zeros(5))
    assert float(zero) == pytest.approx(np.log(2))
    assert float(discriminator_loss(torch.full((3,), 9.0), torch.full((3,), -9.0))) < 1e-3
