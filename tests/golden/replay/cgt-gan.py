"""CgT-GAN: the aggregated target, rewards and policy gradients, the discriminator's loss, decoding with its log-probabilities, the weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diptych.models.decoding import Vocabulary, decode, filtered, mean_logprob, said
from diptych.objectives.cgt_reward import (
    advantage,
    aggregate,
    clip_reward,
    clip_weight,
    combined,
    discriminator_loss,
    policy_loss,
)

INPUTS = (
    "agg_image",
    "agg_corpus",
    "agg_t",
    "rw_image",
    "rw_target",
    "rw_sample_text",
    "rw_greedy_text",
    "rw_logit_scale",
    "rw_cos_weight",
    "rw_clip_weight",
    "rw_critic_sample",
    "rw_critic_greedy",
    "rw_greedy_logprob",
    "rw_sample_logprob",
    "disc_logits",
    "disc_labels",
    "dec_logits",
    "dec_eos",
    "dec_pad",
    "dec_max_length",
    "dec_sample_temperature",
    "dec_sample_top_k",
    "dec_sample_tokens",
    "dec_sample_logprob",  # held against ours in `_check_samples`: it counts a token that the vectors do not hold
    "sched_step",
)
TOLERANCE = {
    "agg_out_*": (1e-9, 1e-12),
    "rw_*": (1e-5, 1e-5),
    "disc_loss": (1e-5, 0.0),
    "dec_*_logprob": (1e-5, 1e-6),
    "sched_w": (1e-12, 1e-15),
    "g_loss": (1e-5, 1e-5),
}
Vectors = Mapping[str, np.ndarray]


def replay(vectors: Vectors) -> dict[str, np.ndarray]:
    rewards = _rewards(vectors)
    weights = [clip_weight(int(step)) for step in vectors["sched_step"]]
    losses = [torch.tensor(rewards[name]) for name in ("rw_greedy_loss", "rw_greedy_critic_loss")]
    generator = np.asarray([float(combined(*losses, weight)) for weight in weights])
    return _targets(vectors) | rewards | _discriminator(vectors) | _decodes(vectors) | {"sched_w": np.asarray(weights), "g_loss": generator}


def _targets(vectors: Vectors) -> dict[str, np.ndarray]:
    image_ND, corpus_TD = _tensor(vectors, "agg_image"), _tensor(vectors, "agg_corpus")
    targets = [aggregate(image_ND, corpus_TD, float(t)) for t in vectors["agg_t"]]
    return {f"agg_out_{index}": target_ND.numpy() for index, target_ND in enumerate(targets)}


def _rewards(vectors: Vectors) -> dict[str, np.ndarray]:
    image_ND, target_ND, sample_MD, greedy_ND = (
        _tensor(vectors, f"rw_{name}") for name in ("image", "target", "sample_text", "greedy_text")
    )
    count, samples = len(image_ND), len(sample_MD) // len(image_ND)
    scale, cos, clip = (float(vectors[f"rw_{name}"]) for name in ("logit_scale", "cos_weight", "clip_weight"))
    of_sample = clip_reward(
        sample_MD, target_ND.repeat_interleave(samples, dim=0), image_ND.repeat_interleave(samples, dim=0), scale, cos, clip
    )
    of_greedy = clip_reward(greedy_ND, target_ND, image_ND, scale, cos, clip)
    outputs = {"rw_scores": torch.cat([of_sample.total_N, of_greedy.total_N]).numpy()}
    critic_NS, critic_N = _tensor(vectors, "rw_critic_sample").view(count, samples), _tensor(vectors, "rw_critic_greedy")
    for baseline in ("greedy", "sample"):
        pairs = {"": (of_sample.total_N.view(count, samples), of_greedy.total_N), "critic_": (critic_NS, critic_N)}
        for name, (reward_NS, greedy_N) in pairs.items():
            logprob_M = _tensor(vectors, f"rw_{baseline}_logprob").requires_grad_()
            loss = policy_loss(logprob_M.view(count, samples), advantage(reward_NS, greedy_N if baseline == "greedy" else None))
            outputs[f"rw_{baseline}_{name}loss"] = np.float64(loss.item())
            outputs[f"rw_{baseline}_{name}grad"] = torch.autograd.grad(loss, logprob_M)[0].numpy()
        parts = [of_sample.l1_N, of_sample.cos_N, of_sample.clip_N]
        # The released code logs all but the last N scores, also where no greedy ones stand behind the samples.
        logged = parts if baseline == "greedy" else [part[:-count] for part in parts]
        outputs[f"rw_{baseline}_mean_scores"] = np.asarray([float(part.mean()) for part in logged])
    return outputs


def _discriminator(vectors: Vectors) -> dict[str, np.ndarray]:
    logits, real = _tensor(vectors, "disc_logits"), _tensor(vectors, "disc_labels") > 0.5
    return {"disc_loss": np.float64(discriminator_loss(logits[real], logits[~real]).item())}


def _decodes(vectors: Vectors) -> dict[str, np.ndarray]:
    logits_LNV, length = _tensor(vectors, "dec_logits"), int(vectors["dec_max_length"])
    vocabulary = Vocabulary(bos=-1, eos=int(vectors["dec_eos"]), pad=int(vectors["dec_pad"]))
    greedy = decode(lambda token_NL: logits_LNV[token_NL.shape[1] - 1], logits_LNV.shape[1], vocabulary, length, force_end=True)
    token_NL = greedy.token_NL[:, 1:].numpy()
    token_NL = np.pad(token_NL, ((0, 0), (0, length - token_NL.shape[1])), constant_values=vocabulary.pad)
    logprob_NLV = filtered(logits_LNV.transpose(0, 1), float(vectors["dec_sample_temperature"]), int(vectors["dec_sample_top_k"]))
    _check_samples(logprob_NLV, torch.tensor(vectors["dec_sample_tokens"]), _tensor(vectors, "dec_sample_logprob"), vocabulary.eos)
    return {"dec_greedy_tokens": token_NL, "dec_greedy_logprob": greedy.logprob_N.numpy()}


def _check_samples(logprob_NLV: Tensor, token_NL: Tensor, expected_N: Tensor, eos: int) -> None:
    """Scores the given samples again.

    A sample that reached the limit has its last token overwritten by the end, while its log-probability is that of the token that was drawn,
    which nobody wrote down: there, what is missing must be the log-probability of one of the tokens that could be drawn.
    """
    length_N = said(token_NL, eos).sum(dim=1)
    cut_N = length_N == token_NL.shape[1]
    whole_N = mean_logprob(logprob_NLV, token_NL, eos)
    torch.testing.assert_close(whole_N[~cut_N], expected_N[~cut_N], rtol=1e-5, atol=1e-6)
    before_NL = logprob_NLV[:, :-1].gather(2, token_NL[:, :-1, None])[..., 0]
    for row in cut_N.nonzero()[:, 0].tolist():
        missing = expected_N[row] * length_N[row] - before_NL[row].sum()
        assert (logprob_NLV[row, -1] - missing).abs().min() < 1e-4, f"sample {row} ends with a token that could not be drawn"


def _tensor(vectors: Vectors, name: str) -> Tensor:
    return torch.tensor(vectors[name])
