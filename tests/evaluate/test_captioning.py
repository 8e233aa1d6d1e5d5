from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.evaluate.captioning import Captioning, Config

TEXTS = ["the digit seven", "a handwritten digit", "three or seven", "the digit two"]


@pytest.fixture
def pairs(pairs_of: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    captions = [["the digit seven", "a digit"], ["a handwritten digit"], ["something else"], []]
    return pairs_of(list("abcd"), captions, label_name=["seven", "three", "three", "two"])


@pytest.fixture
def encoder(table_encoder: Any) -> Any:
    vectors = dict(zip("abcd", np.eye(4), strict=True))
    words = {text: np.eye(4)[row] for row, text in enumerate(TEXTS)}
    return table_encoder(vectors, lambda text: words.get(text, np.ones(4)))


def rows(encoder: Any, pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> dict[str, Metric]:
    monkeypatch.setattr(Captioning, "captions", lambda *_: TEXTS)
    metrics = Config(template="", **fields).build().run(encoder, pairs, "set", 0)
    return {metric.metric: metric for metric in metrics}


def test_fit_and_agreement(encoder: Any, pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(encoder, pairs, monkeypatch)
    assert found["clip_score"].value == pytest.approx(2.5)
    assert found["recall@1"].value == 1
    assert found["reference_match"].value == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["cider"].keys == ["a", "b", "c"]  # the fourth has no reference
    assert found["cider"].per_example is not None
    assert found["cider"].value == pytest.approx(float(found["cider"].per_example.mean()))
    assert 0 < found["bleu_4"].low <= found["bleu_4"].value <= found["bleu_4"].high <= 1
    assert found["rouge_l"].value == pytest.approx((1 + 1 + 0) / 3)
    assert 0 < found["meteor_exact"].value < 1
    assert found["ref_clip_score"].n == 3
    assert found["distinct"].value == 1
    assert found["words"].value == pytest.approx(3)


def test_naming(encoder: Any, pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(
        encoder, pairs, monkeypatch, names="label_name", forms=("the digit {}",), phrases={"generic": "A handwritten digit."}, guidance=2.0
    )
    assert found["named"].value == 0.75
    assert found["named_right"].value == 0.5  # two names are not the right one
    assert found["right_of_named"].value == pytest.approx(2 / 3)
    assert found["right_of_named"].keys == ["a", "c", "d"]
    assert found["in_form"].value == 0.5
    assert found["says.generic"].value == 0.25
    assert found["named"].settings["guidance"] == 2.0


def test_a_set_without_references_or_names(encoder: Any, pairs_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = pairs_of(list("abcd"), [[], [], [], []])
    found = rows(encoder, bare, monkeypatch)
    assert "cider" not in found
    assert "ref_clip_score" not in found
    with pytest.raises(DataError, match="does not say what is shown"):
        rows(encoder, bare, monkeypatch, names="label_name")


def test_a_real_captioner_is_asked_in_batches(pairs: pl.DataFrame, table_encoder: Any) -> None:
    from diptych.models import clip
    from diptych.models.captioner import Captioner, keep_only, tokens_of

    model = clip.create("coca-digits-16", 0).eval()
    keep_only(model, tokens_of(TEXTS, model.tokenizer))
    image_of = {key: np.random.default_rng(row).integers(0, 256, (3, 16, 16), dtype=np.uint8) for row, key in enumerate("abcd")}
    encoder = table_encoder({}, lambda _: np.ones(4))
    encoder.model, encoder.load_pixels = model, lambda part: np.stack([image_of[key] for key in part["key"]])
    import torch

    every = torch.from_numpy(np.stack(list(image_of.values())))
    for batch_size in (3, 9):
        config = Config(guidance=1.7, max_length=5, batch_size=batch_size)
        assert Captioning(config).captions(encoder, pairs, 0) == Captioner(model).caption(every, 1.7, max_length=5)
    drawn = [Captioning(Config(temperature=1.0, max_length=5, batch_size=size)).captions(encoder, pairs, 5) for size in (1, 4)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != Captioning(Config(temperature=1.0, max_length=5)).captions(encoder, pairs, 6)


def test_refusals(pairs: pl.DataFrame, table_encoder: Any) -> None:
    with pytest.raises(DataError, match="The benchmark captions pictures"):
        Config().build().run(table_encoder({}, lambda _: np.ones(4)), pairs, "set", 0)
    for fields, fault in (({"beams": 2, "temperature": 1.0}, "exclude each other"), ({"forms": ["{}"]}, "forms need names")):
        with pytest.raises(ConfigError, match=fault):
            Config.parse(fields)
