"""Pages show what they should, and nothing in the data becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from diptych.pairs.algebra import subtract
from diptych.pairs.browse import contact_sheet, difference_page, sample
from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import PhaseRecord
from diptych.pairs.schema import CAPTIONS
from diptych.pairs.write import DatasetWriter

Make = Callable[..., PairDataset]
EVIL = "<script>alert('x')</script>"


class Tags(HTMLParser):
    """Counts the elements of a page and collects its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_contact_sheet(make: Make, tmp_path: Path) -> None:
    a, b = make("a", ["x", "y", EVIL, "w"], seed=1), make("b", ["x", "y"], seed=2)
    rest = subtract(a, b, tmp_path / "rest")
    page = Tags(contact_sheet(rest, tmp_path / "pages" / "sheet.html").read_text())
    assert page.tags.count("img") == 4
    assert page.tags.count("script") == 1, "our own, which alone the page's policy lets run"
    assert f"a picture of {EVIL}" in page.text
    assert "Left: in the other (subtract, 2)" in page.text
    assert "Kept (2 of 2 shown)" in page.text


def test_nothing_is_fetched(make: Make, tmp_path: Path) -> None:
    page = contact_sheet(make("a", ["x"]), tmp_path / "sheet.html").read_text()
    assert "default-src 'none'" in page
    code = page.split("<script>")[1].split("</script>")[0]
    assert base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() in page.split("Content-Security-Policy")[1][:300]
    assert set(re.findall(r"src='([a-z]+:)", page)) == {"data:"}


def test_limit_and_sample(make: Make, tmp_path: Path) -> None:
    keys = [f"k{index}" for index in range(40)]
    dataset = make("a", keys)
    assert Tags(contact_sheet(dataset, tmp_path / "sheet.html", limit=7).read_text()).tags.count("img") == 7
    chosen = sample(dataset.scan(), 7, seed=0)["key"].to_list()
    turned = sample(dataset.read().reverse().lazy(), 7, seed=0)["key"].to_list()
    assert turned == chosen[::-1]
    assert sample(dataset.scan(), 7, seed=1)["key"].to_list() != chosen


def test_broken_picture_is_shown_as_broken(make: Make, tmp_path: Path) -> None:
    dataset = make("a", ["x"])
    shard = next((dataset.root / "shards").iterdir())
    shard.write_bytes(bytes(shard.stat().st_size))
    page = Tags(contact_sheet(dataset, tmp_path / "sheet.html").read_text())
    assert "cannot be shown" in page.text
    assert "img" not in page.tags


def test_long_caption_is_cut(make: Make, tmp_path: Path) -> None:
    page = contact_sheet(make("a", ["x" * 500]), tmp_path / "sheet.html").read_text()
    assert "… (513 characters)" in page


def test_difference_page(make: Make, tmp_path: Path) -> None:
    a, b = make("a", ["x", "y"], seed=1), make("b", ["y", "z"], seed=1)
    page = Tags(difference_page(a, b, tmp_path / "diff.html").read_text())
    assert "Left: 1" in page.text
    assert "Arrived: 1" in page.text
    assert "Changed: 1" in page.text
    assert page.tags.count("img") == 3


