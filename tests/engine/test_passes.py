"""Passes: the same pairs on any engine, bounded buckets, restarts that repeat only what was in flight, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest

from diptych.core import catalogue
from diptych.core.config import Config
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import PairMethod, Verdict
from diptych.engine import mapped, passes, pieces
from diptych.engine.features import FeatureSpec, compute, model
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.evaluate.encode import encode_texts
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import ingest_all
from diptych.pairs.shards import ShardReader

CHAIN: tuple[dict[str, Any], ...] = (
    {"method": "semantic-dedup", "epsilon": 0.02, "clusters": 6},
    {"method": "concept-pruning", "keep": 0.7, "clusters": 6},
)


def config(values: dict[str, Any]) -> Config:
    return catalogue.config_class(catalogue.find(str(values["method"]))).parse(values)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    """2,597 digits in two tables, 597 of them held out."""
    source = config({"method": "digits", "pool": "zipf-junk", "rows": 2500, "size_px": 8})
    return ingest_all(source.build(), tmp_path_factory.mktemp("pairs") / "ingest", version="0")  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Session]:
    with Session(cores=2) as session:
        yield session


def go(pairs: PairDataset, out: Path, session: Session, configs: list[Config], name: str = "prune") -> PairDataset:
    return passes.run(
        pairs, configs, name, out, seed=3, session=session, scratch=out.parent / "scratch", code="c", version="0",
        progress=Progress(quiet=True), feature_specs={"pixels": FeatureSpec(name="pixels")},
    )  # fmt: skip


def here() -> Session:
    return Session(in_process=True)


def test_a_chain_keeps_its_ledger_its_held_out_pairs_and_its_order(pairs: PairDataset, tmp_path: Path) -> None:
    result = go(pairs, tmp_path / "out", here(), [config(values) for values in CHAIN])
    ledger = result.manifest.ledger
    assert ledger.pairs_in == len(pairs) == ledger.kept + sum(entry.count for entry in ledger.left)
    assert {entry.method for entry in ledger.left} == {"semantic-dedup", "concept-pruning"}
    assert result.scan().filter(pl.col("split") == "test").collect().height == 597
    kept = result.read()
    assert [name for name in kept.columns if name.startswith("_")] == []
    train = kept.filter(pl.col("split") == "train")["key"].to_list()
    original = pairs.read(["key"])["key"].to_list()
    assert train == [key for key in original if key in set(train)], "pairs stay in the order they came in"
    rejects = result.rejects()
    assert rejects.height == sum(entry.count for entry in ledger.left)
    assert rejects["image"].null_count() == 0
    assert set(rejects["key"]).isdisjoint(kept["key"])


def test_buckets_of_any_size_give_the_same_pairs(pairs: PairDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config(values) for values in CHAIN]
    whole = go(pairs, tmp_path / "a" / "out", here(), configs)
    monkeypatch.setattr(passes, "BUCKET_BYTES", 1 << 20)
    cut = go(pairs, tmp_path / "b" / "out", here(), configs)
    assert cut.digest == whole.digest


@pytest.mark.ray
def test_ray_and_this_process_write_the_same_dataset(pairs: PairDataset, tmp_path: Path, ray_session: Session) -> None:
    configs = [config(values) for values in CHAIN]
    assert go(pairs, tmp_path / "b" / "out", ray_session, configs).digest == go(pairs, tmp_path / "a" / "out", here(), configs).digest


@pytest.mark.ray
def test_an_error_in_a_worker_arrives_with_its_type(pairs: PairDataset, tmp_path: Path, ray_session: Session) -> None:
    with pytest.raises(DataError, match="lost or invented"):
        go(pairs, tmp_path / "out", ray_session, [LoserConfig()])
    assert not (tmp_path / "out").exists()


class LoserConfig(Config):
    """Builds a method that drops a pair without a word."""

    method: Literal["loser"] = "loser"

    def build(self, seed: int) -> PairMethod:
        del seed
        return Loser()


class Loser(PairMethod):
    """Keeps all but the last pair and rejects none."""

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        del state
        return Verdict(batch.head(-1), pl.DataFrame(schema={"key": pl.String, "reason": pl.String, "score": pl.Float32}))


class CountingConfig(Config):
    """Builds a method that leaves a mark a table and fails on the second table while `fuse` is there."""

    method: Literal["counting"] = "counting"
    folder: str

    def build(self, seed: int) -> PairMethod:
        del seed
        return Counting(Path(self.folder))


class Counting(PairMethod):
    """Keeps everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        del state
        marks = len(list(self.folder.glob("mark-*")))
        (self.folder / f"mark-{marks}").touch()
        if marks == 1 and (self.folder / "fuse").exists():
            raise DataError.at("Injected", "test", marks, "nothing")
        return Verdict(batch, pl.DataFrame(schema={"key": pl.String, "reason": pl.String, "score": pl.Float32}))


