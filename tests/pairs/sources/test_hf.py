"""Data sets that 🤗 Datasets saved to disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from diptych.core.errors import DataError
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources.hf import Config

from ..conftest import picture


def test_splits_labels_and_lists(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": [datasets.Value("string")],
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "year": datasets.Value("int32"),
        }
    )
    splits = {
        name: datasets.Dataset.from_dict(
            {"image": [{"bytes": picture((index, 0, 0)), "path": None}], "caption": [["one", "two"]], "label": [index], "year": [2000]},
            features=features,
        )
        for index, name in enumerate(("train", "validation"))
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    source = pickle.loads(pickle.dumps(Config(path=str(tmp_path / "saved")).build()))
    assert list(source.parts()) == ["train/00000", "validation/00000"]
    dataset = ingest_all(source, tmp_path / "out")
    assert dataset.read(["key", "split", "label", "label_name", "meta.year"]).rows() == [
        ("train-00000000", "train", 0, "cat", 2000),
        ("validation-00000000", "validation", 1, "dog", 2000),
    ]
    assert [caption["text"] for caption in dataset.read()["captions"][0]] == ["one", "two"]
    assert dataset.reader().read_column(dataset.read()["image"]) == [picture((0, 0, 0)), picture((1, 0, 0))]


def test_one_split(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"image": [picture()], "text": ["one"], "key": ["k"]}).save_to_disk(str(tmp_path / "saved"))
    assert ingest_all(Config(path=str(tmp_path / "saved"), split="test").build(), tmp_path / "out").read(["key", "split"]).rows() == [
        ("k", "test")
    ]
    with pytest.raises(DataError, match="lacks columns"):
        Config(path=str(tmp_path / "saved"), image="picture").build().parts()


def test_not_a_saved_data_set(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no data set that"):
            Config(path=str(place)).build().parts()
