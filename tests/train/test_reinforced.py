"""The loader shows stored augmentations with the features that belong to them; a training asks no teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tiny import COLOURS, SHAPES, MemoryReader, WordTokenizer, drawing, drawings, write_dataset

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Wants
from diptych.pairs.augmentations import Augmentation, Recipe, draw
from diptych.pairs.reinforced import COLUMN, Reinforced, Reinforcement, series
from diptych.train.config import TrainConfig
from diptych.train.loader import PairLoader

WANTS = Wants(sources=("synthetic",), reinforced=True)
SIZE = 16


def with_made_up(frame: pl.DataFrame) -> pl.DataFrame:
    more = pl.lit([{"text": "made up", "source": "synthetic:x", "score": None}], dtype=frame.schema["captions"])
    return frame.with_columns(captions=pl.concat_list("captions", more))


def reinforced(frame: pl.DataFrame, width: int = 4) -> pl.Series:
    """Features that tell the row and the place of the augmentation, or of the caption."""
    pairs = []
    for row, (key, captions) in enumerate(frame.select("key", "captions").iter_rows()):
        texts = [caption["text"] for caption in captions]
        augmentations = [draw(Recipe(size_px=SIZE), 0, key, index, drawing(row).size) for index in range(3)]
        image_AF = np.array([[row, index, *[0] * (width - 2)] for index in range(3)])
        text_MF = np.array([[row, 10 + place, *[0] * (width - 2)] for place in range(len(texts))])
        pairs.append(Reinforcement(augmentations, image_AF, texts, text_MF))
    return series(SIZE, (width,), pairs)


def prepared(rows: int = 24) -> tuple[pl.DataFrame, MemoryReader]:
    frame, reader = drawings(rows)
    frame = with_made_up(frame)
    return frame.with_columns(reinforced(frame)), reader


def loader(frame: pl.DataFrame, reader: MemoryReader, rank: int = 0, world: int = 1, tokenizer: Any = None, **changes: Any) -> PairLoader:
    config = TrainConfig.parse({"epochs": 4, "batch_size": 8, **changes})
    return PairLoader(frame, reader, tokenizer or WordTokenizer(), SIZE, config, seed=0, rank=rank, world=world, wants=WANTS)


class Spy(WordTokenizer):
    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def encode_cut(self, texts: list[str]) -> np.ndarray:
        self.seen.append(texts)
        return super().encode_cut(texts)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_pictures_and_texts_come_with_their_own_features(cache_bytes: int) -> None:
    frame, reader = prepared()
    stored, spy, choices = Reinforced(frame[COLUMN], frame["key"]), Spy(), set()
    ours = loader(frame, reader, tokenizer=spy, cache_bytes=cache_bytes)
    for step in range(9):
        spy.seen.clear()
        batch = ours.batch(step).tensors
        own, made_up = spy.seen
        assert set(made_up) == {"made up"}
        assert batch["teacher_image_NKD"].shape == (8, 1, 4)
        for place, row in enumerate(batch["row_N"].tolist()):
            image_row, choice = batch["teacher_image_NKD"][place, 0, :2].int().tolist()
            assert image_row == row
            choices.add(choice)
            expected = stored.picture(np.asarray(drawing(row)), row, choice, SIZE)
            assert np.array_equal(batch["image_NCHW"][place].permute(1, 2, 0).numpy(), expected)
            captions = [caption["text"] for caption in frame["captions"][row]]
            assert batch["teacher_text_NKD"][place, 0, :2].tolist() == [row, 10 + captions.index(own[place])]
            assert batch["teacher_synthetic_NKD"][place, 0, :2].tolist() == [row, 12]
    assert choices == {0, 1, 2}


def test_ranks_share_the_batch() -> None:
    frame, reader = prepared()
    whole = loader(frame, reader).batch(2).tensors
    halves = [loader(frame, reader, rank=rank, world=2).batch(2).tensors for rank in range(2)]
    for name, tensor in whole.items():
        if name.startswith(("teacher", "image", "row")):
            assert torch.equal(torch.cat([half[name] for half in halves]), tensor), name


def _of_a_wider_picture() -> pl.Series:
    (width, height), feature = drawing(0).size, np.zeros((1, 4))
    texts = [f"a {COLOURS[7 % 5]} {SHAPES[7 % 2]}", "number 7 of many drawings", "made up"]
    return series(SIZE, (4,), [Reinforcement([Augmentation((0, 0, width + 1, height))], feature, texts, np.zeros((3, 4)))])


def test_other_views_are_drawn_as_ever() -> None:
    frame, reader = prepared()
    config = TrainConfig.parse({"epochs": 4, "batch_size": 8})
    both, plain = (
        PairLoader(frame, reader, WordTokenizer(), SIZE, config, seed=0, wants=wants).batch(1).tensors
        for wants in (Wants(sources=("synthetic",), reinforced=True, views=("strong",)), Wants(views=("strong",)))
    )
    assert torch.equal(both["view0_NCHW"], plain["view0_NCHW"])
    assert not torch.equal(both["image_NCHW"], plain["image_NCHW"])


def test_pairs_that_were_not_prepared_are_refused() -> None:
    frame, reader = prepared()
    with pytest.raises(ConfigError, match="not shown to teachers"):
        loader(frame.drop(COLUMN), reader)
    with pytest.raises(ConfigError, match="must not be changed again"):
        loader(frame, reader, augment={"flip": True})
    wide = frame.head(8).with_columns(pl.concat([reinforced(frame.head(7)), _of_a_wider_picture()]))
    with pytest.raises(DataError, match="a crop of 25 x 28"):
        loader(wide, reader).check()
    later = frame.with_columns(captions=with_made_up(frame)["captions"].list.eval(pl.element().struct.with_fields(text=pl.lit("later"))))
    with pytest.raises(DataError, match="reinforce"):
        loader(later, reader).batch(0)


def test_a_training_asks_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.models import clip
    from diptych.objectives.mobileclip import Config
    from diptych.optimizers.adamw import Config as AdamW
    from diptych.train.run import train

    frame = with_made_up(drawings(16)[0])
    extra = {"captions": pl.Series(frame["captions"]), COLUMN: pl.Series(reinforced(frame))}
    write_dataset(tmp_path / "data", 16, {name: pl.lit(values) for name, values in extra.items()})
    made, plain = [], clip.create
    monkeypatch.setattr(clip, "create", lambda name, *rest: made.append(name) or plain(name, *rest))
    config = TrainConfig.parse({"epochs": 2, "batch_size": 8, "log_every": 1})
    model, objective, optimizer = "digits-16-small", Config().build, AdamW().build
    summary = train(tmp_path / "data", "train", config, model, objective, optimizer, tmp_path / "out", tmp_path / "scratch", 0)
    assert summary.finished
    assert {"distillation", "contrastive"} <= summary.losses.keys()
    assert made == [model], "the student is the only model"
