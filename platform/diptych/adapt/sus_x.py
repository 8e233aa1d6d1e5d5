"""SuS-X: TIP-X on a support set without labels of the target; a term between the modalities is added to Tip-Adapter's logits.

`logits = scale q T + alpha exp(-beta (1 - A)) V - gamma Ktilde V`: Ktilde is the KL divergence from a query's class distribution to a
key's, rescaled to the range of the affinities A of the whole block. CapS-Adapter is the same with A mixed from image and caption keys.
Source: Udandarao et al., SuS-X: Training-Free Name-Only Transfer of Vision-Language Models (ICCV 2023), section 3.2. The authors rescale the
test divergences to the range of the validation affinities; here, and in CapS-Adapter's code, a block's own range counts.

Shape legend: N queries of a block, B of a tile, D feature width, M keys, C classes, K entries of a distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diptych.adapt import cache as caches
from diptych.adapt.cache import Cache, Chosen, Floats, Grid, Labels, correct, first_best
from diptych.adapt.support import Labelled
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Examples, Support

Distributions = Literal["intended", "official"]


class Grids(NamedTuple):
    """The values to try, float64, one dimension each."""

    alphas: Floats
    betas: Floats
    deltas: Floats
    gammas: Floats


class TipXConfig(BaseConfig):
    """What SuS-X and CapS-Adapter share. Without validation examples the hyper-parameters are used as they stand; the authors always search.

    The grids are a part of the authors': theirs have the same ends and 20, 200 and 50 steps.
    """

    alpha: float = Field(1.17, ge=0, description="weight of the cache logits, where nothing is searched")
    beta: float = Field(1.0, ge=0, description="sharpness of the cache, where nothing is searched")
    gamma: float = Field(0.1, ge=0, description="weight of the inter-modal term, where nothing is searched")
    search: bool = Field(True, description="choose the hyper-parameters on the validation examples, if there are any")
    alphas: Grid = Field(Grid(start=0.1, stop=50.0, steps=10), description="values of alpha to try; the authors take 20 steps")
    betas: Grid = Field(Grid(start=1.0, stop=50.0, steps=20), description="values of beta to try; the authors take 200 steps")
    gammas: Grid = Field(Grid(start=0.1, stop=30.0, steps=10), description="values of gamma to try; the authors take 50 steps")
    tau: float = Field(0.5, gt=0, description="temperature of the class distributions, in units of the cosine")
    block: int = Field(4096, ge=1, description="queries whose divergences are rescaled together; some 50 bytes of memory a query and key")
    distributions: Distributions = Field(
        "intended", description="intended: softmax over classes; official: over feature dimensions, as CapS-Adapter's code has it"
    )

    @property
    def inter(self) -> bool:
        """Whether there is an inter-modal term."""
        return True

    def grids(self) -> Grids:
        """The values to try."""
        return Grids(self.alphas.values(), self.betas.values(), np.zeros(1), self.gammas.values())

    def defaults(self) -> Chosen:
        """The hyper-parameters where nothing is searched."""
        return Chosen(self.alpha, self.beta, self.gamma)


class Config(TipXConfig):
    """SuS-X: TIP-X over a support set that was painted or retrieved for the class names."""

    method: Literal["sus-x"] = "sus-x"

    def build(self) -> SusX:
        """The adapter, not yet fitted."""
        return SusX(self)


@dataclass(frozen=True)
class Block:
    """What a block of queries has in common for all hyper-parameters; float64.

    Attributes:
        clip_CN: zero-shot logits.
        image_MN: affinities to the image keys.
        caption_MN: affinities to the caption keys; None: the image keys alone.
        divergence_MN: KL from every query's distribution to every key's; None: no inter-modal term.
    """

    clip_CN: Floats
    image_MN: Floats
    caption_MN: Floats | None = None
    divergence_MN: Floats | None = None

    def affinity(self, delta: float) -> Floats:
        """`A(delta) = (1 - delta) q K_img + delta q K_cap`, `[M, N]`."""
        if self.caption_MN is None:
            assert delta == 0, "caption keys are wanted, and there are none"
            return self.image_MN
        return np.asarray((1 - delta) * self.image_MN + delta * self.caption_MN)

    def inter_modal(self, cache: Cache, affinity_MN: Floats) -> Floats:
        """The inter-modal logits `-Ktilde V`, `[C, N]`; zeros without divergences."""
        if self.divergence_MN is None:
            return np.zeros_like(self.clip_CN)
        return -cache.class_sums(rescaled(self.divergence_MN, affinity_MN))

    def logits(self, cache: Cache, chosen: Chosen) -> Floats:
        """`clip + alpha cache + gamma inter`, `[C, N]`."""
        affinity_MN = self.affinity(chosen.delta)
        logits_CN = self.clip_CN + chosen.gamma * self.inter_modal(cache, affinity_MN)
        for tile in cache.tiles(logits_CN.shape[1], grid=1):
            (cache_CB,) = cache.logits(affinity_MN[:, tile], [chosen.beta])
            logits_CN[:, tile] += chosen.alpha * cache_CB
        return np.asarray(logits_CN)

    def search(self, cache: Cache, label_N: Labels, grids: Grids) -> Labels:
        """Right answers of every grid point, int64 `[alphas, betas, deltas, gammas]`.

        Affinities and inter-modal logits are computed once a delta, cache logits once a (delta, beta); the gammas are compared in one sweep.
        """
        hits = np.zeros(tuple(map(len, grids)), dtype=np.int64)
        for d, delta in enumerate(grids.deltas):
            affinity_MN = self.affinity(delta)
            inter_CN = self.inter_modal(cache, affinity_MN)
            for tile in cache.tiles(len(label_N), len(grids.gammas)):
                step_GCB = grids.gammas[:, None, None] * inter_CN[:, tile]
                for b, cache_CB in enumerate(cache.logits(affinity_MN[:, tile], grids.betas)):
                    for a, alpha in enumerate(grids.alphas):
                        hits[a, b, d] += correct(self.clip_CN[:, tile] + alpha * cache_CB, step_GCB, label_N[tile])
        return hits


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of any queries against a fixed cache. `weight_CD` are the text weights, not scaled; float64."""

    cache: Cache
    weight_CD: Floats
    logit_scale: float
    block: int
    tau: float = 0.5
    distributions: Distributions = "intended"
    inter: bool = True

    def over(self, feature_ND: NDArray[np.floating]) -> Iterator[tuple[slice, Block]]:
        """The blocks of the queries, in turn, with the rows they stand for."""
        key_KM = self._distribution(self.cache.key_MD.T)
        for start in range(0, len(feature_ND), self.block):
            rows = slice(start, start + self.block)
            query_DN = feature_ND[rows].T.astype(np.float64)
            caption_MN = None if self.cache.caption_MD is None else self.cache.caption_MD @ query_DN
            divergence_MN = divergence(self._distribution(query_DN), key_KM) if self.inter else None
            clip_CN = self.logit_scale * (self.weight_CD @ query_DN)
            yield rows, Block(clip_CN, self.cache.key_MD @ query_DN, caption_MN, divergence_MN)

    def search(self, validation: Labelled, grids: Grids) -> Chosen:
        """The first best point of the grids on the validation examples."""
        hits = np.zeros(tuple(map(len, grids)), dtype=np.int64)
        for rows, block in self.over(validation.feature_ND):
            hits += block.search(self.cache, validation.label_N[rows], grids)
        return choose(hits, grids, len(validation.label_N))

    def _distribution(self, feature_DN: Floats) -> Floats:
        return log_softmax((self.weight_CD @ feature_DN if self.distributions == "intended" else feature_DN) / self.tau)


