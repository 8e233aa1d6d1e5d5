from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from tiny import MemoryReader, WordTokenizer, drawings, encoded, table

from diptych.core.errors import ConfigError, DataError
from diptych.pairs.decode import decode_train
from diptych.train.config import TrainConfig
from diptych.train.loader import Batch, PairLoader

SETTINGS = {
    "epochs": 2,
    "batch_size": 8,
    "augment": {"crop_scale": [0.5, 1.0], "flip": True, "rotate_deg": 10.0, "brightness": 0.3, "hue": 0.1, "background": "random"},
}


def loader(frame: pl.DataFrame, reader: MemoryReader, *, rank: int = 0, world: int = 1, seed: int = 0, **changes: object) -> PairLoader:
    config = TrainConfig.parse({**SETTINGS, **changes})
    return PairLoader(frame, reader, WordTokenizer(), 8, config, seed=seed, rank=rank, world=world)


def tensors(batches: list[Batch]) -> dict[str, list[torch.Tensor]]:
    return {name: [batch.tensors[name] for batch in batches] for name in batches[0].tensors}


def same(left: list[Batch], right: list[Batch]) -> bool:
    ours, theirs = tensors(left), tensors(right)
    return all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))


def test_a_batch_has_the_shapes_and_types_promised() -> None:
    frame, reader = drawings(40)
    batch = loader(frame, reader).batch(0).tensors
    assert batch["image_NCHW"].shape == (8, 3, 8, 8)
    assert batch["image_NCHW"].dtype == torch.uint8
    assert batch["text_NL"].shape[0] == 8
    assert batch["text_NL"].dtype == torch.int64
    assert batch["row_N"].dtype == torch.int64
    assert (batch["text_NL"] > 0).any(dim=0).all(), "no column of padding alone"


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_threads_and_starts_change_nothing(cache_bytes: int) -> None:
    frame, reader = drawings(40)
    whole = list(loader(frame, reader, cache_bytes=cache_bytes).batches(0, 10))
    for workers in (1, 3):
        assert same(whole, list(loader(frame, reader, cache_bytes=cache_bytes, loader_workers=workers).batches(0, 10)))
    assert same(whole[7:], list(loader(frame, reader, cache_bytes=cache_bytes).batches(7, 10)))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_the_global_batch(world: int) -> None:
    frame, reader = drawings(40)
    for step in (0, 6):
        whole = loader(frame, reader).batch(step).tensors
        parts = [loader(frame, reader, rank=rank, world=world).batch(step).tensors for rank in range(world)]
        assert torch.equal(torch.cat([part["image_NCHW"] for part in parts]), whole["image_NCHW"])
        assert torch.equal(torch.cat([part["row_N"] for part in parts]), whole["row_N"])
        texts = [torch.nn.functional.pad(part["text_NL"], (0, whole["text_NL"].shape[1] - part["text_NL"].shape[1])) for part in parts]
        assert torch.equal(torch.cat(texts), whole["text_NL"])


def test_a_pair_looks_the_same_in_any_order_of_the_table() -> None:
    frame, reader = drawings(40)
    batches = {}
    for name, rows in (("sorted", frame), ("reversed", frame.reverse())):
        for batch in loader(rows, reader, batch_size=40).batches(0, 1):
            keys = rows["key"].gather(batch.tensors["row_N"].numpy()).to_list()
            batches[name] = dict(zip(keys, zip(batch.tensors["image_NCHW"], batch.tensors["text_NL"], strict=True), strict=True))
    assert len(batches["sorted"]) == 40
    for key, (image, text) in batches["sorted"].items():
        assert torch.equal(image, batches["reversed"][key][0])
        assert torch.equal(text, batches["reversed"][key][1])


def test_visits_differ_by_epoch_and_seed() -> None:
    frame, reader = drawings(8)
    views = [loader(frame, reader, seed=seed).batch(step).tensors for seed in (0, 1) for step in (0, 1)]
    by_row = [view["image_NCHW"][view["row_N"].argsort()] for view in views]
    assert all(not torch.equal(by_row[0], other) for other in by_row[1:])


def test_small_sets_are_decoded_once_and_others_on_every_visit() -> None:
    frame, reader = drawings(40)
    pixels = 40 * 24 * 28
    list(loader(frame, reader, cache_bytes=4 * pixels).batches(0, 15))
    assert reader.reads == 40
    list(loader(frame, reader, cache_bytes=4 * pixels - 1).batches(0, 15))
    assert reader.reads == 40 + 120