def test_a_restart_repeats_only_the_table_in_flight(pairs: PairDataset, tmp_path: Path) -> None:
    assert len(pairs.tables()) >= 2
    counting = CountingConfig(folder=str(tmp_path))
    (tmp_path / "fuse").touch()
    with pytest.raises(DataError, match="Injected"):
        go(pairs, tmp_path / "out", here(), [counting])
    (tmp_path / "fuse").unlink()
    result = go(pairs, tmp_path / "out", here(), [counting])
    assert len(result) == len(pairs)
    trains = sum(pl.read_parquet(path)["split"].eq("train").any() for path in pairs.tables())
    assert len(list(tmp_path.glob("mark-*"))) == len(pairs.tables()) + 1 >= trains
    assert not list((tmp_path / "scratch").iterdir()), "finished pieces are removed at the end"


def test_a_method_that_is_done_leaves_what_it_kept_and_is_not_run_again(pairs: PairDataset, tmp_path: Path) -> None:
    chain, counting = [config(values) for values in CHAIN], CountingConfig(folder=str(tmp_path))
    (tmp_path / "fuse").touch()
    with pytest.raises(DataError, match="Injected"):
        go(pairs, tmp_path / "out", here(), [*chain, counting])
    (work,) = (tmp_path / "scratch").iterdir()
    left = {path.relative_to(work).as_posix() for path in work.glob("*/*")}
    first = {name.split("/")[1][:5] for name in left if name.startswith("0-")}
    assert first == {"left-", "repor"}, "what the first kept went into the second"
    assert {"1-concept-pruning/kept-00000.arrow", "1-concept-pruning/report.json", "2-counting/kept-00000.arrow"} <= left
    assert not [name for name in left if "route" in name or "decided" in name or "features" in name]
    last = mapped.read(work / "1-concept-pruning" / "kept-00000.arrow")
    assert not [name for name in last.columns if name.startswith(pieces.FEATURE)], "nobody reads the features after this"
    (tmp_path / "fuse").unlink()
    result = go(pairs, tmp_path / "out", here(), [*chain, counting])
    whole = go(pairs, tmp_path / "whole" / "out", here(), chain)
    assert result.read().equals(whole.read())
    assert dict(list(result.manifest.phase.report.items())[:2]) == dict(whole.manifest.phase.report)


# ---------------------------------------------------------------- methods that paint

DISTIL: dict[str, Any] = {
    "method": "smooth-distillation", "size_px": 8, "channels": 1, "width": 2, "depth": 1, "experts": 1, "max_start": 1, "expert_epochs": 1,
    "steps": 1, "iterations": 2, "expert": {"epochs": 2, "gradient_penalty": 0.0}, "pixel_lr": 100.0,
}  # fmt: skip


def test_painted_pictures_are_packed_and_the_ledger_holds(pairs: PairDataset, tmp_path: Path) -> None:
    result = go(pairs, tmp_path / "out", here(), [config(DISTIL), config({"method": "random-subset", "count": 6})])
    train, test = (result.read().filter(pl.col("split") == split) for split in ("train", "test"))
    assert result.manifest.ledger.pairs_in == len(pairs)
    assert (train.height, test.height) == (6, 597)
    assert set(train["image"].struct.field("shard").str.head(6)) == {"prune-"}
    assert not test["image"].struct.field("shard").str.starts_with("prune-").any()
    assert all(data.startswith(b"\x89PNG") for data in result.reader().read_column(train["image"]))
    original = pairs.read().join(train.select("key"), on="key", how="semi", maintain_order="left")
    assert pairs.reader().read_column(original["image"]) != result.reader().read_column(train["image"])
    assert [name for name in train.columns if name.startswith("_") or name == "pixels"] == []
    assert go(result, tmp_path / "next", here(), [], "caption").read().equals(result.read()), "the next phase finds the pictures"
    result.verify_shards()


