from __future__ import annotations

import numpy as np
import pytest

from diptych.adapt import cache, tip_adapter
from diptych.adapt.tip_adapter import Config, TunedConfig
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support

WIDTH = 16


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def draw(middle_CD: np.ndarray, per_class: int, spread: float, seed: int) -> Examples:
    """Rows around their class's middle, label by label in turn."""
    label_N = np.tile(np.arange(len(middle_CD)), per_class)
    noise_ND = np.random.default_rng(seed).standard_normal((len(label_N), WIDTH)) * spread / WIDTH**0.5
    return Examples(unit(middle_CD[label_N] + noise_ND), label_N)


@pytest.fixture(params=[2, 7], ids=["two classes", "seven classes"])
def support(request: pytest.FixtureRequest) -> Support:
    """Text weights that lie a modality gap and much noise away from the pictures' middles."""
    middle_CD = unit(np.random.default_rng(0).standard_normal((request.param, WIDTH)))
    text_CD = unit(middle_CD + 0.5 * np.random.default_rng(1).standard_normal(middle_CD.shape))
    return Support(text_CD, 20.0, draw(middle_CD, 8, 1.2, 2), draw(middle_CD, 40, 1.2, 3))


def middles(support: Support) -> np.ndarray:
    return unit(np.random.default_rng(0).standard_normal((len(support.text_CD), WIDTH)))


def plain_loops(support: Support, alphas: np.ndarray, betas: np.ndarray) -> tuple[float, float, float]:
    """The authors' search, term by term."""
    key_MD, query_ND = (part.feature_ND.astype(np.float64) for part in (support.labelled, support.validation))
    value_MC = np.eye(len(support.text_CD))[support.labelled.label_N]
    clip_NC = support.logit_scale * query_ND @ support.text_CD.astype(np.float64).T
    best = (0.0, 0.0, 0.0)
    for beta in betas:
        for alpha in alphas:
            logits_NC = clip_NC + alpha * (np.exp(-(beta - beta * (query_ND @ key_MD.T))) @ value_MC)
            accuracy = float((logits_NC.argmax(axis=1) == support.validation.label_N).mean())
            if accuracy > best[2]:
                best = (float(alpha), float(beta), accuracy)
    return best


@pytest.mark.parametrize("tile_elements", [1 << 18, 1 << 11])
def test_the_fast_grid_is_the_plain_loops(support: Support, tile_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "TILE_ELEMENTS", tile_elements)
    config = Config()
    chosen = config.build().fit(support).chosen
    assert chosen is not None
    assert (chosen.alpha, chosen.beta, chosen.accuracy) == plain_loops(support, config.alphas.values(), config.betas.values())


def test_every_point_of_the_fast_grid_is_counted_right(support: Support) -> None:
    alphas, betas = np.array([0.1, 1.0, 4.0]), np.arange(20) * 0.5
    keys = cache.Cache.of(support.labelled, len(support.text_CD))
    weight_CD = support.logit_scale * support.text_CD.astype(np.float64)
    validation = support.validation
    hits = tip_adapter.search(keys, weight_CD, validation.feature_ND, validation.label_N, alphas, betas)
    for beta, row in zip(betas, hits, strict=True):
        for alpha, count in zip(alphas, row, strict=True):
            logits_NC = tip_adapter.logits(keys, weight_CD, validation.feature_ND, alpha, beta)
            assert (logits_NC.argmax(axis=1) == validation.label_N).sum() == count


def test_without_validation_the_documented_defaults_hold(support: Support) -> None:
    bare = Support(support.text_CD, support.logit_scale, support.labelled)
    adapter = Config().build().fit(bare)
    assert adapter.chosen == cache.Chosen(alpha=1.17, beta=1.0)
    assert Config(search=False, alpha=2.0).build().fit(support).chosen == cache.Chosen(alpha=2.0, beta=1.0)
    query_ND, key_MD = support.validation.feature_ND, support.labelled.feature_ND
    cache_NC = np.exp(query_ND @ key_MD.T - 1) @ np.eye(len(support.text_CD))[support.labelled.label_N]
    found_NC = adapter.predict(Examples(query_ND))
    assert found_NC.dtype == np.float32
    np.testing.assert_allclose(found_NC, 20 * query_ND @ support.text_CD.T + 1.17 * cache_NC, atol=1e-4)


