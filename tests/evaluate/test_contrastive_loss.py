"""The loss is torch's cross-entropy both ways, by batches that depend on keys alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import cross_entropy

from diptych.core.chance import key_hashes
from diptych.core.errors import DataError
from diptych.evaluate.contrastive_loss import Config, losses


def unit(n: int, seed: int) -> np.ndarray:
    value = np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)
    return value / np.linalg.norm(value, axis=1, keepdims=True)


class Fake:
    """Features by key and by text."""

    logit_scale = 20.0

    def __init__(self, n: int) -> None:
        self.image, self.text = dict(enumerate(unit(n, 0))), dict(enumerate(unit(n, 1)))

    def images(self, pairs: pl.DataFrame, transform: Any = None) -> np.ndarray:
        return np.stack([self.image[int(key)] for key in pairs["key"]])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.text[int(text.split()[1])] for text in texts])


def frame(keys: Sequence[int]) -> pl.DataFrame:
    captions = [[{"text": f"text {key}", "source": "alt"}, {"text": "text 0", "source": "alt"}] for key in keys]
    return pl.DataFrame({"key": [str(key) for key in keys], "split": "test", "captions": captions})


def test_a_batch_is_torchs_cross_entropy() -> None:
    image, text = unit(7, 0), unit(7, 1)
    logits = 20 * torch.from_numpy(image).double() @ torch.from_numpy(text).double().T
    own = torch.arange(7)
    expected = (cross_entropy(logits, own, reduction="none") + cross_entropy(logits.T, own, reduction="none")) / 2
    np.testing.assert_allclose(losses(image, text, 20.0, 4), expected, rtol=1e-5)
    assert losses(image, text, 20.0, 2).mean() < losses(image, text, 20.0, 7).mean(), "fewer foes"


def test_the_order_of_rows_does_not_matter_and_batches_go_by_key() -> None:
    fake = Fake(20)
    (one,) = Config(batch=5).build().run(fake, frame(range(20)), "set", 0)
    (other,) = Config(batch=5).build().run(fake, frame(range(19, -1, -1)), "set", 0)
    assert one.value == other.value
    assert list(one.keys) == list(other.keys)
    order = key_hashes([str(key) for key in range(20)]).argsort()
    image, text = (np.stack([side[int(key)] for key in order]) for side in (fake.image, fake.text))
    assert one.value == pytest.approx(losses(image, text, 20.0, 5).mean())
    assert one.low < one.value < one.high
    assert (one.task, one.metric, one.n) == ("contrastive-loss", "loss", 20)


def test_a_split_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no such split"):
        Config(split="val").build().run(Fake(2), frame(range(2)), "set", 0)
