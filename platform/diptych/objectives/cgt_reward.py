"""What CgT-GAN's generator is rewarded with: an aggregated text target, CLIP's opinion, a discriminator's, and the policy gradient.

Source: CgT-GAN: CLIP-guided Text GAN for Image Captioning (ACM MM 2023). A feature is raw: it is not normalised where the text says so.

Shape legend: N captions or pictures, T corpus sentences, S samples a picture, D feature width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

Baseline = Literal["greedy", "sample"]


def aggregate(image_ND: Tensor, corpus_TD: Tensor, sharpness: float) -> Tensor:
    """The text that a picture should have, `[N, D]` float64: its softmax-weighted mean of raw corpus features (CLIP-agg).

    Weights are `softmax(sharpness * cosine)` over the corpus; the features that are averaged keep their norms. Directions have the
    features' own precision, all that follows is in float64, from the largest cosine down, so that no sharpness overflows.
    """
    cosine_NT = normalize(image_ND, dim=-1).double() @ normalize(corpus_TD, dim=-1).double().T
    return (sharpness * cosine_NT).softmax(dim=-1) @ corpus_TD.double()


class Reward(NamedTuple):
    """CLIP's reward of each caption `[N]` and what it is made of, all times the scale of the logits."""

    total_N: Tensor
    l1_N: Tensor
    cos_N: Tensor
    clip_N: Tensor


def clip_reward(
    text_ND: Tensor, target_ND: Tensor, image_ND: Tensor, scale: float, cos_weight: float = 0.5, clip_weight: float = 0.0
) -> Reward:
    """How near a caption comes to its target text and to its picture, from raw features.

    `(1 - clip_weight) (cos_weight cos + (1 - cos_weight) l1) + clip_weight clip`, with `cos` and `clip` the cosines with target and picture,
    and `l1` one minus the mean absolute difference to the target, un-normalised: it changes with the norm of the features and may be far
    below zero.
    """
    unit_ND = normalize(text_ND, dim=-1)
    cos_N = scale * (unit_ND * normalize(target_ND, dim=-1)).sum(dim=-1)
    l1_N = scale * (1 - (target_ND - text_ND).abs().mean(dim=-1))
    clip_N = scale * (unit_ND * normalize(image_ND, dim=-1)).sum(dim=-1)
    near_N = cos_weight * cos_N + (1 - cos_weight) * l1_N
    return Reward((1 - clip_weight) * near_N + clip_weight * clip_N, l1_N, cos_N, clip_N)


def advantage(reward_NS: Tensor, greedy_N: Tensor | None) -> Tensor:
    """What each sample is better than its baseline, `[N, S]`: the greedy caption's reward, or (None) the mean of the other samples'."""
    if greedy_N is not None:
        return reward_NS - greedy_N[:, None]
    samples = reward_NS.shape[1]
    return reward_NS - (reward_NS.sum(dim=1, keepdim=True) - reward_NS) / (samples - 1)


def policy_loss(logprob_NS: Tensor, advantage_NS: Tensor) -> Tensor:
    """The loss whose gradient is the policy's: the mean of `- log-probability * advantage`; the advantage is a constant."""
    return -(logprob_NS * advantage_NS.detach()).mean()


def clip_weight(updates: int, wait: int = 150, ramp: int = 2350, weight: float = 0.5) -> float:
    """The weight of CLIP's loss beside the discriminator's after some updates: 0 while waiting, then linear to `weight`, then constant."""
    return weight * min(1.0, max(0, updates - wait) / ramp) if ramp else weight * (updates >= wait)


def combined(clip_loss: Tensor, critic_loss: Tensor, weight: float) -> Tensor:
    """The generator's loss: `weight` of CLIP's, the rest of the discriminator's."""
    return weight * clip_loss + (1 - weight) * critic_loss


def discriminator_loss(real_N: Tensor, sampled_M: Tensor) -> Tensor:
    """Binary cross-entropy of the discriminator's logits over real and sampled sentences together."""
    logit = torch.cat([real_N, sampled_M])
    label = torch.cat([torch.ones_like(real_N), torch.zeros_like(sampled_M)])
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
