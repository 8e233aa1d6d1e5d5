"""The symmetric contrastive loss on one process: what objectives train with and compressors measure by.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (ICML 2021), figure 3; for the affinities of a
teacher in the place of labels, Wu et al., TinyCLIP (ICCV 2023), section 3.1.

Shape legend: N pairs, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def symmetric_cross_entropy(image_logits: Tensor, text_logits: Tensor, label_N: Tensor) -> Tensor:
    """The mean of both directions' cross-entropy, in nats; rows are queries, `label_N[i]` is the column of row i's partner."""
    return (cross_entropy(image_logits, label_N) + cross_entropy(text_logits, label_N)) / 2


def affinity_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of the student's softmax over each row with the teacher's, the mean over the rows, in nats; the teacher gets no gradient."""
    return cross_entropy(student_logits, teacher_logits.detach().softmax(dim=1))


def contrastive_loss(image_ND: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss of a batch, in nats.

    Args:
        image_ND, text_ND: `[N, D]`, of unit norm; rows are partners.
        logit_scale: scalar, already exponentiated.
    """
    logits_NN = logit_scale * image_ND @ text_ND.T
    return symmetric_cross_entropy(logits_NN, logits_NN.T, torch.arange(len(logits_NN), device=logits_NN.device))
