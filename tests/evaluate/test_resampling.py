from __future__ import annotations

import numpy as np
import pytest

from diptych.evaluate import resampling
from diptych.evaluate.resampling import bias_corrected, counts, sums


def test_every_replicate_draws_as_many_examples_as_there_are(monkeypatch):
    cell = np.array([0, 0, 0, 1, 3])
    whole = np.concatenate(list(counts(cell, 4, 1, "x", 50)))
    assert whole.shape == (50, 4)
    assert (whole.sum(axis=1) == 5).all()
    assert (whole[:, 2] == 0).all()
    assert whole[:, 0].mean() == pytest.approx(3, abs=0.5)
    monkeypatch.setattr(resampling, "CHUNK", 12)
    blocks = list(counts(cell, 4, 1, "x", 50))
    assert max(map(len, blocks)) == 2
    assert (np.concatenate(blocks) == whole).all()


def test_draws_have_names():
    x = np.arange(30.0)[:, None]
    assert (sums(x, 1, "a") == sums(x, 1, "a")).all()
    assert (sums(x, 1, "a") != sums(x, 1, "b")).any()
    assert (sums(x, 1, "a") != sums(x, 2, "a")).any()


def test_sums_have_the_spread_of_the_mean():
    x = np.random.default_rng(0).normal(2, 3, 400)
    both = sums(np.stack([x, np.ones(400)], axis=1), 0, resamples=2000)
    assert (both[:, 1] == 400).all()
    assert both[:, 0].mean() / 400 == pytest.approx(x.mean(), abs=0.02)
    assert both[:, 0].std() / 400 == pytest.approx(x.std() / 20, rel=0.08)


def test_without_bias_the_interval_is_the_percentiles():
    replicate = np.random.default_rng(0).normal(size=20001)
    low, high = bias_corrected(float(np.median(replicate)), replicate)
    assert (low, high) == pytest.approx(tuple(np.quantile(replicate, [0.025, 0.975])), abs=1e-3)


def test_bias_is_taken_off_and_the_value_stays_inside():
    replicate = np.random.default_rng(0).normal(0.5, 1, 20001)
    low, high = bias_corrected(0.0, replicate)
    assert (low, high) == pytest.approx((0.5 - 1 - 1.96, 0.5 - 1 + 1.96), abs=0.1)
    assert bias_corrected(-9.0, replicate)[0] == -9.0
    assert bias_corrected(9.0, replicate)[1] == 9.0
    assert bias_corrected(1.0, np.ones(10)) == (1.0, 1.0)


def test_no_figure_no_interval():
    assert np.isnan(bias_corrected(np.nan, np.ones(3))).all()
    assert np.isnan(bias_corrected(1.0, np.full(3, np.nan))).all()
    assert bias_corrected(1.0, np.array([np.nan, 1.0])) == (1.0, 1.0)
