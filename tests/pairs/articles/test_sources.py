"""From packages to pairs: nothing is mixed up, nothing is lost without a reason, nothing is read that is not the package's."""

from __future__ import annotations

import gzip
import os
import pickle
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.pairs.articles.package import PackageLimits
from diptych.pairs.dataset import PairDataset
from diptych.pairs.export import export
from diptych.pairs.ingest import IngestConfig, ingest_all
from diptych.pairs.sources import biomedclip, webdataset
from diptych.pairs.sources.biomedclip import Config as Pmc
from diptych.pairs.sources.biomedica import Config as Archive

from .packages import article, corpus, figure, packed, photo

LENIENT = IngestConfig(max_bad_share=1.0)
BESIDE = (parent / "shared" / "data" / "pmc" for parent in Path(__file__).parents[3:])
REAL = Path(os.environ.get("DIPTYCH_PMC") or next((folder for folder in BESIDE if folder.is_dir()), "none"))


def reasons(dataset: PairDataset) -> dict[str, int]:
    return {entry.reason: entry.count for entry in dataset.manifest.ledger.left}


def texts(dataset: PairDataset) -> dict[str, str]:
    frame = dataset.read()
    return dict(zip(frame["key"], frame["captions"].list.first().struct.field("text"), strict=True))


def test_every_pair_of_a_corpus_and_no_other(tmp_path: Path) -> None:
    known = corpus(tmp_path / "in", 220)
    dataset = ingest_all(Pmc(path=str(tmp_path / "in")).build(), tmp_path / "out", config=LENIENT)
    frame = dataset.read()
    pictures = dataset.reader().read_column(frame["image"])
    found = {key: (text, picture) for (key, text), picture in zip(texts(dataset).items(), pictures, strict=True)}
    assert len(known) > 200
    assert found == known  # precision and recall of (picture, caption) are 1
    assert set(reasons(dataset)) == {"figure without caption", "figure without graphic", "missing image file", "malformed XML"}
    assert dataset.manifest.phase.report["parts"] == 220


def test_workers_do_not_matter(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 12)
    source = Archive(path=str(tmp_path / "in")).build()
    with ThreadPool(2) as pool:
        two = ingest_all(
            source, tmp_path / "two", config=LENIENT, map=lambda task, parts: pool.imap(pickle.loads(pickle.dumps(task)), parts)
        )
    assert two.digest == ingest_all(source, tmp_path / "one", config=LENIENT).digest


def test_the_same_records_come_back_from_shards(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 12)
    dataset = ingest_all(Archive(path=str(tmp_path / "in")).build(), tmp_path / "one", config=LENIENT)
    export(dataset, tmp_path / "tars", "webdataset")
    again = webdataset.Config(path=str(tmp_path / "tars" / "*.tar"), json_columns=("meta.licence", "meta.figure", "language"))
    back = ingest_all(again.build(), tmp_path / "two")
    assert sorted(texts(back).values()) == sorted(texts(dataset).values())
    columns = ["meta.licence", "meta.figure", "language"]
    assert back.read(columns).sort(columns).equals(dataset.read(columns).sort(columns))


def test_columns(tmp_path: Path) -> None:
    body = figure("F1", "Cells. (A) Red. (B) Green.", "a", "b") + '<p>See <xref ref-type="fig" rid="F1">1</xref>.</p>'
    files = {"P/a.nxml": article(body), "P/a.jpg": photo(1), "P/b.jpg": photo(1, "PNG")}
    packed(tmp_path / "in" / "P.tar.gz", files)
    whole, split = (
        ingest_all(Archive(path=str(tmp_path / "in"), compound=compound).build(), tmp_path / compound)  # type: ignore[arg-type]
        for compound in ("whole", "panels")
    )
    rows = whole.read().sort("key").to_dicts()
    assert [row["key"] for row in rows] == ["PMC1001/a", "PMC1001/b"]
    first = {name.removeprefix("meta."): value for name, value in rows[0].items() if name.startswith("meta.")}
    assert {key: first[key] for key in ("article", "pmid", "journal", "title", "date", "year", "licence", "licence_class")} == {
        "article": "PMC1001", "pmid": "111", "journal": "J Test", "title": "On cells", "date": "2019-03-07", "year": 2019,
        "licence": "CC BY 4.0", "licence_class": "commercial",
    }  # fmt: skip
    assert (first["figure"], first["label"], first["panels"], first["picture"], first["pictures"]) == ("F1", "Figure", 2, 1, 2)
    assert (first["mentions"], first["subjects"], first["keywords"]) == (["See 1."], ["Cell Biology"], ["microscopy"])
    assert rows[0]["language"] == "en"
    assert set(texts(whole).values()) == {"Cells. (A) Red. (B) Green."}
    assert texts(split) == {"PMC1001/a": "Cells. (A) Red.", "PMC1001/b": "Cells. (B) Green."}


