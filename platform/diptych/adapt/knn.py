"""Weighted k nearest neighbours among the labelled features: the baseline that every adapter with a memory is measured against.

A neighbour of cosine s votes for its class with weight `exp(s / tau)`; scores are shares of the vote.
Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (CVPR 2018), section 3.4.
Shape legend: B rows to classify, M memory rows, D feature width, C classes, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from diptych.adapt import support as parts
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Examples, Support

NAME = "knn"
BLOCK_CELLS = 2**24
"""Cosines held at once: 64 MiB of float32."""
K_UNTRIED = 20


class Config(BaseConfig):
    """Weighted k nearest neighbours."""

    method: Literal["knn"] = "knn"
    k: int | None = Field(None, ge=1, description="neighbours that vote; null: the best of `candidates` on validation, 20 without")
    candidates: tuple[int, ...] = Field(
        (1, 3, 5, 10, 20, 50, 100, 200), min_length=1, description="values of k to try on validation; of equal ones the smallest wins"
    )
    tau: float = Field(0.07, gt=0, description="temperature of the weights; the smaller, the more the nearest count")

    def build(self) -> KNN:
        """The adapter."""
        return KNN(self)


class KNN:
    """The adapter. After `fit`: `k`. A k above the number of memory rows takes all of them."""

    needs = frozenset({"labelled"})

    def __init__(self, config: Config) -> None:
        self.config = config
        self.k = 0

    def fit(self, support: Support) -> KNN:
        """Keeps the labelled rows; chooses k. A class without rows gets the score 0. Raises DataError if there are no labelled rows."""
        x_MD, label_M = parts.labelled(support, NAME)
        self.memory_MD, self.label_M = unit(torch.from_numpy(np.ascontiguousarray(x_MD))), torch.from_numpy(label_M)
        self.classes = len(support.text_CD)
        held_out = parts.validation(support, NAME)
        if self.config.k is not None or held_out is None:
            self.k = self.config.k or K_UNTRIED
        else:
            self.k = self._best_k(held_out)
        return self

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """Shares of the vote `[B, C]`, in [0, 1]."""
        x_BD = parts.features(test, self.memory_MD.shape[1])
        return np.concatenate([self._vote(near, self.k).numpy() for near in self._neighbours(x_BD, self.k)]).astype(np.float32)

    def _best_k(self, held_out: parts.Labelled) -> int:
        """One search for the largest k serves all: the neighbours come in order."""
        candidates = sorted(set(self.config.candidates))
        right = dict.fromkeys(candidates, 0)
        done = 0
        for near in self._neighbours(held_out.feature_ND, candidates[-1]):
            label_B = held_out.label_N[done : done + len(near.similarity_BK)]
            done += len(label_B)
            for k in candidates:
                right[k] += int((self._vote(near, k).numpy().argmax(axis=1) == label_B).sum())
        return max(candidates, key=lambda k: (right[k], -k))

    def _vote(self, near: Neighbours, k: int) -> Tensor:
        return votes(near.similarity_BK[:, :k], near.label_BK[:, :k], self.classes, self.config.tau)

    def _neighbours(self, x_BD: parts.Floats, k: int) -> Iterator[Neighbours]:
        query_BD = unit(torch.from_numpy(np.ascontiguousarray(x_BD, dtype=self.memory_MD.numpy().dtype)))
        for block_BD in blocks(query_BD, len(self.memory_MD)):
            yield nearest(block_BD @ self.memory_MD.t(), self.label_M, k)


class Neighbours(NamedTuple):
    """The nearest memory rows: cosines `[B, K]`, falling, and labels `[B, K]`."""

    similarity_BK: Tensor
    label_BK: Tensor


def unit(x_ND: Tensor) -> Tensor:
    """Rows over their L2 norms; a row of zeros stays."""
    return torch.nn.functional.normalize(x_ND, dim=1)


def blocks(query_BD: Tensor, memory_rows: int) -> list[Tensor]:
    """The queries in pieces, at least one, whose cosines with the memory stay within `BLOCK_CELLS`."""
    rows = max(1, BLOCK_CELLS // max(1, memory_rows))
    return [query_BD[start : start + rows] for start in range(0, max(1, len(query_BD)), rows)]


def nearest(similarity_BM: Tensor, label_M: Tensor, k: int) -> Neighbours:
    """The k largest of every row, all of them if there are fewer. Which of two equal ones is taken at the k-th place is not defined."""
    similarity_BK, index_BK = similarity_BM.topk(min(k, similarity_BM.shape[1]), dim=1)
    return Neighbours(similarity_BK, label_M[index_BK])


def votes(similarity_BK: Tensor, label_BK: Tensor, classes: int, tau: float) -> Tensor:
    """Per class the softmax weights `exp(s / tau) / sum` of the neighbours with its label, `[B, C]`; rows sum to 1. Differentiable."""
    weight_BK = (similarity_BK / tau).softmax(dim=1)
    return weight_BK.new_zeros(len(weight_BK), classes).scatter_add(1, label_BK, weight_BK)