def test_new_pictures_cannot_be_looked_at_in_the_phase_that_makes_them(pairs: PairDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot see the pictures"):
        go(pairs, tmp_path / "out", here(), [config(DISTIL), config(CHAIN[0])])


def test_a_chain_of_steps_is_one_method_and_copies_name_their_twin(pairs: PairDataset, tmp_path: Path) -> None:
    result = go(pairs, tmp_path / "out", here(), [config({"method": "exact-duplicates"})])
    assert [method["method"] for method in result.manifest.phase.methods] == ["exact-duplicates"]
    rejects = result.rejects()
    kept = result.read().filter(pl.col("split") == "train")
    assert kept.height + rejects.height == 2000 + 500
    assert kept["meta.content"].is_duplicated().sum() == 0
    assert rejects.height > 1000, "2,500 draws from 1,200 pictures, most of them of one class"
    assert set(rejects["twin"]) <= set(kept["key"])
    assert passes.count([config({"method": "exact-duplicates"})], 0) == 1 + 1 + 3


def test_pictures_are_held_a_slice_at_a_time(pairs: PairDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go(pairs, tmp_path / "a" / "out", here(), [config({"method": "exact-duplicates"})])
    monkeypatch.setattr(pieces, "PIXEL_ROWS", 300)
    held = []
    read_column = ShardReader.read_column
    monkeypatch.setattr(ShardReader, "read_column", lambda self, images: held.append(len(images)) or read_column(self, images))
    cut = go(pairs, tmp_path / "b" / "out", here(), [config({"method": "exact-duplicates"})])
    assert cut.digest == whole.digest
    assert max(held) <= 300


def test_text_features_are_of_the_first_caption(pairs: PairDataset, tmp_path: Path) -> None:
    chosen = config({"method": "clip-score-filter", "keep": 0.25, "features": "digits-16"})
    result = passes.run(
        pairs, [chosen], "prune", tmp_path / "out", seed=3, session=here(), scratch=tmp_path / "scratch", code="c", version="0",
        progress=Progress(quiet=True), feature_specs={"digits-16": FeatureSpec(name="digits-16", seed=3)},
    )  # fmt: skip
    kept = result.read().filter(pl.col("split") == "train")
    assert kept.height >= 625
    assert [name for name in kept.columns if "feature" in name] == []
    row = kept.row(0, named=True)
    encoder = model("digits-16", "", 3)
    text_D = encode_texts(encoder, [row["captions"][0]["text"]])[0]
    image_D = compute(FeatureSpec(name="digits-16", seed=3), kept.head(1), result.reader())[0]
    assert row["meta.clip_score"] == pytest.approx(float(text_D @ image_D), abs=1e-5)


def test_a_captioner_sees_the_pictures_and_says_the_same_in_any_batch(tmp_path: Path) -> None:
    from diptych.models import clip
    from diptych.models.captioner import keep_only, tokens_of

    source = config({"method": "digits", "train": 40})
    digits = ingest_all(source.build(), tmp_path / "ingest", version="0")  # type: ignore[attr-defined]
    model = clip.create("coca-digits-16", 0)
    keep_only(model, tokens_of(["the digit seven", "a dog"], model.tokenizer))
    model.clip.text_decoder.text_projection.data[:, 49407] *= 0.01  # untrained, it would mostly say nothing
    clip.save(model, tmp_path / "model", {})
    values = {"method": "cfg-captioning", "model": str(tmp_path / "model"), "guidance": 2.0}
    results = [
        go(
            digits,
            tmp_path / f"b{size}" / "out",
            here(),
            [config({**values, "checkpoint": {"batch_size": size, "max_length": 4}})],
            "caption",
        )
        for size in (7, 64)
    ]
    first, second = (result.read(["key", "captions", "split", "meta.captioning_dropped"]) for result in results)
    assert first.equals(second)
    train = first.filter(pl.col("split") == "train")
    texts = train.filter(pl.col("meta.captioning_dropped").is_null())["captions"].list.last().struct.unnest()
    assert train.height == 40
    assert texts.height > 30
    assert set(texts["source"]) == {"synthetic:cfg-captioning"}
    assert texts["text"].n_unique() > 3
    assert set(first.filter(pl.col("split") == "test")["captions"].list.len()) == {1}, "what a model is measured on is never captioned"