def test_equal_pixels_have_equal_hashes(tmp_path: Path) -> None:
    body = "".join(figure(f"F{index}", "C", name) for index, name in enumerate(("a.png", "b.tif", "c.png")))
    files = {"a.nxml": article(body), "a.png": photo(1, "PNG"), "b.tif": photo(1, "TIFF"), "c.png": photo(2, "PNG")}
    packed(tmp_path / "P.tar", files)
    hashes = ingest_all(Archive(path=str(tmp_path)).build(), tmp_path / "out").read().sort("key")["meta.image_hash"].to_list()
    assert hashes[0] == hashes[1] != hashes[2]


def test_articles_without_numbers_do_not_share_keys(tmp_path: Path) -> None:
    for name in ("one", "two"):
        packed(tmp_path / f"{name}.tar.gz", {"x.nxml": article(figure("F1", name, "g"), pmid="", pmc=""), "g.jpg": photo(1)})
    twice = figure("F1", "Again.", "g") + figure("F1", "And again.", "g") + figure("", "No id.", "g")
    packed(tmp_path / "three.tar.gz", {"x.nxml": article(twice, pmid=""), "g.jpg": photo(1)})
    dataset = ingest_all(Pmc(path=str(tmp_path)).build(), tmp_path / "out")
    assert set(texts(dataset)) == {"one_F1", "two_F1", "PMC1001_F1", "PMC1001_F1~2", "PMC1001_figure-3"}


def test_splits_go_by_article(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 40)
    config = Pmc(path=str(tmp_path / "in"), val=0.2, test=0.3)
    frame = ingest_all(config.build(), tmp_path / "out", config=LENIENT).read(["meta.article", "split"])
    assert frame.group_by("meta.article").agg(pl.col("split").n_unique())["split"].max() == 1
    shares = Counter(frame.unique()["split"])
    assert set(shares) == {"train", "val", "test"}
    with pytest.raises(ConfigError, match="val and test"):
        Pmc.parse({"path": "x", "val": 0.5, "test": 0.5})


# ---------------------------------------------------------------- what is broken, and what is hostile


def left(tmp_path: Path, **limits: int) -> dict[str, int]:
    config = Pmc(path=str(tmp_path / "in"), **limits)  # type: ignore[arg-type]
    return reasons(ingest_all(config.build(), tmp_path / "out", config=LENIENT))


