from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.evaluate import coco_agreement
from diptych.evaluate.caption_metrics import Agreement, bleu_counts
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
    assert found["meteor_stem"].value == pytest.approx(((1 - 0.5 / 3**3) + (1 - 0.5 / 3**3) + 0) / 3)
    assert "meteor" not in found
    assert {name for name, row in found.items() if "agreement" in row.settings} == {"cider", "bleu_4", "rouge_l", "meteor_stem"}
    assert found["cider"].settings["agreement"] == "builtin"
    assert "wordnet" not in found["cider"].settings
    assert found["ref_clip_score"].n == 3
    assert found["distinct"].value == 1
    assert found["words"].value == pytest.approx(3)


def test_meteor_with_synonyms(encoder: Any, pairs_of: Any, monkeypatch: pytest.MonkeyPatch, wordnet: Path) -> None:
    pairs = pairs_of(list("abcd"), [["the number seven"], [], [], []])
    without, found = rows(encoder, pairs, monkeypatch), rows(encoder, pairs, monkeypatch, wordnet=str(wordnet))
    assert without["meteor_stem"].value == pytest.approx(2 / 3 * (1 - 0.5))
    assert found["meteor"].value == pytest.approx(1 - 0.5 / 3**3)
    assert "meteor_stem" not in found
    assert found["meteor"].settings["wordnet"] == str(wordnet)
    assert found["cider"].settings == without["cider"].settings


def test_a_wordnet_is_read_before_anything_is_captioned(encoder: Any, pairs: pl.DataFrame, wordnet: Path) -> None:
    (wordnet / "index.verb").write_text("run v 1")
    with pytest.raises(DataError, match="WordNet cannot be read"):
        Config(wordnet=str(wordnet)).build().run(encoder, pairs, "set", 0)


def test_agreement_by_the_fields_own_scorer(encoder: Any, pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def agreement(*texts: Any) -> Agreement:
        asked.append(texts)
        counts = bleu_counts([["a", "digit"]] * 3, [[["a", "digit"]]] * 3)
        return Agreement(np.asarray([1.0, 2.0, 3.0]), np.full(3, 0.5), np.asarray([0.25, 0.5, 0.75]), 0.625, counts)

    monkeypatch.setattr(coco_agreement, "agreement", agreement)
    found = rows(encoder, pairs, monkeypatch, agreement="coco")
    # whole texts go there, of the pairs with references
    assert asked == [(TEXTS[:3], [["the digit seven", "a digit"], ["a handwritten digit"], ["something else"]])]
    assert (found["cider"].value, found["bleu_4"].value, found["rouge_l"].value, found["meteor"].value) == (2, 0.625, 0.5, 0.5)
    assert found["meteor"].keys == ["a", "b", "c"]
    assert found["meteor"].low < 0.5 < found["meteor"].high
    assert found["bleu_4"].low <= 0.625 <= found["bleu_4"].high
    assert all(found[name].settings["agreement"] == "coco" for name in ("cider", "bleu_4", "rouge_l", "meteor"))
    assert "meteor_stem" not in found
    builtin = rows(encoder, pairs, monkeypatch)
    assert found["clip_score"].settings == builtin["clip_score"].settings
    assert found["reference_match"].value == builtin["reference_match"].value


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


def test_what_agreement_needs_is_asked_for_before_the_run(monkeypatch: pytest.MonkeyPatch, wordnet: Path) -> None:
    where = "evaluate.benchmarks.0"
    with pytest.raises(ConfigError, match=r"METEOR 1\.5 .* brings synonyms of its own"):
        Config.parse({"agreement": "coco", "wordnet": str(wordnet)}, where)
    (wordnet / "verb.exc").unlink()
    (wordnet / "data.adj").unlink()
    with pytest.raises(ConfigError, match=r"(?s)evaluate\.benchmarks\.0\.wordnet\n.* without verb\.exc, data\.adj>.*wordnet-base"):
        Config.parse({"wordnet": str(wordnet)}, where)
    monkeypatch.setattr(coco_agreement, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"(?s)evaluate\.benchmarks\.0\.agreement.*pip install pycocoevalcap"):
        Config.parse({"agreement": "coco"}, where)
    assert Config.directories == ("scorer", "wordnet")
