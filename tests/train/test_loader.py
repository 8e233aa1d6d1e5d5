from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from tiny import MemoryReader, WordTokenizer, drawings, encoded, table

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Wants
from diptych.pairs.decode import decode_train
from diptych.train.config import TrainConfig
from diptych.train.loader import PLAIN, Batch, PairLoader

SETTINGS = {
    "epochs": 2,
    "batch_size": 8,
    "augment": {"crop_scale": [0.5, 1.0], "flip": True, "rotate_deg": 10.0, "brightness": 0.3, "hue": 0.1, "background": "random"},
}


def loader(
    frame: pl.DataFrame,
    reader: MemoryReader,
    *,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    wants: Wants = PLAIN,
    tokenizer: WordTokenizer | None = None,
    **changes: object,
) -> PairLoader:
    config = TrainConfig.parse({**SETTINGS, **changes})
    return PairLoader(frame, reader, tokenizer or WordTokenizer(), 8, config, seed=seed, rank=rank, world=world, wants=wants)


class Spy(WordTokenizer):
    """Keeps the texts that it was asked for, a list a call."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def encode_cut(self, texts: list[str]) -> np.ndarray:
        self.seen.append(texts)
        return super().encode_cut(texts)


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

    def seen(caption: str) -> list[str]:
        spy = Spy()
        config = TrainConfig.parse({**SETTINGS, "caption": caption, "batch_size": 40})
        list(PairLoader(frame, reader, spy, 8, config, seed=0).batches(0, 10))
        return [text for texts in spy.seen for text in texts]

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


VIEWS = Wants(views=("weak", "strong"), columns=("label", "weight"), captions=1)


def weighted(frame: pl.DataFrame) -> pl.DataFrame:
    weight = [None if row % 3 == 0 else row / 10 for row in range(frame.height)]
    return frame.with_columns(weight=pl.Series(weight), label=pl.when(pl.col("label") < 5).then("label"))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_an_objective_gets_what_it_wants_and_the_rest_stays_as_it_was(cache_bytes: int) -> None:
    frame, reader = drawings(40)
    frame = weighted(frame)
    plain = list(loader(frame, reader, cache_bytes=cache_bytes).batches(0, 5))
    rich = list(loader(frame, reader, cache_bytes=cache_bytes, wants=VIEWS).batches(0, 5))
    assert plain[0].tensors.keys() == {"image_NCHW", "text_NL", "row_N"}
    assert rich[0].tensors.keys() == plain[0].tensors.keys() | {"view0_NCHW", "view1_NCHW", "label_N", "weight_N", "text1_NL"}
    assert same(plain, [Batch({name: batch.tensors[name] for name in plain[0].tensors}, 0, 0) for batch in rich])
    for batch in rich:
        image, weak, strong = (batch.tensors[name] for name in ("image_NCHW", "view0_NCHW", "view1_NCHW"))
        assert weak.dtype == strong.dtype == torch.uint8
        assert weak.shape == strong.shape == image.shape
        for left, right in ((image, weak), (image, strong), (weak, strong)):
            assert (left != right).flatten(1).any(dim=1).all()


def test_columns_hold_the_rows_numbers_and_say_where_there_is_none() -> None:
    frame, reader = drawings(40)
    frame = weighted(frame)
    batch = loader(frame, reader, wants=VIEWS, batch_size=40).batch(0).tensors
    rows = frame[batch["row_N"].numpy()]
    assert batch["label_N"].dtype == torch.int64
    assert batch["label_N"].tolist() == rows["label"].fill_null(-1).to_list()
    assert -1 in batch["label_N"]
    assert batch["weight_N"].dtype == torch.float32
    assert batch["weight_N"].isnan().tolist() == rows["weight"].is_null().to_list()
    assert batch["weight_N"].nansum().item() == pytest.approx(rows["weight"].sum())


def test_views_are_the_same_for_any_ranks_and_order_and_others_in_the_next_epoch() -> None:
    frame, reader = drawings(40)
    wants = Wants(views=("strong", "strong"))
    whole = loader(frame, reader, wants=wants).batch(3).tensors
    parts = [loader(frame, reader, rank=rank, world=2, wants=wants).batch(3).tensors for rank in (0, 1)]
    for view in ("view0_NCHW", "view1_NCHW"):
        assert torch.equal(torch.cat([part[view] for part in parts]), whole[view])
    assert not torch.equal(whole["view0_NCHW"], whole["view1_NCHW"])
    one_batch = {"batch_size": 40, "wants": wants}
    forth, back = loader(frame, reader, **one_batch).batch(0).tensors, loader(frame.reverse(), reader, **one_batch).batch(0).tensors
    order, reverse = forth["row_N"].argsort(), (39 - back["row_N"]).argsort()
    assert torch.equal(forth["view1_NCHW"][order], back["view1_NCHW"][reverse])
    later = loader(frame, reader, **one_batch).batch(1).tensors
    assert not torch.equal(forth["view1_NCHW"][order], later["view1_NCHW"][later["row_N"].argsort()])


def test_bytes_are_read_once_for_all_views() -> None:
    frame, reader = drawings(40)
    loader(frame, reader, cache_bytes=0, wants=Wants(views=("weak", "strong", "simclr"))).batch(0)
    assert reader.reads == 8


@pytest.mark.parametrize("caption", ["uniform", "first"])
def test_further_captions_are_others_of_the_pair(caption: str) -> None:
    frame, reader = drawings(40)
    three = pl.concat_list("captions", pl.lit([{"text": "the third text", "source": "alt", "score": None}], dtype=frame.schema["captions"]))
    frame = frame.with_columns(captions=pl.when(pl.int_range(40) >= 10).then(three).otherwise(pl.col("captions").list.head(1)))
    spy = Spy()
    ours = loader(frame, reader, tokenizer=spy, wants=Wants(captions=2), batch_size=40, caption=caption)
    seconds = set()
    for step in range(4):
        spy.seen.clear()
        batch = ours.batch(step).tensors
        assert batch["text2_NL"].shape[0] == 40
        for row, *texts in zip(batch["row_N"].tolist(), *spy.seen, strict=True):
            own = [entry["text"] for entry in frame["captions"][row]]
            assert sorted(texts) == sorted(own if len(own) == 3 else own * 3)
            assert caption == "uniform" or texts[0] == own[0]
            seconds.add(own.index(texts[1]) if len(own) == 3 else -1)
    assert seconds == ({-1, 0, 1, 2} if caption == "uniform" else {-1, 1, 2})


def with_synthetic(frame: pl.DataFrame, rows: pl.Expr) -> pl.DataFrame:
    """Two synthetic captions of two methods, and a rewrite, for some rows."""
    dtype = frame.schema["captions"]
    more = [("made up by one", "synthetic:one"), ("made up by two", "synthetic:two"), ("said again", "rewrite:x")]
    lit = pl.lit([{"text": text, "source": source, "score": None} for text, source in more], dtype=dtype)
    return frame.with_columns(captions=pl.when(rows).then(pl.concat_list(lit, "captions")).otherwise(pl.col("captions")))


def test_captions_of_a_source_come_beside_the_pairs_own() -> None:
    frame, reader = drawings(40)
    spy, synthetic, own = Spy(), {"made up by one", "made up by two"}, set()
    ours = loader(with_synthetic(frame, pl.lit(True)), reader, tokenizer=spy, wants=Wants(sources=("synthetic",)), batch_size=40)
    kinds: list[tuple[str, ...]] = []
    for step in range(2):
        spy.seen.clear()
        batch = ours.batch(step).tensors
        assert batch["synthetic_NL"].shape[0] == 40
        texts, made_up = spy.seen
        assert set(made_up) == synthetic
        assert not set(texts) & synthetic
        own |= {text.split()[0] for text in texts}
        order = batch["row_N"].argsort().tolist()
        kinds.append(tuple(made_up[place] for place in order))
    assert own == {"a", "number", "said"}, "the others are drawn from as ever"
    assert kinds[0] != kinds[1], "drawn anew each visit"
    halves = [loader(with_synthetic(frame, pl.lit(True)), reader, rank=r, world=2, wants=Wants(sources=("synthetic",))) for r in (0, 1)]
    whole = loader(with_synthetic(frame, pl.lit(True)), reader, wants=Wants(sources=("synthetic",))).batch(1).tensors
    assert torch.equal(torch.cat([half.batch(1).tensors["synthetic_NL"] for half in halves]), whole["synthetic_NL"])
    first = loader(with_synthetic(frame, pl.lit(True)), reader, tokenizer=spy, wants=Wants(sources=("synthetic",)), caption="first")
    spy.seen.clear()
    first.batch(0)
    assert set(spy.seen[0]) == {"said again"}


def test_pairs_without_the_kind_of_caption_are_refused() -> None:
    frame, reader = drawings(16)
    with pytest.raises(DataError, match="pair-3 and 12 more"):
        loader(with_synthetic(frame, pl.int_range(16) < 3), reader, wants=Wants(sources=("synthetic",)))
    with pytest.raises(DataError, match="not of the source alt"):
        loader(frame, reader, wants=Wants(sources=("alt",)))


def test_what_is_not_there_cannot_be_wanted() -> None:
    frame, reader = drawings(16)
    for wants, message in (
        (Wants(columns=("class",)), "wants a column that is not there"),
        (Wants(columns=("key",)), "holds no numbers"),
        (Wants(views=("stron",)), "did you mean 'strong'"),
    ):
        with pytest.raises(ConfigError, match=message):
            loader(frame, reader, wants=wants)
    with pytest.raises(ConfigError, match="no labels to draw by"):
        loader(frame.drop("label"), reader, labelled=0.5)


def test_labelled_pairs_have_their_share_and_look_new_each_time() -> None:
    frame, reader = drawings(40)
    frame = frame.with_columns(label=pl.when(pl.int_range(40) < 4).then("label"))
    ours = loader(frame, reader, labelled=0.25, wants=Wants(columns=("label",)))
    assert ours.steps_per_epoch == 6
    looks = []
    for batch in ours.batches(0, 6):
        assert int((batch.tensors["label_N"] >= 0).sum()) == 2
        place = batch.tensors["row_N"].tolist()
        looks += [batch.tensors["image_NCHW"][place.index(0)]] if 0 in place else []
    assert len(looks) == 3
    assert all(not torch.equal(looks[0], other) for other in looks[1:])


def test_where_pictures_were_cut_out_is_told_if_it_is_wanted() -> None:
    frame, reader = drawings(16)
    wants = Wants(views=("weak", "around"), boxes=True)
    augment = {"flip": True, "crop_scale": [0.3, 0.6]}
    found = loader(frame, reader, wants=wants, augment=augment).batch(0).tensors
    whole_N5 = found["view1_box_N5"]
    for name in ("image", "view0"):
        box_N5 = found[f"{name}_box_N5"]
        assert box_N5.dtype == torch.int64
        assert (box_N5[:, :2] >= whole_N5[:, :2]).all()
        assert (box_N5[:, :2] + box_N5[:, 2:4] <= whole_N5[:, :2] + whole_N5[:, 2:4]).all()
    assert 0 < found["image_box_N5"][:, 4].float().mean() < 1
    assert not any(name.endswith("_box_N5") for name in loader(frame, reader, augment=augment).batch(0).tensors)
    with pytest.raises(ConfigError, match="rotate_deg"):
        loader(frame, reader, wants=wants, augment={"rotate_deg": 5.0})