def test_a_search_that_gets_nothing_right_falls_back_to_zero_shot(support: Support) -> None:
    text_CD = support.text_CD
    wrong = Support(text_CD, 1e6, support.labelled, Examples(text_CD, np.roll(np.arange(len(text_CD)), 1)))
    adapter = Config().build().fit(wrong)
    assert adapter.chosen == cache.Chosen(0.0, 0.0, accuracy=0.0)
    np.testing.assert_allclose(adapter.predict(Examples(text_CD)), 1e6 * text_CD @ text_CD.T, rtol=1e-5, atol=1)


def accuracy(adapter: tip_adapter.TipAdapter, test: Examples) -> float:
    return float((adapter.predict(Examples(test.feature_ND)).argmax(axis=1) == test.label_N).mean())


@pytest.mark.parametrize("support", [7], indirect=True)
def test_shots_help_and_trained_keys_help_more(support: Support) -> None:
    test = draw(middles(support), 60, 1.2, 4)
    zero_shot = float(((test.feature_ND @ support.text_CD.T).argmax(axis=1) == test.label_N).mean())
    plain, trained = Config().build().fit(support), TunedConfig(lr=0.02).build().fit(support)
    assert accuracy(plain, test) > zero_shot + 0.02
    assert accuracy(trained, test) > accuracy(plain, test)


def test_training_is_named_by_the_seed_and_lowers_the_loss(support: Support) -> None:
    def fitted(seed: int, epochs: int = 20) -> tip_adapter.TipAdapter:
        config = TunedConfig(batch_size=8, epochs=epochs)
        return config.build().fit(Support(support.text_CD, support.logit_scale, support.labelled, seed=seed))

    def loss(adapter: tip_adapter.TipAdapter) -> float:
        logits_NC = adapter.predict(support.labelled).astype(np.float64)
        log_NC = logits_NC - np.log(np.exp(logits_NC).sum(axis=1, keepdims=True))
        return float(-log_NC[np.arange(len(log_NC)), support.labelled.label_N].mean())

    first, again, other, untrained = fitted(0), fitted(0), fitted(1), fitted(0, epochs=0)
    np.testing.assert_array_equal(first.cache.key_MD, again.cache.key_MD)
    assert not np.array_equal(first.cache.key_MD, other.cache.key_MD)
    np.testing.assert_array_equal(untrained.cache.key_MD, Config().build().fit(support).cache.key_MD)
    assert loss(first) < loss(untrained)


def test_augmented_views_make_one_key_and_many_training_rows(support: Support) -> None:
    labelled = support.labelled
    rows = len(labelled.label_N)
    views = Examples(
        unit(np.concatenate([labelled.feature_ND, labelled.feature_ND + 0.1])), np.tile(labelled.label_N, 2), np.tile(np.arange(rows), 2)
    )
    for config in (Config(), TunedConfig(epochs=1)):
        adapter = config.build().fit(Support(support.text_CD, support.logit_scale, views))
        assert len(adapter.cache.key_MD) == rows


def test_what_is_missing_is_said(support: Support) -> None:
    assert Config().build().needs == {"labelled"}
    with pytest.raises(DataError, match="nothing to learn"):
        Config().build().fit(Support(support.text_CD, 20.0, None, support.validation))
    with pytest.raises(DataError, match="labels"):
        Config().build().fit(Support(support.text_CD, 20.0, support.labelled, Examples(support.validation.feature_ND)))
    fitted = Config().build().fit(support)
    with pytest.raises(DataError, match="do not match"):
        fitted.predict(Examples(np.ones((3, WIDTH + 1), np.float32)))
    with pytest.raises(DataError, match="not numbers"):
        fitted.predict(Examples(np.full((3, WIDTH), np.inf, np.float32)))
    assert fitted.predict(Examples(np.ones((0, WIDTH), np.float32))).shape == (0, len(support.text_CD))
