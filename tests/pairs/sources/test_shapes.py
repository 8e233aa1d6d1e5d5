"""The rendered world: what is dealt, what is hidden, and that a text says what the picture shows."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.core.errors import ConfigError
from diptych.core.points import RawPair
from diptych.evaluate.zero_shot import classes
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources import shapes
from diptych.pairs.sources.shapes import Config, Look, Seen, caption
from diptych.pairs.sources.shapes_draw import COLOURS, TEXTURES, render

FEW = {"train": 60, "pool": 0, "val": 0, "test": 30}


def read(**values: Any) -> list[RawPair]:
    source = Config.parse({**FEW, **values}).build()
    return [pair for part in source.parts() for pair in source.read(part)]


def of(pairs: list[RawPair], split: str) -> list[RawPair]:
    return [pair for pair in pairs if pair.split == split]


def pixels(pair: RawPair) -> np.ndarray:
    assert pair.image is not None
    return np.asarray(Image.open(io.BytesIO(pair.image)))


def seen(pair: RawPair) -> Seen:
    return Seen(*(pair.extra[f"meta.{word}"] for word in Seen._fields))


def column(pairs: list[RawPair], name: str) -> list[Any]:
    return [pair.extra[name] for pair in pairs]


def test_texts_and_columns_say_what_the_picture_shows() -> None:
    still = {"noise": 0.0, "jitter": 0.0}
    pairs = read(looks={"train": still, "test": still})
    assert caption(Seen("circle", "red", "black", "small")) == "a small red circle on a black background"
    for pair in pairs:
        shape, colour, background, size = seen(pair)
        assert pair.captions == [(caption(seen(pair)), "alt")]
        assert pair.extra["label_name"] == f"{colour} {shape}"
        assert np.array_equal(pixels(pair), render(shape, colour, background, size))


def test_the_seed_and_the_key_decide() -> None:
    config = Config.parse({**FEW, "train": 4100})
    parts = list(config.build().parts())
    assert parts == ["test-00000", "train-00000", "train-00001", "train-00002"]
    source = pickle.loads(pickle.dumps(config.build()))
    last = list(source.read(parts[-1]))
    assert last == list(config.build().read(parts[-1])), "a part needs no other part"
    assert [len(list(source.read(part))) for part in (parts[0], parts[-1])] == [30, 100]
    first = read()
    assert [pair.image for pair in first] != [pair.image for pair in read(seed=1)]
    assert len({pair.image for pair in first}) == len({pair.key for pair in first}) == 90
    assert of(read(test=10), "train") == of(first, "train"), "a split does not depend on the others"
    quiet, loud = read(looks={"train": {"noise": 0.0}}), read(looks={"train": {"noise": 0.2}})
    off = np.stack([pixels(b).astype(float) - pixels(a) for a, b in zip(of(quiet, "train"), of(loud, "train"), strict=True)]) / 255
    inner = off[(np.stack([pixels(pair) for pair in of(quiet, "train")]) == 128).nonzero()]
    assert inner.std() == pytest.approx(0.2, rel=0.05), "noise changes nothing but pixels"


@pytest.mark.parametrize(
    ("kind", "number"), [("shape", 6), ("colour", 5), ("colour-shape", 30), ("size-colour-shape", 60), ("look-alike", 36)]
)
def test_classes_are_dealt_evenly_and_show_all_their_looks(kind: str, number: int) -> None:
    config = Config.parse({"classes": kind, **FEW, "train": 500})
    train = of(read(classes=kind, train=500), "train")
    counts = Counter(column(train, "label"))
    assert sorted(counts) == list(range(number))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(config.build().labels) == number
    names = dict(zip(column(train, "label"), column(train, "label_name"), strict=True))
    assert len(set(names.values())) == number
    for label in range(3):
        looks = Counter(seen(pair) for pair in train if pair.extra["label"] == label)
        assert max(looks.values()) - min(looks.values()) <= 1 or len(looks) == counts[label]
        assert len({look.background for look in looks}) > 1


def test_a_target_has_its_own_look_and_labels_keep_their_meaning() -> None:
    looks = {"test": {"backgrounds": ["gray", "brown"], "sizes": ["small"]}, "near": {"shapes": ["ring", "circle"], "colours": ["red"]}}
    pairs = read(looks=looks, more={"near": 10})
    assert {(look.background, look.size) for look in map(seen, of(pairs, "test"))} == {("gray", "small"), ("brown", "small")}
    known = {pair.extra["label_name"]: pair.extra["label"] for pair in of(pairs, "train")}
    assert sorted(known.values()) == list(range(30))
    assert all(known[pair.extra["label_name"]] == pair.extra["label"] for pair in of(pairs, "test"))
    near = {pair.extra["label_name"]: pair.extra["label"] for pair in of(pairs, "near")}
    assert near == {"red circle": known["red circle"], "red ring": 30}
    shuffled = {**looks, "train": {"shapes": ["star", "cross", "diamond", "triangle", "square", "circle"]}}
    assert Config.parse({**FEW, "looks": shuffled, "more": {"near": 10}}).build().labels == {**known, "red ring": 30}


def test_foils_replace_one_word_by_one_of_the_training_texts() -> None:
    looks = {
        "train": {"backgrounds": ["black", "white"], "colours": ["red", "green"]},
        "test": {"backgrounds": ["gray"], "shapes": ["ring"]},
    }
    pairs = read(foils=True, looks=looks, train=200, test=200)
    vocabulary = {word for pair in of(pairs, "train") for word in str(pair.captions[0][0]).split()}
    places = Counter()
    for pair in pairs:
        true, foil = str(pair.captions[0][0]).split(), pair.extra["meta.foil"].split()
        changed = [place for place, (one, other) in enumerate(zip(true, foil, strict=True)) if one != other]
        assert len(changed) == 1
        assert foil[changed[0]] == pair.extra["meta.foil_word"]
        assert pair.extra["meta.foil_word"] in vocabulary
        places[changed[0]] += 1
    assert set(places) == {1, 2, 3, 6}, "size, colour, shape, background"
    assert min(places.values()) > 60


def test_look_alikes_are_groups_of_one_shape_with_neighbouring_hues_and_sizes() -> None:
    groups = ["circle", "square", "triangle", "diamond", "cross"]
    look = {"shapes": groups, "noise": 0.0, "backgrounds": ["black"]}
    pairs = of(read(classes="look-alike", train=600, looks={"train": look}), "train")
    assert {
        label: len({name.split()[1] for name in [pair.extra["label_name"]]}) for pair in pairs for label in [pair.extra["label"]]
    } == dict.fromkeys(range(30), 1)
    assert Counter(column(pairs, "meta.shape")) == dict.fromkeys(groups, 120)
    colour: dict[int, list[np.ndarray]] = {}
    for pair in pairs:
        if pair.extra["meta.shape"] == "square":
            colour.setdefault(pair.extra["label"], []).append(pixels(pair)[7:9, 7:9].mean(axis=(0, 1)))
    assert len(colour) == 6
    middles = np.stack([np.mean(values, axis=0) for values in colour.values()])
    spread = np.mean([np.std(values, axis=0).max() for values in colour.values()])
    distances = np.linalg.norm(middles[:, None] - middles[None], axis=2)
    assert distances.max() < 120, "of one group, in grey levels of 255"
    assert sorted(distances[0])[2] > spread > 1, "hues differ by more than they vary within a class"
    assert len(Config.parse({**FEW, "classes": "look-alike", "hues": 2, "looks": {"train": look}}).build().labels) > 20


def test_few_labels_hide_the_others_and_their_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "PART_ROWS", 100)  # the second part then has no label at all
    config = Config.parse({**FEW, "classes": "look-alike", "train": 200, "test": 72, "labels_per_class": 2})
    frame = ingest_all(config.build(), tmp_path / "out").read()
    train, test = frame.filter(split="train"), frame.filter(split="test")
    labelled = train.filter(train["label"].is_not_null())
    assert labelled["label"].value_counts().sort("label").rows() == [(label, 2) for label in range(36)]
    hidden = train.filter(train["label"].is_null())
    assert hidden["label_name"].null_count() == hidden.height == 128
    assert {row[0]["text"] for row in hidden["captions"].to_list()} == {"a picture"}
    assert labelled["label"].equals(labelled["meta.class"])
    assert hidden["meta.class"].n_unique() == 36
    assert test["label"].null_count() == 0
    found, rows = classes(frame, "test")
    assert len(found.names) == 36
    assert rows["label"].to_list() == found.label_N.tolist()


def test_a_cue_conflict_has_the_silhouette_of_one_class_and_the_texture_of_another() -> None:
    still = {"noise": 0.0, "jitter": 0.0, "turn_deg": 30.0}
    looks = {"train": {"paint": "own", **still}, "conflict": {"paint": "foreign", **still}, "test": {"paint": "own"}}
    pairs = read(classes="shape", looks=looks, more={"conflict": 300})
    assert all(pair.extra["meta.texture"] == pair.extra["meta.shape"] == pair.extra["label_name"] for pair in of(pairs, "train"))
    conflict = of(pairs, "conflict")
    cues = Counter((pair.extra["meta.shape"], pair.extra["meta.texture"]) for pair in conflict)
    assert len(cues) == 30, "every pair of different classes"
    for pair in conflict[:20]:
        shape, colour, background, size = seen(pair)
        assert colour == "patterned"
        assert pair.captions[0][0] == f"a {size} {shape} on a {background} background"
        drawn = render(shape, TEXTURES[pair.extra["meta.texture"]], background, size, turn_deg=pair.extra["meta.turn_deg"])
        assert np.array_equal(pixels(pair), drawn)
    turns = np.asarray(column(conflict, "meta.turn_deg"))
    assert -30 <= turns.min() < -20
    assert 20 < turns.max() <= 30


def test_a_nearest_mean_tells_colours_but_not_look_alikes() -> None:
    def accuracy(**values: Any) -> float:
        pairs = read(train=360, test=180, **values)
        train, test = of(pairs, "train"), of(pairs, "test")
        mean = {
            label: np.mean([pixels(pair) for pair in train if pair.extra["label"] == label], axis=0)
            for label in set(column(train, "label"))
        }
        right = [min(mean, key=lambda label: np.square(mean[label] - pixels(pair)).sum()) == pair.extra["label"] for pair in test]
        return float(np.mean(right))

    plain = {"backgrounds": ["black"]}
    looks = {"train": plain, "test": plain}
    assert accuracy(classes="colour", looks=looks) > 0.9
    assert accuracy(classes="look-alike", looks=looks) < 0.75


def test_configurations_survive_writing() -> None:
    config = Config.parse({**FEW, "more": {"near": 5}, "looks": {"near": {"shapes": ["ring"], "noise": 10.0}}})
    assert Config.parse(config.plain()) == config
    assert config.look("train") == Look()
    assert set(Look().colours) < set(COLOURS)


def test_wrong_configurations_are_refused() -> None:
    for wrong in (
        {"size_px": 4},
        {"classes": "texture"},
        {"more": {"test": 5}},
        {"more": {"Near-by": 5}},
        {"more": {"near": 0}},
        {"looks": {"near": {}}},
        {"looks": {"test": {"shapes": ["cube"]}}},
        {"looks": {"test": {"shapes": []}}},
        {"looks": {"test": {"sizes": ["small", "small"]}}},
        {"train": 0, "test": 0},
        {"looks": {"test": {"paint": "own"}}},
        {"classes": "shape", "looks": {"test": {"paint": "foreign", "shapes": ["ring"]}}},
        {"classes": "look-alike", "looks": {"test": {"colours": ["red"]}}},
        {"classes": "look-alike", "foils": True},
        {"foils": True, "looks": {"train": {"shapes": ["ring"], "colours": ["red"], "sizes": ["small"], "backgrounds": ["black"]}}},
        {"labels_per_class": 3},
    ):
        with pytest.raises(ConfigError):
            Config.parse({**FEW, **wrong})


def test_a_share_of_texts_is_another_pictures() -> None:
    pairs = read(train=400, mismatched=0.5, synthetic=0.25)
    train, test = of(pairs, "train"), of(pairs, "test")
    said = [pair.captions[0] == (caption(seen(pair)), "alt") for pair in train]
    assert said == [pair.extra["meta.intact"] == 1 for pair in train]
    assert 0.4 < sum(said) / 400 < 0.6
    whole = [pair.captions[0] for pair in of(read(train=400), "train")]
    assert [pair.captions[0] for pair in train] != whole
    assert [pixels(pair).tolist() for pair in train[:5]] == [pixels(pair).tolist() for pair in of(read(train=400), "train")[:5]]
    assert all(pair.captions == [(caption(seen(pair)), "alt")] and "meta.intact" not in pair.extra for pair in test)


def test_a_captioner_says_little_and_errs_at_times() -> None:
    right = 0
    for pair in of(read(train=400, synthetic=0.25), "train"):
        (text, source), words = pair.captions[1], seen(pair)
        assert source == "synthetic:shapes"
        assert text.split()[-1] in {"circle", "square", "triangle", "diamond", "cross", "star"}
        right += text in (f"a {words.colour} {words.shape}", f"a photo of the {words.shape}")
    assert 0.68 < right / 400 < 0.82
    exact = of(read(synthetic=0.0), "train")
    assert all(seen(pair).shape in pair.captions[1][0] for pair in exact)
    with pytest.raises(ConfigError, match="no captioner"):
        read(classes="look-alike", synthetic=0.1)


def test_cells_are_labelled_where_the_shape_is() -> None:
    looks = {split: {"noise": 0.0, "turn_deg": 40.0} for split in ("train", "test")}
    plain, pairs = read(looks=looks), read(looks=looks, cells=16)
    assert [pair.image for pair in plain] == [pair.image for pair in pairs]
    for pair in pairs:
        shape, colour, background, _ = seen(pair)
        inked = np.abs(pixels(pair).astype(float) - render(shape, colour, background, 0.01)[0, 0]).max(axis=2)
        cells = np.asarray(pair.extra["meta.cells"]).reshape(16, 16)
        assert set(np.unique(cells)) == {0, pair.extra["label"] + 1}
        assert (inked[cells > 0] > 30).all(), "a cell of the shape has its colour"
        assert (inked[cells == 0] == 0).mean() > 0.8, "most others have the background's"
    coarse = read(looks=looks, cells=4)[0].extra["meta.cells"]
    assert len(coarse) == 16
    with pytest.raises(ConfigError, match="do not divide"):
        Config.parse({"cells": 5})
