"""AdaNPC: a vote of the nearest features in a memory that takes in the stream as it is classified.

A frozen encoder follows a drifting stream at no training cost: every batch is voted on the memory as it was before, then its confident rows
join the memory with the labels they were given. The batch-norm variant also moves a scale and a shift to make the votes less uncertain.
`knn_loss` with a `RingBuffer` trains an encoder on the source for such votes.

Source: Zhang et al., AdaNPC: Exploring Non-Parametric Classifier for Test-Time Adaptation (ICML 2023), section 4 and algorithm 1.
Shape legend: B rows of a batch, M memory rows, D feature width, C classes, K neighbours, Q rows of a ring buffer.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from diptych.adapt import support as parts
from diptych.adapt.knn import blocks, nearest, unit, votes
from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Examples, Support

NAME = "adanpc"
FLOOR = 1e-5
"""Added to every score, so that the logarithm in the loss is finite."""
NEVER = 1.1
"""A radius above any cosine: the ball is never used."""

Confidence = Literal["softmax_of_scores", "score"]


class Config(BaseConfig):
    """AdaNPC. The published confidence is a softmax over the scores: for C classes at most about e / (e + C - 1), 0.31 for 7."""

    method: Literal["adanpc"] = "adanpc"
    k: int = Field(100, ge=1, description="neighbours that vote; all memory rows if there are fewer")
    tau: float = Field(0.1, gt=0, description="temperature of the softmax over the neighbours' cosines")
    beta: float = Field(0.1, ge=0, description="least confidence, in [0, 1], of a row that joins the memory; above 1 none ever does")
    confidence: Confidence = Field("softmax_of_scores", description="what beta is held against: as published, or the score itself")
    epsilon: float = Field(
        NEVER, description="least cosine of a neighbour, used instead of k if every row of the batch has one nearer; above 1: never"
    )
    capacity: int | None = Field(
        None, ge=1, description="most rows of the stream that a class keeps beside its source rows, the oldest leave; null: no limit"
    )
    leftover_row: bool = Field(False, description="parity: the random row of class 0 that the published memory starts with and never drops")
    batch_norm: bool = Field(False, description="the variant that also learns a scale and a shift of the features")
    bn_lr: float = Field(1e-3, gt=0, description="learning rate of Adam on the scale and shift")
    bn_steps: int = Field(1, ge=1, description="updates a batch; every one appends the batch to the memory again")

    def build(self) -> AdaNPC:
        """The adapter."""
        return AdaNPC(self)


class AdaNPC:
    """The adapter, online: `predict` a batch of the stream, then `update` with it. What makes a batch is up to the caller, and counts.

    `predict` looks at what was learnt from earlier batches only; with batch norm and several steps the published code scores a
    batch after all but the last of its own updates (`BatchNorm.learn` gives those scores).
    """

    needs = frozenset({"labelled"})

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, support: Support) -> AdaNPC:
        """Starts from the labelled rows as the memory. A class without rows scores `FLOOR`. Raises DataError if there are none."""
        x_MD, label_M = parts.labelled(support, NAME)
        self.classes, width = support.text_CD.shape
        leftover = leftover_row(width, support.seed) if self.config.leftover_row else None
        self.memory = Memory(torch.from_numpy(np.array(x_MD)), torch.from_numpy(label_M), self.config.capacity, leftover)
        self.batch_norm = self._fresh_batch_norm()
        return self

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """Scores of a batch `[B, C]`, nearly probabilities, in [1e-5, 1]; the memory stays as it is."""
        with torch.no_grad():
            x_BD = self._batch(test)
            return self._vote(self.batch_norm(x_BD) if self.batch_norm else x_BD).numpy().astype(np.float32)

    def update(self, test: Examples) -> AdaNPC:
        """Learns from a batch, by its features alone; gives itself back."""
        x_BD = self._batch(test)
        if self.batch_norm:
            self.batch_norm.learn(x_BD, self.memory, self._vote, self.config)
            return self
        with torch.no_grad():
            remember(self.memory, x_BD, self._vote(x_BD), self.config.beta, self.config.confidence)
        return self

    def reset(self) -> None:
        """Forgets the stream: the memory is cut back to its source rows, scale and shift start afresh."""
        self.memory.reset()
        self.batch_norm = self._fresh_batch_norm()

    def _fresh_batch_norm(self) -> BatchNorm | None:
        memory_MD = self.memory.feature_MD
        return BatchNorm(memory_MD.shape[1], self.config.bn_lr, memory_MD.dtype) if self.config.batch_norm else None

    def _batch(self, test: Examples) -> Tensor:
        memory_MD = self.memory.feature_MD
        return torch.from_numpy(np.array(parts.features(test, memory_MD.shape[1]))).to(memory_MD.dtype)

    def _vote(self, x_BD: Tensor) -> Tensor:
        config = self.config
        return vote(x_BD, self.memory.feature_MD, self.memory.label_M, self.classes, config.k, config.tau, config.epsilon)


# ---------------------------------------------------------------- the vote


def vote(x_BD: Tensor, memory_MD: Tensor, label_M: Tensor, classes: int, k: int, tau: float, epsilon: float = NEVER) -> Tensor:
    """Scores `[B, C]`: per class the softmax weights of the neighbours with its label, plus 1e-5, at most 1. Differentiable in x.

    Neighbours are the k nearest (all rows, if there are fewer); or, where `epsilon <= 1` and the nearest memory row of every row of
    the batch has a cosine above it, all memory rows of a cosine of at least epsilon.
    """
    pieces = blocks(unit(x_BD), len(memory_MD))
    ball = epsilon <= 1 and len(x_BD) > 0 and all(bool((piece @ memory_MD.t()).amax(dim=1).min() > epsilon) for piece in pieces)
    scores = []
    for piece_BD in pieces:
        similarity_BM = piece_BD @ memory_MD.t()
        if ball:
            inside_BM = similarity_BM.masked_fill(similarity_BM < epsilon, -torch.inf)
            share_BC = votes(inside_BM, label_M.expand(len(inside_BM), -1), classes, tau)
        else:
            share_BC = votes(*nearest(similarity_BM, label_M, k), classes, tau)
        scores.append((share_BC + FLOOR).clamp(max=1))
    return torch.cat(scores)


def confidence(score_BC: Tensor, kind: Confidence) -> tuple[Tensor, Tensor]:
    """How sure the scores are, `[B]` in [0, 1], and of which class, int64 `[B]`."""
    sure_B, label_B = (score_BC.softmax(dim=1) if kind == "softmax_of_scores" else score_BC).max(dim=1)
    return sure_B, label_B


def remember(memory: Memory, x_BD: Tensor, score_BC: Tensor, beta: float, kind: Confidence = "softmax_of_scores") -> None:
    """Appends the rows whose confidence is at least `beta`, with the class they were scored highest for."""
    sure_B, label_B = confidence(score_BC, kind)
    kept_B = sure_B >= beta
    memory.append(x_BD[kept_B], label_B[kept_B])


class Memory:
    """L2-normalised features and labels of the source, then those of the stream.

    `capacity` bounds the rows of the stream a class: a full class gives the place of its oldest to the new row. Source rows stay.
    `leftover_1D` goes first, as it is, with label 0 (parity with the published code).
    """

    def __init__(self, feature_MD: Tensor, label_M: Tensor, capacity: int | None = None, leftover_1D: Tensor | None = None) -> None:
        feature_MD = unit(feature_MD)
        if leftover_1D is not None:
            feature_MD = torch.cat([leftover_1D.to(feature_MD.dtype), feature_MD])
            label_M = torch.cat([label_M.new_zeros(1), label_M])
        self._feature, self._label, self.capacity = feature_MD, label_M, capacity
        self.source_rows = self._rows = len(label_M)
        self._places: dict[int, deque[int]] = defaultdict(deque)

    def __len__(self) -> int:
        return self._rows

    @property
    def feature_MD(self) -> Tensor:
        """The features; the order is that of arrival, except where a row took the place of an older one."""
        return self._feature[: self._rows]

    @property
    def label_M(self) -> Tensor:
        """The labels, int64."""
        return self._label[: self._rows]

    def append(self, feature_BD: Tensor, label_B: Tensor) -> None:
        """Takes in rows, normalised, within the capacity."""
        if not len(label_B):
            return
        place_B = self._free(len(label_B)) if self.capacity is None else self._own_places(label_B.tolist(), self.capacity)
        # A row that was pushed out by a later one of its batch shares its place; only the last to come may write there.
        last = {place: row for row, place in enumerate(place_B)}
        rows = torch.tensor(list(last.values()))
        self._feature[list(last)] = unit(feature_BD[rows].detach())
        self._label[list(last)] = label_B[rows]

    def reset(self) -> None:
        """Cuts back to the source rows."""
        self._rows = self.source_rows
        self._places.clear()

    def _own_places(self, labels: list[int], capacity: int) -> list[int]:
        taken = []
        for label in labels:
            places = self._places[label]
            place = places.popleft() if len(places) == capacity else self._free(1)[0]
            places.append(place)
            taken.append(place)
        return taken

    def _free(self, count: int) -> list[int]:
        """Places at the end; the store doubles when it is full, so that taking in a row costs the same however many there are."""
        needed = self._rows + count
        if needed > len(self._feature):
            room = max(needed, 2 * len(self._feature)) - len(self._feature)
            self._feature = torch.cat([self._feature, self._feature.new_empty(room, self._feature.shape[1])])
            self._label = torch.cat([self._label, self._label.new_empty(room)])
        first, self._rows = self._rows, needed
        return list(range(first, needed))


def leftover_row(width: int, seed: int) -> Tensor:
    """The random row `[1, D]` that the published memory starts with: uniform in +-1 / sqrt(D / 3), so of norm about 1."""
    return ring_rows(1, width, seed, "leftover")


# ---------------------------------------------------------------- the batch-norm variant


class BatchNorm:
    """A batch-norm layer in evaluation mode with untouched statistics (mean 0, variance 1): `x / sqrt(1 + 1e-5) * weight + bias`."""

    EPS = 1e-5

    def __init__(self, width: int, lr: float, dtype: torch.dtype = torch.float32) -> None:
        self.weight = torch.ones(width, dtype=dtype, requires_grad=True)
        self.bias = torch.zeros(width, dtype=dtype, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=lr)

    def __call__(self, x_BD: Tensor) -> Tensor:
        """The features, scaled and shifted."""
        return x_BD / math.sqrt(1 + self.EPS) * self.weight + self.bias

    def learn(self, x_BD: Tensor, memory: Memory, ballot: Callable[[Tensor], Tensor], config: Config) -> Tensor:
        """`config.bn_steps` times: vote, remember the transformed rows, lower the mean entropy of softmax(scores) by one Adam update.

        `ballot` scores transformed rows on the memory. Gives the scores `[B, C]` of the last step, which the published code reports.
        """
        for _ in range(config.bn_steps):
            moved_BD = self(x_BD)
            score_BC = ballot(moved_BD)
            self.optimizer.zero_grad()
            entropy(score_BC).backward()  # type: ignore[no-untyped-call]
            # Only now: the gradient needed the memory as it was.
            remember(memory, moved_BD.detach(), score_BC.detach(), config.beta, config.confidence)
            self.optimizer.step()
        return score_BC.detach()


def entropy(score_BC: Tensor) -> Tensor:
    """The mean entropy of softmax(scores), in nats."""
    log_BC = score_BC.log_softmax(dim=1)
    return -(log_BC.exp() * log_BC).sum(dim=1).mean()


# ---------------------------------------------------------------- training on the source


def knn_loss(score_BC: Tensor, label_B: Tensor) -> Tensor:
    """`mean(-log score_y)` of votes; the gradient reaches the encoder through the queries, the memory has none."""
    return -score_BC.gather(1, label_B[:, None]).log().mean()


def annealed_tau(step: int, start: float = 1.0, end: float = 0.1, steps: int = 5000) -> float:
    """The temperature at a step: linear from `start` to `end` over `steps`, then `end`."""
    return start + (end - start) * min(step / steps, 1.0)


class RingBuffer:
    """The last Q features and labels of training: the memory that the loss votes on.

    Attributes:
        feature_QD, label_Q: the rows, L2-normalised as they are written (those it starts with stay as they are); labels int64.
        index: where the next row goes.
    """

    def __init__(self, feature_QD: Tensor) -> None:
        self.feature_QD = feature_QD.detach().clone()
        self.label_Q = torch.zeros(len(feature_QD), dtype=torch.int64)
        self.index = 0

    @classmethod
    def random(cls, rows: int, width: int, seed: int) -> RingBuffer:
        """A buffer of `rows` random features with label 0, uniform in +-1 / sqrt(D / 3)."""
        return cls(ring_rows(rows, width, seed, "ring"))

    def write(self, feature_BD: Tensor, label_B: Tensor) -> None:
        """Overwrites the oldest rows, round and round; of a batch larger than the buffer the last Q rows stay."""
        rows, count = len(self.label_Q), len(label_B)
        place = (self.index + torch.arange(count))[-rows:] % rows
        self.feature_QD[place] = unit(feature_BD.detach()[-rows:])
        self.label_Q[place] = label_B[-rows:]
        self.index = (self.index + count) % rows


def ring_rows(rows: int, width: int, seed: int, name: str) -> Tensor:
    """Random rows, float32, uniform in +-1 / sqrt(D / 3); named by the seed."""
    bound = (3 / width) ** 0.5
    return torch.from_numpy(chance.generator(seed, NAME, name).uniform(-bound, bound, (rows, width)).astype(np.float32))