def test_page_appears_whole(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make("a", ["x"])

    def failing(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="gone"):
        contact_sheet(dataset, tmp_path / "sheet.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def rejected(make: Make, tmp_path: Path) -> PairDataset:
    """Two pairs that stay, one that left as a copy of `a`, one that left as a copy of a pair that is nowhere."""
    source = make(
        "source", ["a", "b", "c", "d"], seed=1, **{"meta.source": ["web", "web", "album", "album"], "meta.guidance": [1.5, 2.0, 3.0, 4.0]}
    )
    record = PhaseRecord(phase="prune", methods=({"method": "twins"},))
    with DatasetWriter(tmp_path / "out", record, [source.digest], source.manifest.shards, pairs_in=4, shards_root=source.root) as writer:
        table = source.table(0)
        left = table.filter(pl.col("key").is_in(["c", "d"])).select(
            "key", "image", "captions", phase=pl.lit("prune"), method=pl.lit("twins"), reason=pl.lit("copy"), score=pl.Series([0.5, 0.9], dtype=pl.Float32),
            twin=pl.Series(["a", "gone"]),
        )  # fmt: skip
        writer.add(table.filter(pl.col("key").is_in(["a", "b"])), left)
        return writer.finish()


def test_a_copy_stands_beside_its_twin(make: Make, tmp_path: Path) -> None:
    text = contact_sheet(rejected(make, tmp_path), tmp_path / "sheet.html").read_text()
    page = Tags(text)
    assert page.tags.count("img") == 5, "two that stay, two that left, one twin"
    assert "like a" in page.text
    assert "it left earlier" in page.text
    assert "data-score='0.5'" in text
    assert "data-source='web'" in text
    assert "guidance 1.5" in page.text
    assert "score 0.900" in page.text


def test_what_the_columns_said_of_a_pair_that_left_is_shown(make: Make, tmp_path: Path) -> None:
    dataset = rejected(make, tmp_path)
    source = PairDataset.open(tmp_path / "source")
    text = contact_sheet(dataset, tmp_path / "sheet.html", before=source).read_text()
    page = Tags(text)
    assert "Left (2 of 2 shown)" in page.text
    assert "guidance 3" in page.text
    assert "guidance 4" in page.text
    assert "data-source='album'" in text
    assert "guidance 3" not in Tags(contact_sheet(dataset, tmp_path / "alone.html").read_text()).text
    assert "guidance 3" in Tags(difference_page(source, dataset, tmp_path / "diff.html").read_text()).text


def test_settings_and_figures_of_the_methods_are_told(make: Make, tmp_path: Path) -> None:
    a = make("a", ["x"])
    method = {"method": "captioner", "guidance": 1.23456, "place": "append", "model": None, "nested": {"b": 1}, "names": ["p", "q"]}
    record = PhaseRecord(phase="caption", methods=(method,), report={"0-captioner": {"captioned": 1, "labels": {"x": 2}}})
    with DatasetWriter(tmp_path / "b", record, [a.digest], a.manifest.shards, pairs_in=1, shards_root=a.root) as writer:
        writer.add(a.table(0), None)
        dataset = writer.finish()
    page = Tags(contact_sheet(dataset, tmp_path / "sheet.html").read_text())
    assert "captioner guidance 1.235, place append, names ['p', 'q']reported: captioned 1" in page.text
    assert "details" not in Tags(contact_sheet(a, tmp_path / "plain.html").read_text()).tags


def test_lists_and_measured_columns_are_shown(make: Make, tmp_path: Path) -> None:
    dataset = make("a", ["x", "y"], **{"meta.concepts": [["plot", "gel"], []], "meta.cluster": [7, 8], "meta.year": [1999, 2000]})
    text = contact_sheet(dataset, tmp_path / "sheet.html").read_text()
    assert "<div class='chips'><span>cluster 7</span><span>concepts plot, gel</span></div><details>" in text
    assert text.count("<summary>1 more columns</summary>") == 2


def test_a_changed_column_is_shown_with_its_value(make: Make, tmp_path: Path) -> None:
    a = make("a", ["x", "y"], **{"meta.cluster": [1, 1]})
    b = make("b", ["x", "y"], **{"meta.cluster": [1, 1], "meta.kind": ["cat", "dog"], "meta.gone": [["a rewrite"], []]})
    page = Tags(difference_page(a, b, tmp_path / "diff.html").read_text())
    assert "kind cat" in page.text
    assert "gone a rewrite" in page.text
    assert "changed: meta" not in page.text
    assert "captions_before" not in page.text


def test_evidence_is_shown_as_text(make: Make, tmp_path: Path) -> None:
    def evidence(rows: pl.DataFrame) -> dict[str, list[str]]:
        return {key: [f"{EVIL} 7 → 3"] for key in rows["key"] if key == "b"}

    page = Tags(contact_sheet(rejected(make, tmp_path), tmp_path / "sheet.html", evidence=evidence).read_text())
    assert page.text.count(f"{EVIL} 7 → 3") == 1
    assert page.tags.count("script") == 1


def test_captions_before_and_after(make: Make, tmp_path: Path) -> None:
    a = make("a", ["x", "y"], seed=1)
    record = PhaseRecord(phase="caption", methods=({"method": "rewriter"},))
    captions = [
        [{"text": "a picture of x", "source": "alt", "score": None}, {"text": "x as rewritten", "source": "rewrite:me", "score": None}],
        [{"text": "another text", "source": "alt", "score": 0.25}],
    ]
    with DatasetWriter(tmp_path / "b", record, [a.digest], a.manifest.shards, pairs_in=2, shards_root=a.root) as writer:
        writer.add(a.table(0).with_columns(captions=pl.Series(captions, dtype=CAPTIONS)), None)
        b = writer.finish()
    text = difference_page(a, b, tmp_path / "diff.html").read_text()
    assert (
        "<p class=''><span class='source'>alt</span> a picture of x</p><p class='after'><span class='source'>rewrite:me</span> x as rewritten</p>"
        in text
    )
    assert (
        "<p class='gone'><span class='source'>alt</span> a picture of y</p><p class='after'><span class='source'>alt</span> another text <small>0.25</small></p>"
        in text
    )
    assert "Arrived" not in text, "an empty side takes no room"


def test_why_a_pair_left_between(make: Make, tmp_path: Path) -> None:
    middle = rejected(make, tmp_path)
    source, later = PairDataset.open(tmp_path / "source"), subtract(middle, make("other", ["b"], seed=3), tmp_path / "later")
    page = Tags(difference_page(source, later, tmp_path / "diff.html", between=[middle]).read_text())
    assert "left: copy" in page.text
    assert "left: in the other" in page.text
    assert "left: copy" not in Tags(difference_page(source, later, tmp_path / "diff.html").read_text()).text


def test_equal_datasets_have_an_empty_page(make: Make, tmp_path: Path) -> None:
    a = make("a", ["x"])
    assert "Nothing differs." in difference_page(a, a, tmp_path / "diff.html").read_text()
