"""Replays the cache classifiers: Tip-Adapter, TIP-X and CapS-Adapter with both kinds of class distributions, and their searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from diptych.adapt import sus_x, tip_adapter
from diptych.adapt.cache import Cache, Chosen, Grid
from diptych.adapt.sus_x import Block, Blocks, Distributions, Grids

Array = NDArray[np.generic]

INPUTS = (
    "support_*", "val_x", "val_y", "test_x", "test_y", "text_w", "tau", "hp_*", "grid_*", "tip_fixed_beta", "tip_search_scale", "tip_search_step",
)  # fmt: skip

# The searches are exact; their accuracies are percentages, which can be rounded in two orders.
TOLERANCE = {"*_search": (1e-14, 0), "*_acc": (1e-14, 0), "tip_search_beta_alpha": (0, 0), "*": (1e-8, 1e-11)}

SCALE = 100.0
CHUNK = 10
"""The published loop over the divergences takes ten queries at a time and leaves the last `n mod 10` rows at zero."""


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    given = {key: np.asarray(vectors[key]) for key in vectors}
    hyper = Chosen(**{name: float(given[f"hp_{name}"]) for name in ("alpha", "beta", "gamma", "delta")})
    order_M = np.argsort(given["support_y"], kind="stable")
    cache = Cache(
        given["support_img"][order_M], given["support_y"][order_M], len(given["text_w"]), caption_MD=given["support_cap"][order_M]
    )
    outputs: dict[str, Array] = tip(given, cache, hyper)
    for tag in ("official", "intended"):
        test, validation = (block_of(given, cache, tag, part) for part in ("test", "val"))
        back_M = np.argsort(order_M)
        assert test.divergence_MN is not None
        assert validation.divergence_MN is not None
        outputs |= {f"kl_{tag}_test": test.divergence_MN[back_M].T, f"kl_{tag}_val": validation.divergence_MN[back_M].T}
        for name, deltas in (("susx", np.zeros(1)), ("caps", given["grid_delta"])):
            point = hyper if name == "caps" else replace(hyper, delta=0.0)
            logits_NC = test.logits(cache, point).T
            grids = Grids(given["grid_alpha"], given["grid_beta"], deltas, given["grid_gamma"])
            best = sus_x.choose(validation.search(cache, given["val_y"], grids), grids, len(given["val_y"]))
            found = [accuracy(test.logits(cache, best).T, given["test_y"]), best.alpha, best.beta, best.gamma, best.delta]
            outputs |= {
                f"{name}_{tag}_kl_logits": test.inter_modal(cache, test.affinity(point.delta)).T,
                f"{name}_{tag}_logits": logits_NC,
                f"{name}_{tag}_acc": np.float64(accuracy(logits_NC, given["test_y"])),
                f"{name}_{tag}_search": np.array(found if name == "caps" else found[:-1]),
                f"{name}_cache_logits": next(cache.logits(test.affinity(point.delta), [point.beta])).T,
            }
    fast_NC = replace(block_of(given, cache, "intended", "test"), divergence_MN=None).logits(cache, hyper).T
    return outputs | {"clip_logits": test.clip_CN.T, "capsF_logits": fast_NC, "capsF_acc": np.float64(accuracy(fast_NC, given["test_y"]))}


def tip(given: dict[str, Array], cache: Cache, hyper: Chosen) -> dict[str, Array]:
    weight_CD, test_ND = SCALE * given["text_w"], given["test_x"]
    betas, alphas = (
        Grid(start=0.1, stop=float(scale), steps=int(step)).values()
        for scale, step in zip(given["tip_search_scale"], given["tip_search_step"], strict=True)
    )
    hits = tip_adapter.search(cache, weight_CD, given["val_x"], given["val_y"], alphas, betas)
    best = tip_adapter.choose(hits, alphas, betas, len(given["val_y"]))
    searched_NC = tip_adapter.logits(cache, weight_CD, test_ND, best.alpha, best.beta)
    return {
        "tip_fixed_logits": tip_adapter.logits(cache, weight_CD, test_ND, hyper.alpha, float(given["tip_fixed_beta"])),
        "tip_search_beta_alpha": np.array([best.beta, best.alpha]),
        "tip_search_logits": searched_NC,
        "tip_search_acc": np.float64(accuracy(searched_NC, given["test_y"])),
    }


def block_of(given: dict[str, Array], cache: Cache, tag: Distributions, part: str) -> Block:
    blocks = Blocks(cache, given["text_w"], SCALE, len(given[f"{part}_x"]), float(given.get("tau", 0.5)), tag)
    ((_, block),) = blocks.over(given[f"{part}_x"])
    assert block.divergence_MN is not None
    if tag == "official":
        block.divergence_MN[:, block.divergence_MN.shape[1] // CHUNK * CHUNK :] = 0
    return block


def accuracy(logits_NC: Array, label_N: Array) -> float:
    return float((logits_NC.argmax(axis=1) == label_N).mean() * 100)