def test_without_augmentation_a_picture_is_its_whole_self() -> None:
    frame, reader = drawings(8)
    config = {"augment": {"crop_scale": [1.0, 1.0], "crop_ratio": [24 / 28, 24 / 28]}}
    batch = loader(frame, reader, **config).batch(0).tensors
    row = int(batch["row_N"][0])
    image = frame["image"][row]
    data = reader.read("s", image["offset"], image["size"])
    expected = decode_train(data, 8, (0, 0, 24, 28), (24, 28))
    np.testing.assert_array_equal(batch["image_NCHW"][0].numpy().transpose(1, 2, 0), expected)


def test_captions_are_drawn_per_visit_or_are_the_first() -> None:
    frame, reader = drawings(40)

    class Spy(WordTokenizer):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def encode_cut(self, texts: list[str]) -> np.ndarray:
            self.seen += texts
            return super().encode_cut(texts)

    def seen(caption: str) -> list[str]:
        spy = Spy()
        config = TrainConfig.parse({**SETTINGS, "caption": caption, "batch_size": 40})
        list(PairLoader(frame, reader, spy, 8, config, seed=0).batches(0, 10))
        return spy.seen

    assert all(text.startswith("a ") for text in seen("first"))
    drawn = seen("uniform")
    share = sum(text.startswith("number") for text in drawn) / len(drawn)
    assert 0.42 < share < 0.58
    assert {text for text in drawn if text.startswith("number")} == {f"number {row} of many drawings" for row in range(40)}


def test_avoid_keeps_labels_apart() -> None:
    frame, reader = drawings(40)
    for batch in loader(frame, reader, avoid="label").batches(0, 10):
        assert frame["label"].gather(batch.tensors["row_N"].numpy()).n_unique() == 8


def test_a_picture_that_broke_underneath_is_named() -> None:
    frame, reader = drawings(40)
    offset, size = frame["image"][13]["offset"], frame["image"][13]["size"]
    reader.data = reader.data[:offset] + bytes(size) + reader.data[offset + size :]
    for settings in ({"cache_bytes": 0}, {"loader_workers": 2}):
        with pytest.raises(DataError, match=rf"pair-13 \(s at {offset}\)"):
            list(loader(frame, reader, **settings).batches(0, 5))


def test_the_first_batches_are_checked_and_all_that_is_broken_is_shown() -> None:
    frame, reader = drawings(40)
    ours = loader(frame, reader)
    ours.check()
    rows = [int(ours.order.batch(step)[place]) for step, place in ((0, 3), (1, 5))]
    for row in rows:
        image = frame["image"][row]
        reader.data = reader.data[: image["offset"]] + bytes(image["size"]) + reader.data[image["offset"] + image["size"] :]
    with pytest.raises(DataError, match="2 of the first pictures") as error:
        loader(frame, reader).check()
    assert all(f"pair-{row} " in str(error.value) for row in rows)


def test_pictures_of_many_sizes_and_kinds_make_one_batch() -> None:
    images = [Image.new("RGBA" if row % 2 else "RGB", (10 + 7 * row, 60 - 6 * row), (row, 9, 9, 128)[: 3 + row % 2]) for row in range(8)]
    pictures = [encoded(image, "PNG" if row % 2 else "JPEG") for row, image in enumerate(images)]
    frame = table(images, pictures, [["some words here"]] * 8)
    for cache_bytes in (0, 1 << 30):
        batch = loader(frame, MemoryReader(pictures), cache_bytes=cache_bytes).batch(0)
        assert batch.tensors["image_NCHW"].shape == (8, 3, 8, 8)


def test_pairs_without_picture_or_caption_are_refused() -> None:
    frame, reader = drawings(16)
    no_captions = frame.with_columns(captions=pl.when(pl.col("key") == "pair-3").then([]).otherwise(pl.col("captions")))
    no_size = frame.with_columns(image=pl.col("image").struct.with_fields(width=None))
    for broken, name in ((no_captions, "captions"), (no_size, "image.width")):
        with pytest.raises(DataError, match=name):
            loader(broken.cast({"image": frame.schema["image"], "captions": frame.schema["captions"]}), reader)


def test_impossible_settings_are_refused() -> None:
    frame, reader = drawings(16)
    with pytest.raises(ConfigError, match="multiple of 3"):
        loader(frame, reader, world=3)
    with pytest.raises(ConfigError, match="no such column"):
        loader(frame, reader, avoid="class")
    with pytest.raises(ConfigError, match="smaller than one batch"):
        loader(frame, reader, batch_size=17)


def test_reader_errors_name_the_pair() -> None:
    frame, _ = drawings(16)

    class Broken:
        def read(self, shard: str, offset: int, size: int) -> bytes:
            raise DataError.at("A shard cannot be read", shard, "gone", "a tar")

    with pytest.raises(DataError, match="pair-") as error:
        loader(frame, Broken()).batch(0)  # type: ignore[arg-type]
    assert "gone" in str(error.value)
