"""Evaluation sets of CLIP_benchmark: read where they lie, with names and templates; what contradicts itself is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.evaluation_sets import write_set

from diptych.core.errors import DataError
from diptych.pairs.card import Card
from diptych.pairs.ingest import IngestConfig, ingest_all
from diptych.pairs.sources.clip_benchmark import Config, template

LENIENT = IngestConfig(max_bad_share=1.0)


def test_a_set_is_read_in_place_with_names_and_templates(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets", labels=[0, 2, 1, 2, 0], names=["cat", "dog", "owl"], shards=2)
    dataset = ingest_all(Config(path=str(folder)).build(), tmp_path / "pairs")
    frame = dataset.read()
    assert frame["key"].to_list() == ["test/0/s0000000", "test/0/s0000001", "test/0/s0000002", "test/1/s0000003", "test/1/s0000004"]
    assert frame["label"].to_list() == [0, 2, 1, 2, 0]
    assert frame["label_name"].to_list() == ["cat", "owl", "dog", "owl", "cat"]
    assert [caption["text"] for captions in frame["captions"] for caption in captions] == frame["label_name"].to_list()
    assert set(frame["split"]) == {"test"}
    assert not list((dataset.root / "shards").iterdir()), "no picture was copied"
    assert all(entry.sha256 for entry in dataset.shards.values())
    assert Card.of(dataset) == Card(classes=("cat", "dog", "owl"), templates=("a photo of a {}.", "{}, a pet"))


def test_several_splits_and_shards_that_count_from_zero_keep_their_keys_apart(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets", labels=[0, 1, 0, 1], names=["cat", "dog"], shards=2, count_on=False)
    write_set(folder, split="train", labels=[1, 0], names=["cat", "dog"])
    dataset = ingest_all(Config(path=str(folder), splits=("train", "test")).build(), tmp_path / "pairs")
    assert dataset.read()["key"].n_unique() == 6
    assert dataset.manifest.ledger.left == ()
    assert sorted(dataset.shards) == ["test/0", "test/1", "train/0"]
    pictures = dataset.reader().read_column(dataset.read()["image"])
    assert len(set(pictures)) == 6


def test_a_retrieval_set_has_a_caption_a_line(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "flickr", captions=["a dog runs\na dog on grass\n", "two cats\n\nfour eyes"])
    dataset = ingest_all(Config(path=str(folder)).build(), tmp_path / "pairs")
    texts = [[caption["text"] for caption in captions] for captions in dataset.read()["captions"]]
    assert texts == [["a dog runs", "a dog on grass"], ["two cats", "four eyes"]]
    assert {caption["source"] for captions in dataset.read()["captions"] for caption in captions} == {"human"}
    assert "label" not in dataset.read().columns
    assert Card.of(dataset) == Card()
    assert dataset.manifest.phase.report["captions_removed"] == {"empty caption": 1}


def test_examples_without_a_usable_class_leave_with_the_reason(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets", labels=[0, 7, "cat", None, 1, -1], names=["cat", "dog"])
    dataset = ingest_all(Config(path=str(folder)).build(), tmp_path / "pairs", config=LENIENT)
    left = {(entry.reason, entry.count) for entry in dataset.manifest.ledger.left}
    assert left == {("label out of range", 2), ("class is not a number", 1), ("no class", 1)}


@pytest.mark.parametrize(
    ("line", "ours"),
    [("a photo of a {c}.", "a photo of a {}."), ("{c}", "{}"), ("{c} and {c}", "{} and {}"), ("{{x}} {c}", "{x} {}")],
)
def test_templates_of_theirs_become_ours(line: str, ours: str) -> None:
    assert template(line, "t") == ours
    assert ours.replace("{}", "cat") == line.format(c="cat")


@pytest.mark.parametrize("line", ["", "a photo", "a {}", "a {d}", "a {c!r}", "a {c:>9}", "a {c", "{{}} of {c}", "a {c} by {who}"])
def test_a_template_that_does_not_render_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    folder = write_set(tmp_path / "pets", labels=[0, 1], names=["cat", "dog"], templates=["a {c}", line, "{c}"])
    with pytest.raises(DataError, match=r"templates\.txt:2") as caught:
        ingest_all(Config(path=str(folder)).build(), tmp_path / "pairs")
    assert "{c}" in caught.value.problems[0].fix


def test_what_is_missing_or_contradicts_itself_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets", labels=[0, 1], names=["cat", "dog"], shards=2)

    def refused(words: str, config: Config | None = None) -> None:
        with pytest.raises(DataError, match=words):
            ingest_all((config or Config(path=str(folder))).build(), tmp_path / "pairs")

    refused("splits of this set: test", Config(path=str(folder), splits=("val",)))
    refused("nothing", Config(path=str(tmp_path / "nowhere")))
    (folder / "test" / "1.tar").rename(folder / "test" / "gone")
    refused("another number of tars")
    (folder / "test" / "gone").rename(folder / "test" / "1.tar")
    (folder / "test" / "nshards.txt").write_text("two\n")
    refused("does not say how many tars")
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").unlink()
    refused("has no class names")
    (folder / "classnames.txt").write_bytes(b"\xff\n")
    refused("UTF-8")
    (folder / "dataset_type.txt").write_text("multilabel\n")
    refused("multilabel")
    shutil.rmtree(folder)
    refused("nothing")
