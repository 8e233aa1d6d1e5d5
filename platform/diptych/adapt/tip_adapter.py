"""Tip-Adapter: few-shot features as the keys of a cache, nothing trained; Tip-Adapter-F then trains the keys.

`logits = scale q T + alpha exp(-beta (1 - q K)) V`.
Source: Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (ECCV 2022), section 3. The authors report the
best epoch on the test set; here the last epoch counts. Their keys are means over views not yet normalised; stored features are.
Shape legend: N queries, B of a tile, D feature width, M keys, C classes, S shots (rows, a picture's views counted singly).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diptych.adapt import cache as caches
from diptych.adapt.cache import Cache, Chosen, Floats, Grid, Labels, correct, first_best
from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Examples, Support


class TipConfig(BaseConfig):
    """What both adapters share. Without validation examples `alpha` and `beta` are used as they stand: the authors' for ImageNet."""

    alpha: float = Field(1.17, ge=0, description="weight of the cache logits, while keys are trained and where nothing is searched")
    beta: float = Field(1.0, ge=0, description="sharpness of the cache, while keys are trained and where nothing is searched")
    search: bool = Field(True, description="choose alpha and beta on the validation examples, if there are any")
    alphas: Grid = Field(Grid(start=0.1, stop=3.0, steps=20), description="values of alpha to try")
    betas: Grid = Field(Grid(start=0.1, stop=7.0, steps=20), description="values of beta to try; the authors take 200 steps")


class Config(TipConfig):
    """Tip-Adapter, free of training."""

    method: Literal["tip-adapter"] = "tip-adapter"

    def build(self) -> TipAdapter:
        """The adapter, not yet fitted."""
        return TipAdapter(self)


