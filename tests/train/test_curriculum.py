from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import WordTokenizer, drawings

from diptych.core.errors import ConfigError
from diptych.models.tokenizer import EOT, SOT, Tokenizer
from diptych.train.config import TrainConfig
from diptych.train.curriculum import ImageStage, stage
from diptych.train.loader import PairLoader

STAGES = (ImageStage(size=8, share=0.5), ImageStage(size=16, share=0.25))


def test_stages_end_at_whole_steps() -> None:
    assert [stage(STAGES, step, 8) for step in range(8)] == [0, 0, 0, 0, 1, 1, None, None]
    assert [stage(STAGES, step, 5) for step in range(5)] == [0, 0, 1, 1, None], "2.5 rounds to 2, 3.75 to 4"
    thirds = tuple(ImageStage(size=8, share=1 / 3) for _ in range(3))
    assert stage(thirds, 99, 100) == 2
    assert stage((), 0, 10) is None


def loader(tokenizer: Any, **settings: Any) -> PairLoader:
    frame, reader = drawings(40)
    config = TrainConfig.parse({"steps": 8, "batch_size": 8, **settings})
    return PairLoader(frame, reader, tokenizer, 24, config, seed=0)


def test_pictures_have_the_size_of_their_stage() -> None:
    stages = [{"size": 8, "share": 0.5}, {"size": 16, "share": 0.25}]
    growing = loader(WordTokenizer(), image_sizes=stages)
    assert [growing.batch(step).tensors["image_NCHW"].shape[-1] for step in range(8)] == [8, 8, 8, 8, 16, 16, 24, 24]
    plain = loader(WordTokenizer())
    assert np.array_equal(growing.batch(7).tensors["image_NCHW"], plain.batch(7).tensors["image_NCHW"])
    growing.check()


def test_captions_are_cut_and_keep_their_end() -> None:
    cut = loader(Tokenizer(16), text_lengths=[{"tokens": 5, "share": 0.5}])
    short, whole = cut.batch(0).tensors["text_NL"], cut.batch(7).tensors["text_NL"]
    assert short.shape[1] == 5 < whole.shape[1]
    assert ((short == EOT).sum(dim=1) == 1).all()
    assert (short[:, 0] == SOT).all()


def test_a_caption_that_fits_stays_as_it_is() -> None:
    tokenizer = Tokenizer(16)
    text_NL = tokenizer.encode_cut(["a cat", "a very long caption about a cat"])
    short_NL = tokenizer.shorten(text_NL, 4)
    assert short_NL[0].tolist() == text_NL[0, :4].tolist()
    assert short_NL[1].tolist() == [*text_NL[1, :3].tolist(), EOT]
    assert tokenizer.shorten(text_NL, 40) is text_NL


def test_a_tokenizer_that_cannot_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be cut"):
        loader(WordTokenizer(), text_lengths=[{"tokens": 5, "share": 0.5}])


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"image_sizes": [{"size": 8, "share": 0.7}, {"size": 16, "share": 0.7}]}, "more than the whole run"),
        ({"image_sizes": [{"size": 8, "share": 0.7}], "compile": True}, "compile builds the image tower for one size"),
        ({"text_lengths": [{"tokens": 2, "share": 0.7}]}, "greater than or equal to 3"),
        ({"image_sizes": [{"size": 8}]}, "share"),
        ({"patch_dropout": 1.0}, "less than 1"),
        ({"patch_dropout": 0.5, "freeze": "image"}, "no effect with freeze: image"),
        ({"layer_decay": 1.0}, "less than 1"),
        ({"parallel": "fsdp", "ema": 0.9}, "excludes ema"),
        ({"parallel": "fsdp", "compile": True}, "excludes compile"),
        ({"parallel": "fsdp", "accumulate": 2}, "excludes accumulate"),
        ({"parallel": "tensor"}, "ddp"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        TrainConfig.parse({"epochs": 1, **wrong})
