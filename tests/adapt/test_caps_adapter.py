"""SuS-X and CapS-Adapter: the terms, the grids against plain loops, blocks, and what happens where parts are missing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from diptych.adapt import caps_adapter, sus_x
from diptych.adapt.cache import Cache, Chosen, Grid
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support

WIDTH = 16
SMALL = {
    "alphas": Grid(start=0.1, stop=50.0, steps=4), "betas": Grid(start=1.0, stop=50.0, steps=5), "gammas": Grid(start=0.1, stop=30.0, steps=3),
}  # fmt: skip


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def draw(middle_CD: np.ndarray, per_class: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    label_N = random.permutation(np.repeat(np.arange(len(middle_CD)), per_class))
    noisy = [unit(middle_CD[label_N] + random.standard_normal((len(label_N), WIDTH)) * spread / WIDTH**0.5) for spread in (1.3, 0.6)]
    return Examples(noisy[0], label_N, caption_ND=noisy[1])


@pytest.fixture(params=[3, 7], ids=["three classes", "seven classes"])
def support(request: pytest.FixtureRequest) -> Support:
    middle_CD = unit(np.random.default_rng(0).standard_normal((request.param, WIDTH)))
    text_CD = unit(middle_CD + 0.5 * np.random.default_rng(1).standard_normal(middle_CD.shape))
    return Support(text_CD, 20.0, draw(middle_CD, 6, 2), draw(middle_CD, 30, 3))


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    weight_NK = np.exp(logits_NK)
    return weight_NK / weight_NK.sum(axis=1, keepdims=True)


def formula(support: Support, query_ND: np.ndarray, chosen: Chosen, tau: float = 0.5, official: bool = False) -> np.ndarray:
    """The logits of one block, written down as they are printed."""
    key_MD, caption_MD, text_CD, query_ND = (
        rows.astype(np.float64) for rows in (support.labelled.feature_ND, support.labelled.caption_ND, support.text_CD, query_ND)
    )
    value_MC = np.eye(len(text_CD))[support.labelled.label_N]
    affinity_NM = (1 - chosen.delta) * query_ND @ key_MD.T + chosen.delta * query_ND @ caption_MD.T
    query_NK, key_MK = (softmax((rows if official else rows @ text_CD.T) / tau) for rows in (query_ND, key_MD))
    kl_NM = (query_NK[:, None] * np.log(query_NK[:, None] / key_MK[None])).sum(axis=2)
    moved_NM = (kl_NM - kl_NM.min()) / (kl_NM.max() - kl_NM.min()) * (affinity_NM.max() - affinity_NM.min()) + affinity_NM.min()
    cache_NC = np.exp(-chosen.beta * (1 - affinity_NM)) @ value_MC
    return support.logit_scale * query_ND @ text_CD.T + chosen.alpha * cache_NC - chosen.gamma * moved_NM @ value_MC


@pytest.mark.parametrize("official", [False, True], ids=["intended", "official"])
@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_the_logits_are_the_formula(support: Support, official: bool, delta: float) -> None:
    distributions = "official" if official else "intended"
    caps = caps_adapter.Config(search=False, delta=delta, gamma=2.0, distributions=distributions).build().fit(support)
    query_ND = support.validation.feature_ND
    expected_NC = formula(support, query_ND, Chosen(1.17, 1.0, 2.0, delta), official=official)
    np.testing.assert_allclose(caps.predict(Examples(query_ND)), expected_NC, rtol=1e-5, atol=1e-5)
    if delta == 0:
        plain = sus_x.Config(search=False, gamma=2.0, distributions=distributions).build().fit(support)
        np.testing.assert_array_equal(plain.predict(Examples(query_ND)), caps.predict(Examples(query_ND)))


def test_the_two_distributions_differ(support: Support) -> None:
    query_ND = support.validation.feature_ND
    found = [
        sus_x.Config(search=False, distributions=kind).build().fit(support).predict(Examples(query_ND)) for kind in ("intended", "official")
    ]
    assert not np.allclose(*found)


@pytest.mark.parametrize("method", ["sus-x", "caps", "fast"])
def test_the_fast_grid_is_the_plain_loops(support: Support, method: str) -> None:
    config = sus_x.Config(**SMALL) if method == "sus-x" else caps_adapter.Config(**SMALL, deltas=(0.0, 0.5, 1.0), fast=method == "fast")
    grids = config.grids()
    assert len(grids.gammas) == (1 if method == "fast" else 3)
    best = Chosen(0, 0, accuracy=0.0)
    for alpha, beta, delta, gamma in itertools.product(*grids):
        logits_NC = formula(support, support.validation.feature_ND, Chosen(alpha, beta, gamma, delta))
        accuracy = float((logits_NC.argmax(axis=1) == support.validation.label_N).mean())
        if accuracy > best.accuracy:
            best = Chosen(float(alpha), float(beta), float(gamma), float(delta), accuracy)
    assert config.build().fit(support).chosen == best


def test_blocks_are_rescaled_each_on_its_own(support: Support) -> None:
    query_ND, chosen = support.validation.feature_ND, Chosen(1.17, 1.0, 5.0)
    adapter = sus_x.Config(search=False, gamma=5.0, block=40).build().fit(support)
    expected = np.concatenate([formula(support, query_ND[start : start + 40], chosen) for start in range(0, len(query_ND), 40)])
    np.testing.assert_allclose(adapter.predict(Examples(query_ND)), expected, rtol=1e-5, atol=1e-5)
    whole = sus_x.Config(search=False, gamma=5.0).build().fit(support)
    assert not np.allclose(whole.predict(Examples(query_ND)), expected)


def test_the_search_sees_the_blocks_of_the_prediction(support: Support) -> None:
    config = caps_adapter.Config(**SMALL, block=17)
    adapter = config.build().fit(support)
    logits_NC = adapter.predict(Examples(support.validation.feature_ND))
    assert adapter.chosen.accuracy == float((logits_NC.argmax(axis=1) == support.validation.label_N).mean())


def test_fast_predictions_do_not_depend_on_their_neighbours(support: Support) -> None:
    query_ND = support.validation.feature_ND
    adapter = caps_adapter.Config(fast=True, search=False).build().fit(support)
    together = adapter.predict(Examples(query_ND))
    alone = np.concatenate([adapter.predict(Examples(query_ND[row : row + 1])) for row in range(len(query_ND))])
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert adapter.chosen.gamma == 0


def test_without_validation_the_documented_defaults_hold(support: Support) -> None:
    bare = replace(support, validation=None)
    assert sus_x.Config().build().fit(bare).chosen == Chosen(1.17, 1.0, 0.1)
    assert caps_adapter.Config().build().fit(bare).chosen == Chosen(1.17, 1.0, 0.1, 0.5)


def test_captions_are_keys_of_caps_adapter_alone(support: Support) -> None:
    silent = replace(support, labelled=replace(support.labelled, caption_ND=None))
    assert caps_adapter.Config().build().needs == {"labelled", "captions"}
    with pytest.raises(DataError, match="needs captions"):
        caps_adapter.Config().build().fit(silent)
    adapters = [sus_x.Config(**SMALL).build().fit(given) for given in (silent, support)]
    assert adapters[0].chosen == adapters[1].chosen
    np.testing.assert_array_equal(*[adapter.predict(support.validation) for adapter in adapters])


def test_captions_near_the_target_help(support: Support) -> None:
    """Image keys around the wrong middles, caption keys around the right ones: the search must find the captions."""
    wrong = replace(support.labelled, feature_ND=np.roll(support.labelled.feature_ND, 1, axis=1))
    adapter = caps_adapter.Config(**SMALL, deltas=(0.0, 0.5, 1.0)).build().fit(replace(support, labelled=wrong))
    base = sus_x.Config(**SMALL).build().fit(replace(support, labelled=wrong))
    assert adapter.chosen.accuracy > base.chosen.accuracy
    assert adapter.chosen.delta > 0


def test_the_papers_grids_are_there() -> None:
    steps = {"alphas": 20, "betas": 200, "gammas": 50}
    ends = caps_adapter.Config().plain()
    full = caps_adapter.Config.parse(
        {**{name: {**ends[name], "steps": count} for name, count in steps.items()}, "deltas": [i / 10 for i in range(11)]}
    )
    assert np.prod([len(grid) for grid in full.grids()]) == 2_200_000
    assert full.grids().alphas[1] == 0.1 + (50 - 0.1) / 20


def test_divergences_that_are_all_equal_say_nothing() -> None:
    np.testing.assert_array_equal(sus_x.rescaled(np.full((2, 3), 0.7), np.array([[0.1, 0.5, 0.2]] * 2)), np.full((2, 3), 0.1))
    support = Support(np.tile(unit(np.ones((1, WIDTH))), (2, 1)), 20.0, Examples(unit(np.eye(WIDTH)[:1]), np.array([1])))
    logits_NC = sus_x.Config(gamma=3.0).build().fit(support).predict(Examples(unit(np.eye(WIDTH)[:1])))
    assert np.isfinite(logits_NC).all()


def test_a_divergence_has_the_query_first() -> None:
    query, key = np.log([[0.9], [0.1]]), np.log([[0.5], [0.5]])
    np.testing.assert_allclose(sus_x.divergence(query, key), [[0.9 * np.log(1.8) + 0.1 * np.log(0.2)]])


def test_blocks_hold_what_they_say(support: Support) -> None:
    blocks = sus_x.Blocks(Cache.of(support.labelled, len(support.text_CD)), support.text_CD.astype(np.float64), 20.0, block=32)
    seen = [(rows.start, block.image_MN.shape[1]) for rows, block in blocks.over(support.validation.feature_ND)]
    assert sum(width for _, width in seen) == len(support.validation.feature_ND)
    assert {width for _, width in seen[:-1]} == {32}