class TunedConfig(TipConfig):
    """Tip-Adapter-F: the keys are trained at `alpha` and `beta`, which the search may then change."""

    method: Literal["tip-adapter-f"] = "tip-adapter-f"
    lr: float = Field(1e-3, gt=0, description="AdamW's learning rate at the start; a cosine takes it to 0")
    eps: float = Field(1e-4, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    epochs: int = Field(20, ge=0, description="passes over the labelled rows")
    batch_size: int = Field(256, ge=1, description="labelled rows a step")

    def build(self) -> TunedTipAdapter:
        """The adapter, not yet fitted."""
        return TunedTipAdapter(self)


class TipAdapter:
    """Classifies by text weights and a cache of the few shots. After `fit`: `cache`, and the hyper-parameters in `chosen`."""

    needs = frozenset({"labelled"})
    method = "tip-adapter"

    def __init__(self, config: TipConfig) -> None:
        self.config = config
        self.cache: Cache | None = None
        self.chosen: Chosen | None = None

    def fit(self, support: Support) -> TipAdapter:
        """Stores the shots as keys; chooses alpha and beta where there is validation. Raises DataError for a support that will not do."""
        shots = caches.labelled(support, self.method)
        self.weight_CD = support.logit_scale * support.text_CD.astype(np.float64)
        self.cache = self.keys(Cache.of(shots, len(self.weight_CD)), shots, support.seed)
        self.chosen = Chosen(self.config.alpha, self.config.beta)
        validation = caches.validation(support, self.method) if self.config.search else None
        if validation is not None:
            alphas, betas = self.config.alphas.values(), self.config.betas.values()
            hits = search(self.cache, self.weight_CD, *validation, alphas, betas)
            self.chosen = choose(hits, alphas, betas, len(validation.label_N))
        return self

    def keys(self, cache: Cache, shots: Examples, seed: int) -> Cache:
        """The cache to classify with, from that of the labelled examples: the same."""
        del shots, seed
        return cache

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """The logits `[N, C]`, a row a row of `test` (views are not joined). Raises DataError for features that do not fit."""
        assert self.cache is not None, "predict comes after fit"
        assert self.chosen is not None
        query_ND = caches.queries(test, self.weight_CD.shape[1])
        return logits(self.cache, self.weight_CD, query_ND, self.chosen.alpha, self.chosen.beta).astype(np.float32)


class TunedTipAdapter(TipAdapter):
    """Tip-Adapter-F: the same classifier with trained keys, no longer of length 1."""

    method = "tip-adapter-f"

    def __init__(self, config: TunedConfig) -> None:
        super().__init__(config)
        self.training = config

    def keys(self, cache: Cache, shots: Examples, seed: int) -> Cache:
        """The cache with its keys trained on the labelled rows."""
        return tune(cache, self.weight_CD, shots, self.training, seed)


def logits(cache: Cache, weight_CD: Floats, feature_ND: NDArray[np.floating], alpha: float, beta: float) -> Floats:
    """`q W + alpha exp(-beta (1 - q K)) V`, float64 `[N, C]`; `weight_CD` are the text weights times the logit scale."""
    logits_NC = np.empty((len(feature_ND), cache.classes))
    for tile in cache.tiles(len(feature_ND), grid=1):
        query_DB = feature_ND[tile].T.astype(np.float64)
        (cache_CB,) = cache.logits(cache.key_MD @ query_DB, [beta])
        logits_NC[tile] = (weight_CD @ query_DB + alpha * cache_CB).T
    return logits_NC


def search(cache: Cache, weight_CD: Floats, feature_ND: NDArray[np.floating], label_N: Labels, alphas: Floats, betas: Floats) -> Labels:
    """Right answers of every grid point, int64 `[len(betas), len(alphas)]`.

    Affinities are computed once, cache logits once a beta; the alphas of a beta are compared in one sweep. Memory is that of a few tiles,
    whatever the number of queries.
    """
    hits = np.zeros((len(betas), len(alphas)), dtype=np.int64)
    for tile in cache.tiles(len(feature_ND), len(alphas)):
        query_DB = feature_ND[tile].T.astype(np.float64)
        clip_CB = weight_CD @ query_DB
        for b, cache_CB in enumerate(cache.logits(cache.key_MD @ query_DB, betas)):
            hits[b] += correct(clip_CB, alphas[:, None, None] * cache_CB, label_N[tile])
    return hits


def choose(hits: Labels, alphas: Floats, betas: Floats, rows: int) -> Chosen:
    """The first best point, beta the outer loop, alpha the inner one; alpha = beta = 0 if no point got a row right."""
    if (best := first_best(hits)) is None:
        return Chosen(0.0, 0.0, accuracy=0.0)
    return Chosen(float(alphas[best[1]]), float(betas[best[0]]), accuracy=float(hits[best]) / rows)


def tune(cache: Cache, weight_CD: Floats, shots: Examples, config: TunedConfig, seed: int) -> Cache:
    """The cache with its keys trained by cross-entropy on the labelled rows `[S]`: AdamW, cosine to 0, order from `(seed, epoch)`.

    A key meets itself among the rows: the paper trains on the same shots.
    """
    import torch
    from torch.nn.functional import cross_entropy, one_hot

    feature_SD = torch.from_numpy(np.array(shots.feature_ND, dtype=np.float32))
    label_S = torch.from_numpy(np.array(shots.label_N, dtype=np.int64))
    clip_SC = feature_SD @ torch.from_numpy(weight_CD.T.astype(np.float32))
    value_MC = one_hot(torch.from_numpy(cache.label_M), cache.classes).float()
    key_MD = torch.from_numpy(cache.key_MD.astype(np.float32)).requires_grad_()
    optimizer = torch.optim.AdamW([key_MD], lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(label_S) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for epoch in range(config.epochs):
        order_S = torch.from_numpy(chance.generator(seed, "tip-adapter-f", epoch).permutation(len(label_S)))
        for batch_B in torch.split(order_S, config.batch_size):
            affinity_BM = feature_SD[batch_B] @ key_MD.t()
            logits_BC = clip_SC[batch_B] + config.alpha * (torch.exp(config.beta * (affinity_BM - 1)) @ value_MC)
            optimizer.zero_grad()
            cross_entropy(logits_BC, label_S[batch_B]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return Cache(key_MD.detach().numpy().astype(np.float64), cache.label_M, cache.classes)