def test_broken_packages_leave_with_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = packed(folder / "good.tar.gz", {"a.nxml": article(figure("F1", "Good.", "g")), "g.jpg": photo(1)}).read_bytes()
    (folder / "cut.tar.gz").write_bytes(good[: len(good) // 2])
    (folder / "cut.tar").write_bytes(gzip.decompress(good)[:2000])
    (folder / "page.tar.gz").write_bytes(b"<html>not found</html>" * 99)
    (folder / "noise.tgz").write_bytes(b"\x1f\x8b" + bytes(range(256)))
    packed(folder / "bare.tar.gz", {"readme.txt": b"nothing"})
    packed(folder / "text.tar.gz", {"a.nxml": article("<p>No figure.</p>")})
    packed(folder / "image.tar.gz", {"a.nxml": article(figure("F2", "C", "g")), "g.jpg": b"<html>"})
    assert left(tmp_path) == {
        "truncated package": 2, "package cannot be read": 2, "package without article": 1, "article without figures": 1, "not an image": 1,
    }  # fmt: skip


def test_folders_without_an_article_leave_with_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("empty", "PMC1/figures", "good/figures", "group/deep", "group/other", ".git/objects"):
        (folder / name).mkdir(parents=True)
    (folder / "PMC1" / "figures" / "g.jpg").write_bytes(photo(1))
    (folder / "good" / "a.nxml").write_bytes(article(figure("F1", "Good.", "figures/g")))
    (folder / "good" / "figures" / "g.jpg").write_bytes(photo(2))
    packed(folder / "group" / "deep" / "two.tar.gz", {"a.nxml": article(figure("F1", "Two.", "g"), pmid="2", pmc="2"), "g.jpg": photo(3)})
    dataset = ingest_all(Pmc(path=str(folder)).build(), tmp_path / "out", config=LENIENT)
    assert len(dataset) == 2
    assert reasons(dataset) == {"package without article": 3}
    assert sorted(dataset.rejects()["key"]) == ["PMC1", "empty", "group/other"]


def test_nothing_is_larger_than_the_limits(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    one = {"a.nxml": article(figure("F1", "C", "g"))}
    packed(folder / "bomb.tar.gz", {**one, "zeros.bin": bytes(9 << 20)})
    assert (folder / "bomb.tar.gz").stat().st_size < 1 << 16
    packed(folder / "xml.tar.gz", {"a.nxml": article(f"<p>{'x' * (2 << 20)}</p>" + figure("F1", "C", "g"))})
    packed(folder / "file.tar.gz", {**one, "g.jpg": photo(1) + bytes(2 << 20)})
    assert left(tmp_path, max_package_mebibytes=8, max_xml_mebibytes=1, max_file_mebibytes=1) == {
        "package too large": 1, "XML too large": 1, "too many bytes": 1,
    }  # fmt: skip


def test_no_file_outside_a_package_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(photo(1))
    names = ("../secret", f"{tmp_path}/secret.jpg", "link", "../../secret.jpg")
    body = "".join(figure(f"F{index}", "C", name) for index, name in enumerate(names))
    tar = {"P/a.nxml": article(body), "../secret.jpg": photo(2), f"{tmp_path}/secret.jpg": photo(3)}
    packed(tmp_path / "in" / "tar" / "P.tar.gz", tar, {"P/link.jpg": "../../secret.jpg"})
    beside = tmp_path / "in" / "beside"
    beside.mkdir()
    (beside / "a.nxml").write_bytes(article(body, pmid="222"))
    (beside / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert left(tmp_path) == {"missing image file": 8}
    assert {path.name for path in tmp_path.rglob("*.jpg")} == {"secret.jpg", "link.jpg"}  # nothing was unpacked


def test_xml_beside_its_figures(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.nxml").write_bytes(article(figure("F1", "Beside.", "pictures/g.PNG") + figure("F2", "Too.", "h.tif")))
    (folder / "notes.xml").write_bytes(b"<notes/>")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "g.PNG").write_bytes(photo(1, "PNG"))
    (folder / "h.jpg").write_bytes(photo(2))
    assert texts(ingest_all(Pmc(path=str(tmp_path / "in")).build(), tmp_path / "out")) == {"111_F1": "Beside.", "111_F2": "Too."}


# ---------------------------------------------------------------- file lists


def test_a_list_of_pubmed_central(tmp_path: Path) -> None:
    for name, licence in (("oa/PMC1.tar.gz", ""), ("oa/PMC2.tar.gz", "<license/>")):
        packed(tmp_path / name, {"x/a.nxml": article(figure("F1", name, "g"), pmid="", pmc="", licence=licence), "x/g.jpg": photo(1)})
    lines = ["2026-11-01 00:00:00"]
    lines += [
        "oa/PMC1.tar.gz\tCell J. 2003 Oct 18; 1(1):e5\tPMC1\tPMID:77\tCC BY-NC",
        "oa/PMC9.tar.gz\tC\tPMC9\t\tCC0",
        "../PMC2.tar.gz\tD\tPMC3\t\tCC0",
    ]
    (tmp_path / "oa_file_list.txt").write_text("\n".join(lines))
    dataset = ingest_all(Pmc(path=str(tmp_path), table="oa_file_list.txt").build(), tmp_path / "out", config=LENIENT)
    (row,) = dataset.read().to_dicts()
    assert (row["key"], row["meta.licence"], row["meta.licence_class"]) == ("77_F1", "CC BY-NC", "noncommercial")
    assert reasons(dataset) == {"missing package": 1, "path leaves the folder": 1}


def test_sources_without_packages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of article packages"):
        Pmc(path=str(tmp_path / "none")).build().parts()
    with pytest.raises(DataError, match="no article packages"):
        Pmc(path=str(tmp_path)).build().parts()
    with pytest.raises(DataError, match="file list cannot be read"):
        Pmc(path=str(tmp_path), table="none.csv").build().parts()
    (tmp_path / "empty.csv").write_text("Title\nx\n")
    with pytest.raises(DataError, match="names no package"):
        Pmc(path=str(tmp_path), table="empty.csv").build().parts()


def test_limits_stand_beside_the_path() -> None:
    assert set(PackageLimits.model_fields) < set(biomedclip.Config.model_fields)


# ---------------------------------------------------------------- real articles


@pytest.mark.skipif(not REAL.is_dir(), reason="no real articles here: DIPTYCH_PMC names their folder")
def test_real_articles(tmp_path: Path) -> None:
    gold = pl.read_parquet(REAL / "figures.parquet")
    config = Archive(path=str(REAL), table="file_list.csv", elements=("fig",), hash=False)
    dataset = ingest_all(config.build(), tmp_path / "out", config=LENIENT.model_copy(update={"check": "header"}))
    found = {(row["meta.figure"], squeezed(row["captions"][0]["text"])): row for row in dataset.read().to_dicts()}
    assert len(dataset) == len(found) == gold.height
    for row in gold.iter_rows(named=True):
        own = found[row["figure_id"], squeezed(row["title"]) + squeezed(row["caption"])]
        assert (own["meta.label"], own["meta.licence"]) == (row["label"], row["licence"])
        assert (own["image"]["width"], own["image"]["height"]) == (row["width"], row["height"])
        assert [squeezed(text) for text in (own["meta.mentions"] or [])[:5]] == [squeezed(text) for text in row["inline_mentions"] or []]
    # 82 figures of the articles without pictures, seven of them without caption, one of those of three pictures.
    assert reasons(dataset) == {"article without figures": 3, "figure without caption": 7, "missing image file": 77}


def squeezed(text: str | None) -> str:
    return "".join((text or "").split())