class SusX:
    """Classifies by text weights, a cache and the inter-modal term. After `fit`: the hyper-parameters in `chosen`.

    A prediction depends on its neighbours in the test rows, since a block of them is rescaled together.
    """

    needs = frozenset({"labelled"})
    method = "sus-x"

    def __init__(self, config: TipXConfig) -> None:
        self.config = config
        self.blocks: Blocks | None = None
        self.chosen: Chosen | None = None

    def fit(self, support: Support) -> SusX:
        """Stores the support as keys; chooses the hyper-parameters where there is validation. Raises DataError where it will not do."""
        config, weight_CD, captions = self.config, support.text_CD.astype(np.float64), "captions" in self.needs
        pictures = caches.labelled(support, self.method, captions=captions)
        cache = Cache.of(pictures if captions else replace(pictures, caption_ND=None), len(weight_CD))
        self.blocks = Blocks(cache, weight_CD, support.logit_scale, config.block, config.tau, config.distributions, config.inter)
        validation = caches.validation(support, self.method) if config.search else None
        self.chosen = config.defaults() if validation is None else self.blocks.search(validation, config.grids())
        return self

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """The logits `[N, C]`, a row a row of `test` (views are not joined). Raises DataError for features that do not fit."""
        assert self.blocks is not None, "predict comes after fit"
        assert self.chosen is not None
        query_ND = caches.queries(test, self.blocks.weight_CD.shape[1])
        logits_NC = np.empty((len(query_ND), self.blocks.cache.classes), dtype=np.float32)
        for rows, block in self.blocks.over(query_ND):
            logits_NC[rows] = block.logits(self.blocks.cache, self.chosen).T
        return logits_NC


def choose(hits: Labels, grids: Grids, rows: int) -> Chosen:
    """The first best point in the nested order alpha, beta, delta, gamma; all 0 if no point got a row right."""
    if (best := first_best(hits)) is None:
        return Chosen(0.0, 0.0, accuracy=0.0)
    alpha, beta, delta, gamma = (float(grid[index]) for grid, index in zip(grids, best, strict=True))
    return Chosen(alpha, beta, gamma, delta, float(hits[best]) / rows)


def log_softmax(logit_KN: Floats) -> Floats:
    """Logarithms of the softmax over the first axis, `[K, N]`."""
    shifted_KN = logit_KN - logit_KN.max(axis=0)
    return np.asarray(shifted_KN - np.log(np.exp(shifted_KN).sum(axis=0)))


def divergence(query_KN: Floats, key_KM: Floats) -> Floats:
    """`KL(P_i || S_j) = sum_c P_ic (log P_ic - log S_jc)`, `[M, N]`, from log-distributions of queries and keys."""
    share_KN = np.exp(query_KN)
    return np.asarray((share_KN * query_KN).sum(axis=0) - key_KM.T @ share_KN)


def rescaled(value_MN: Floats, target_MN: Floats) -> Floats:
    """The values, moved linearly to the range [min, max] of the target; equal values all become its minimum."""
    low, high = value_MN.min(), value_MN.max()
    slope = (target_MN.max() - target_MN.min()) / (high - low) if high > low else 0.0
    return np.asarray((value_MN - low) * slope + target_MN.min())
