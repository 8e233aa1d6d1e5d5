"""The card of a small chain: digits, curated by concepts, then pruned of exact duplicates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from diptych.core import catalogue
from diptych.engine import passes
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import ingest_all
from diptych.workflow import chain, concept_chart, data_card, evidence

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def built(method: str, **values: object):
    return catalogue.config_class(catalogue.find(method)).parse({"method": method, **values})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[PairDataset]:
    folder = tmp_path_factory.mktemp("run")
    digits = built("digits", pool="zipf-junk", rows=600, size_px=8)
    datasets = [ingest_all(digits.build(), folder / "ingest", version="0", methods=(digits.plain(),))]
    for phase, config in (("curate", built("metaclip", threshold=60, metadata=WORDS)), ("prune", built("exact-duplicates"))):
        datasets.append(
            passes.run(
                datasets[-1], [config], phase, folder / phase, seed=0, session=Session(in_process=True), scratch=folder / ".scratch", code="c",
                version="0", progress=Progress(quiet=True), feature_specs={},
            )
        )  # fmt: skip
    return datasets


def test_the_chain_is_found_beside_the_dataset(run: list[PairDataset], tmp_path: Path) -> None:
    assert [step.digest for step in chain.of(run[-1])] == [step.digest for step in run]
    assert [step.digest for step in chain.of(run[0])] == [run[0].digest]


def test_a_phase_that_another_run_made_is_found_there(run: list[PairDataset], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name, steps in (("a", run[:2]), ("a+123456", run[2:])):
        for step in steps:
            shutil.copytree(step.root, runs / name / step.root.name)
    shutil.copytree(run[0].root / "shards", runs / "a+123456" / "ingest" / "shards")  # where the copied manifests look for them
    last = PairDataset.open(runs / "a+123456" / run[2].root.name)
    assert [step.digest for step in chain.of(last)] == [step.digest for step in run]
    assert list(data_card.measure(last, sample=5).sources) == ["digits"]
    shutil.rmtree(runs / "a")
    alone = data_card.measure(last, sample=5)
    assert list(alone.sources) == ["not known"]
    assert "the datasets before the first step are not beside this one" in alone.missing


def test_figures_are_those_of_the_tables(run: list[PairDataset]) -> None:
    card = data_card.measure(run[-1], sample=300)
    assert [(phase, came, kept) for phase, _, came, kept, _ in card.steps] == [
        ("ingest", 1197, 1197), ("curate", 1197, len(run[1])), ("prune", len(run[1]), len(run[2])),
    ]  # fmt: skip
    assert card.steps[1][4][0][0] == "metaclip"
    assert card.sources == {"digits": (len(run[2]), card.sources["digits"][1])}
    assert card.sources["digits"][1]["licence"] == "CC-BY-4.0"
    assert dict(card.splits)["test"] == 597
    assert sum(count for _, count in card.words) == len(run[2])
    assert dict(card.sides) == {"below 32": len(run[2])}
    assert card.pictures.pairs == 300
    assert card.pictures.broken == 0
    assert card.missing == [] or "py3langid" in card.missing[0]


def test_licences_of_pairs_stand_on_the_card(tmp_path: Path) -> None:
    names = ["CC0", "", None, "CC BY 4.0", "CC BY 4.0", *"abcdef"]
    lines = [json.dumps({"file": f"{row}.png", "caption": "t", "licence": name}) for row, name in enumerate(names)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for row in range(len(names)):
        Image.new("RGB", (8, 8), (row, 0, 0)).save(tmp_path / f"{row}.png")
    folder = built("folder", path=str(tmp_path), table="t.jsonl")
    dataset = ingest_all(folder.build(), tmp_path / "out", version="0", methods=(folder.plain(),))
    card = data_card.measure(dataset, sample=1)
    assert card.sources == {"folder": (11, {"licence": "CC BY 4.0 2, CC0 1, a 1, b 1, c 1, others 3, not said 2"})}
    assert "licence CC BY 4.0 2, CC0 1" in data_card.text(card)


def test_concepts_are_counted_before_and_after(run: list[PairDataset]) -> None:
    found = data_card.measure(run[-1], sample=10).concepts
    train = run[0].read().filter(pl.col("split") == "train")
    texts = train["captions"].list.first().struct.field("text")
    expected = [texts.str.contains(rf"\b{word}\b").sum() for word in WORDS]
    assert found.before_E.tolist() == expected
    assert (found.after_E <= found.before_E).all()
    assert found.after_E.max() < found.before_E.max()


def test_copies_in_the_sample_are_counted(run: list[PairDataset]) -> None:
    before, after = (data_card.measure(step, sample=5000).pictures for step in (run[0], run[2]))
    pictures = run[0].reader().read_column(run[0].read()["image"])
    assert before.exact == len(pictures) - len(set(pictures))
    assert after.exact == 0


def test_page_and_text(run: list[PairDataset], tmp_path: Path) -> None:
    card = data_card.measure(run[1], sample=50)
    page = data_card.write(card, tmp_path / "card.html").read_text()
    assert "balanced away" in page
    assert "<script" not in page
    assert "script-src 'none'" in page
    assert page.count("<polyline") == 2
    assert "CC-BY-4.0" in data_card.text(card)
    assert f"curate (metaclip): 1,197 in, {len(run[1]):,} kept" in data_card.text(card)


def test_a_dataset_without_its_parents_says_so(run: list[PairDataset], tmp_path: Path) -> None:
    shutil.copytree(run[1].root.parent / "ingest", tmp_path / "far" / "off" / "ingest")
    shutil.copytree(run[1].root, tmp_path / "lone" / "curate")
    (tmp_path / "lone" / "ingest").mkdir()
    shutil.copytree(run[0].root / "shards", tmp_path / "lone" / "ingest" / "shards")
    card = data_card.measure(PairDataset.open(tmp_path / "lone" / "curate"), sample=5)
    assert "not beside this one" in card.missing[0]
    assert len(card.steps) == 1


def test_evidence_names_concepts_with_counts(run: list[PairDataset]) -> None:
    found = evidence.of_phase(run[1])
    assert found is not None
    rows = run[1].read().filter(pl.col("split") == "train").head(20)
    for row, texts in zip(rows.iter_rows(named=True), found(rows).values(), strict=True):
        assert texts, row["captions"]
        assert row["label_name"] in {text.split(" ")[0] for text in texts}
    assert evidence.of_phase(run[2]) is None


def test_no_concept_reaches_from_one_caption_into_the_next() -> None:
    captions = pl.Series([[{"text": "hot", "source": "alt", "score": None}, {"text": "dog", "source": "alt", "score": None},
                           {"text": "a hot dog", "source": "rewrite:x", "score": None}], []])  # fmt: skip
    metadata = evidence.load({"metadata": ["hot dog", "dog"]})
    matches = metadata.matcher.match(evidence.joined(captions))
    assert [metadata.entries[entry] for entry in matches.ids] == ["dog"]


def test_binned() -> None:
    assert data_card._binned(pl.Series([1, 2, 2, 4, 200]), (1, 2, 3, 5)) == [("1", 1), ("2", 2), ("3 to 4", 1), ("5 or more", 1)]
    assert data_card._binned(pl.Series([], dtype=pl.Int64), (1, 2)) == []


def test_languages_that_are_not_sure_come_last() -> None:
    values = [("en", 9), ("de", 2), ("fr", 1), ("not sure", 30)]
    assert data_card._few(values, most=1) == [("en", 9), ("2 others", 3), ("not sure", 30)]


def test_a_chart_of_nothing_is_nothing() -> None:
    assert concept_chart.rank_frequency(np.zeros(3, np.int64), np.zeros(3, np.int64)) == ""
    assert concept_chart.rank_frequency(np.array([1]), np.array([0])).count("<polyline") == 2
