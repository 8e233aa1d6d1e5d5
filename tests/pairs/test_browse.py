"""Pages show what they should, and nothing in the data becomes markup."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diptych.pairs.algebra import subtract
from diptych.pairs.browse import contact_sheet, difference_page, sample
from diptych.pairs.dataset import PairDataset

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
    assert "script" not in page.tags
    assert f"a picture of {EVIL}" in page.text
    assert "Left: in the other (subtract, 2)" in page.text
    assert "Kept (2 shown)" in page.text


def test_nothing_is_fetched(make: Make, tmp_path: Path) -> None:
    page = contact_sheet(make("a", ["x"]), tmp_path / "sheet.html").read_text()
    assert "default-src 'none'" in page
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
