"""What cannot be used leaves with a reason; what can be used comes out byte for byte."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.core.errors import DataError
from diptych.core.points import RawPair, Source
from diptych.pairs.dataset import PairDataset
from diptych.pairs.decode import decode
from diptych.pairs.image import ImageLimits, probe
from diptych.pairs.ingest import IngestConfig, StoreConfig, check_captions, ingest_all

from .conftest import picture
from .test_image import animated, bomb, noise

GOOD = [("a cat", "alt")]
LENIENT = IngestConfig(max_bad_share=1.0)


class Given(Source):
    """A source of given pairs, by part."""

    def __init__(self, **parts: list[RawPair]) -> None:
        self.given = parts

    def parts(self) -> Sequence[str]:
        return sorted(self.given)

    def read(self, part: str) -> Iterator[RawPair]:
        yield from self.given[part]


def one(out: Path, *pairs: RawPair, config: IngestConfig = LENIENT) -> PairDataset:
    return ingest_all(Given(a=list(pairs)), out, config=config)


def reasons(dataset: PairDataset) -> dict[str, str]:
    return dict(dataset.rejects().select("key", "reason").iter_rows())


def test_good_pairs(tmp_path: Path) -> None:
    images = {"jpg": noise("JPEG"), "png": noise("PNG"), "webp": noise("WEBP")}
    pairs = [RawPair(key, data, [(key, "human"), ("more", "tag")], {"label": 3, "meta.note": "x"}, "test") for key, data in images.items()]
    dataset = ingest_all(Given(a=pairs), tmp_path / "out", seed=5, code="sha256:c", version="1", methods=({"method": "given"},))
    frame = dataset.read()
    assert dataset.reader().read_column(frame["image"]) == list(images.values())
    assert frame.columns == ["key", "image", "captions", "split", "label", "meta.note"]
    assert frame["split"].unique().to_list() == ["test"]
    assert frame["captions"][0].to_list() == [
        {"text": "jpg", "source": "human", "score": None},
        {"text": "more", "source": "tag", "score": None},
    ]
    assert frame["image"].struct.unnest().select("width", "height").unique().rows() == [(64, 48)]
    phase = dataset.manifest.phase
    assert (phase.phase, phase.seed, phase.code, phase.version, phase.methods) == ("ingest", 5, "sha256:c", "1", ({"method": "given"},))
    assert PairDataset.open(dataset.root, verify=True).digest == dataset.digest
    dataset.verify_shards()


def test_every_fault_has_its_reason(tmp_path: Path) -> None:
    image = picture()
    cases = {
        "empty image": RawPair("k0", b"", GOOD),
        "no image": RawPair("k1", None, GOOD),
        "not an image": RawPair("k2", b"hello", GOOD),
        "truncated image": RawPair("k3", noise("JPEG")[:-900], GOOD),
        "too many pixels (decompression bomb)": RawPair("k4", bomb(50_000, 50_000), GOOD),
        "null caption": RawPair("k5", image, [(None, "alt")]),
        "empty caption": RawPair("k6", image, [(" \n", "alt")]),
        "caption too long": RawPair("k7", image, [("x" * 1_000_000, "alt")]),
        "caption is not valid UTF-8": RawPair("k8", image, [(b"caf\xe9", "alt")]),
        "caption is not text": RawPair("k9", image, [(3.5, "alt")]),
        "no caption": RawPair("k10", image, []),
        "disk error": RawPair("k11", image, GOOD, fault="disk error"),
        "key too long": RawPair("k" * 513, image, GOOD),
        "key is not valid UTF-8": RawPair("k\udce9", image, GOOD),
        "no split": RawPair("k14", image, GOOD, split=""),
        "empty key": RawPair("", image, GOOD),
    }
    dataset = one(tmp_path / "out", RawPair("good", image, GOOD), *cases.values())
    assert dataset.read()["key"].to_list() == ["good"]
    assert sorted(dataset.rejects()["reason"]) == sorted(cases)
    assert dataset.manifest.ledger.pairs_in == len(cases) + 1
    by_reason = {entry.reason: entry.count for entry in dataset.manifest.ledger.left}
    assert by_reason == dict.fromkeys(cases, 1)


def test_surrogates_in_a_caption() -> None:
    assert check_captions([("caf\udce9", "alt")]) == ([], ["caption is not valid UTF-8"])
    assert check_captions([("café".encode(), "alt")])[0][0]["text"] == "café"


def test_one_good_caption_is_enough(tmp_path: Path) -> None:
    dataset = one(tmp_path / "out", RawPair("a", picture(), [(None, "alt"), ("", "alt"), ("a cat", "human"), ("y" * 10_001, "alt")]))
    assert [caption["text"] for caption in dataset.read()["captions"][0]] == ["a cat"]
    assert dataset.manifest.phase.report["captions_removed"] == {"caption too long": 1, "empty caption": 1, "null caption": 1}


def test_duplicate_keys_first_stays(tmp_path: Path) -> None:
    red, blue = picture((255, 0, 0)), picture((0, 0, 255))
    source = Given(a=[RawPair("k", red, GOOD), RawPair("k", blue, GOOD)], b=[RawPair("k", blue, GOOD), RawPair("l", blue, GOOD)])
    dataset = ingest_all(source, tmp_path / "out", config=LENIENT)
    assert dataset.read()["key"].to_list() == ["k", "l"]
    assert dataset.reader().read_column(dataset.read()["image"]) == [red, blue]
    assert dataset.rejects()["reason"].to_list() == ["duplicate key"] * 2
    late = dataset.rejects().filter(dataset.rejects()["image"].is_not_null())
    assert dataset.reader().read_column(late["image"]) == [blue]


def test_a_broken_pair_does_not_take_the_key(tmp_path: Path) -> None:
    dataset = one(tmp_path / "out", RawPair("k", b"", GOOD), RawPair("k", picture(), GOOD))
    assert dataset.read()["key"].to_list() == ["k"]
    assert reasons(dataset) == {"k": "empty image"}


def test_too_many_bad_pairs_stop_the_run(tmp_path: Path) -> None:
    pairs = [RawPair("a", b"x", GOOD), RawPair("b", None, GOOD), RawPair("c", b"y", GOOD), RawPair("d", picture(), GOOD)]
    with pytest.raises(DataError) as caught:
        one(tmp_path / "out", *pairs, config=IngestConfig(max_bad_share=0.7))
    assert "3 of 4 pairs" in caught.value.headline
    assert [(problem.where, problem.got) for problem in caught.value.problems] == [
        ("not an image", "2 pairs, e.g. a, c"),
        ("no image", "1 pair, e.g. b"),
    ]
    assert list(tmp_path.iterdir()) == []
    assert len(one(tmp_path / "out", *pairs, config=IngestConfig(max_bad_share=0.75))) == 1


def test_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pairs"):
        ingest_all(Given(a=[]), tmp_path / "out")


def test_parts_may_have_other_columns(tmp_path: Path) -> None:
    source = Given(a=[RawPair("a", picture(), GOOD, {"label": 1})], b=[RawPair("b", picture(), GOOD, {"meta.x": "y", "label": None})])
    dataset = ingest_all(source, tmp_path / "out")
    assert dataset.read(["label", "meta.x"]).rows() == [(1, None), (None, "y")]


def test_mixed_types_in_a_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mixes types"):
        one(tmp_path / "out", RawPair("a", picture(), GOOD, {"label": 1}), RawPair("b", picture(), GOOD, {"label": "two"}))


def test_the_same_whoever_does_the_parts(tmp_path: Path) -> None:
    parts = {f"part{index:02d}": [RawPair(f"{index}-{row}", picture((index, row, 0)), GOOD) for row in range(5)] for index in range(8)}
    alone = ingest_all(Given(**parts), tmp_path / "alone")
    with ThreadPoolExecutor(4) as pool:
        together = ingest_all(Given(**parts), tmp_path / "together", map=pool.map)  # type: ignore[arg-type]
    assert together.digest == alone.digest
    names = sorted(path.relative_to(alone.root) for path in alone.root.rglob("*") if path.is_file())
    assert all((alone.root / name).read_bytes() == (together.root / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("format", "data"), [("GIF", animated("GIF")), ("WEBP", animated("WEBP")), ("BMP", noise("BMP")), ("TIFF", noise("TIFF"))]
)
def test_odd_formats_are_packed_as_something_plain(tmp_path: Path, format: str, data: bytes) -> None:
    dataset = one(tmp_path / "out", RawPair("a", data, GOOD))
    (stored,) = dataset.reader().read_column(dataset.read()["image"])
    info = probe(stored)
    assert info.plain
    assert (info.width, info.height) == (probe(data).width, probe(data).height)
    if format in ("BMP", "TIFF"):
        assert np.array_equal(decode(stored), np.asarray(Image.open(io.BytesIO(data))))


def test_cmyk_and_sixteen_bits_become_plain(tmp_path: Path) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(deep, "PNG")
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(cmyk, "JPEG")
    dataset = one(tmp_path / "out", RawPair("deep", deep.getvalue(), GOOD), RawPair("cmyk", cmyk.getvalue(), GOOD))
    first, second = dataset.reader().read_column(dataset.read()["image"])
    assert (decode(first) == 128).all()
    assert probe(second).mode == "RGB"
    assert decode(second)[4, 4, 0] > 230


@pytest.mark.parametrize(("format", "expected"), [("keep", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_store_smaller(tmp_path: Path, format: str, expected: str) -> None:
    config = IngestConfig(store=StoreConfig(short_side=24, format=format))  # type: ignore[arg-type]
    dataset = one(tmp_path / "out", RawPair("a", noise("PNG", (64, 48)), GOOD), config=config)
    info = probe(dataset.reader().read_column(dataset.read()["image"])[0])
    assert (info.format, info.width, info.height) == (expected, 32, 24)
    image = dataset.read()["image"][0]
    assert (image["width"], image["height"]) == (32, 24)


def test_store_keeps_transparency_and_small_pictures(tmp_path: Path) -> None:
    clear, small = picture((9, 9, 9, 7), mode="RGBA"), picture()
    config = IngestConfig(store=StoreConfig(short_side=100, format="jpeg"))
    dataset = one(tmp_path / "out", RawPair("a", clear, GOOD), RawPair("b", small, GOOD), config=config)
    first, second = dataset.reader().read_column(dataset.read()["image"])
    assert probe(first).mode == "RGBA"
    assert probe(second).format == "JPEG"
    assert probe(second).width == probe(small).width
    kept = one(tmp_path / "kept", RawPair("b", small, GOOD), config=IngestConfig(store=StoreConfig(short_side=100)))
    assert kept.reader().read_column(kept.read()["image"]) == [small]


def test_webp_store_is_lossless(tmp_path: Path) -> None:
    data = noise("PNG")
    dataset = one(tmp_path / "out", RawPair("a", data, GOOD), config=IngestConfig(store=StoreConfig(format="webp")))
    (stored,) = dataset.reader().read_column(dataset.read()["image"])
    assert np.array_equal(decode(stored), decode(data))


def test_header_check_is_satisfied_with_less(tmp_path: Path) -> None:
    cut = RawPair("a", noise("JPEG")[:-900], GOOD)
    assert len(one(tmp_path / "out", cut, config=IngestConfig(check="header"))) == 1
    assert len(one(tmp_path / "out", cut)) == 0


def test_limits_are_the_users(tmp_path: Path) -> None:
    dataset = one(tmp_path / "out", RawPair("a", picture(), GOOD), config=IngestConfig(limits=ImageLimits(max_pixels=95), max_bad_share=1))
    assert reasons(dataset) == {"a": "too many pixels (decompression bomb)"}
