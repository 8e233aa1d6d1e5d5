"""Pairs in an S3 store: moto's server on loopback, which works, refuses now and then, hangs up in the middle of an answer, or is gone."""

from __future__ import annotations

import io
import tarfile
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.core import catalogue
from diptych.core.errors import ConfigError, DataError
from diptych.engine import passes
from diptych.engine.features import FeatureSpec
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs import export, ranges
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import IngestConfig, ingest_all
from diptych.pairs.sources import parquet, webdataset
from diptych.pairs.sources.paths import expand

moto = pytest.importorskip("moto.server")

pytestmark = pytest.mark.server

TARS, ROWS = 2, 12
PRUNE = {"method": "semantic-dedup", "epsilon": 0.02, "clusters": 1}


class Store:
    """A store that does to a request what `fault(method, path, how many of the kind came before)` names: None, `500`, or `cut` its answer."""

    def __init__(self) -> None:
        from werkzeug.serving import make_server

        self.app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.fault: Callable[[str, str, int], str | None] = lambda *_: None
        self.seen: Counter[tuple[str, str]] = Counter()
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=moto.MotoRequestHandler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = (environ["REQUEST_METHOD"], environ["PATH_INFO"])
        fault = self.fault(*request, self.seen[request])
        self.seen[request] += 1
        if fault == "500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        answer: Iterable[bytes] = self.app(environ, start_response)
        body = b"".join(answer)
        return [body[: len(body) // 2] if fault == "cut" else body]

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that the environment names, as a user's does; libraries and we wait for it no longer than a test should."""
    import s3fs

    server = Store()
    urllib.request.urlopen(urllib.request.Request(f"{server.address}/moto-api/reset", method="POST")).close()  # one memory a process
    environment = {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranges, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()  # a test before this one knew another server
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def tars(store: Store) -> str:
    """Tars of pictures in the bucket; every third picture is a copy of the one before."""
    import s3fs

    files, rng, data = s3fs.S3FileSystem(), np.random.default_rng(0), b""
    files.mkdir("pictures")
    for number in range(TARS):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for row in range(ROWS):
                if row % 3 != 2:
                    picture = io.BytesIO()
                    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(picture, "PNG")
                    data = picture.getvalue()
                for ending, content in (("png", data), ("txt", f"picture {row}".encode())):
                    info = tarfile.TarInfo(f"{number}-{row:02d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        files.pipe(f"pictures/in/{number:05d}.tar", packed.getvalue())
    store.seen.clear()
    return "s3://pictures/in/*.tar"


def ingested(path: str, out: Path) -> PairDataset:
    return ingest_all(webdataset.Config(path=path).build(), out, config=IngestConfig(), version="0")


def pruned(dataset: PairDataset, out: Path) -> PairDataset:
    config = catalogue.config_class(catalogue.find("semantic-dedup")).parse(PRUNE)
    return passes.run(
        dataset, [config], "prune", out, seed=0, session=Session(in_process=True), scratch=out.parent / "scratch", code="c", version="0",
        progress=Progress(quiet=True), feature_specs={"pixels": FeatureSpec(name="pixels")},
    )  # fmt: skip


def test_pairs_are_used_where_they_lie_and_go_back_as_tars(store: Store, tars: str, tmp_path: Path) -> None:
    dataset = ingested(tars, tmp_path / "ingest")
    assert [entry.uri for entry in dataset.shards.values()] == [f"s3://pictures/in/{number:05d}.tar" for number in range(TARS)]
    assert list((dataset.root / "shards").iterdir()) == [], "nothing was copied"
    assert sum(count for (method, path), count in store.seen.items() if method == "GET" and path.endswith(".tar")) == TARS, (
        "8 MiB a request"
    )
    store.seen.clear()
    kept = pruned(dataset, tmp_path / "prune")
    assert sum(store.seen.values()) == TARS, "neighbours come in one request"
    assert len(kept) == TARS * ROWS * 2 // 3
    assert export.export_to_store(kept, "s3://pictures/out/", "webdataset") == ["s3://pictures/out/train-00000.tar"]
    again = ingest_all(
        webdataset.Config(path="s3://pictures/out/*.tar", text=(), json_captions=("captions",)).build(), tmp_path / "again", version="0"
    )
    assert again.read(["key", "captions"]).equals(kept.read(["key", "captions"]))
    assert again.reader().read_column(again.read()["image"]) == kept.reader().read_column(kept.read()["image"])


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_a_store_that_fails_now_and_then_changes_nothing(store: Store, tars: str, tmp_path: Path, fault: str) -> None:
    calm = pruned(ingested(tars, tmp_path / "a" / "ingest"), tmp_path / "a" / "prune")
    store.seen.clear()
    store.fault = lambda method, path, before: fault if method == "GET" and path.endswith(".tar") and before % 3 == 0 else None
    shaken = pruned(ingested(tars, tmp_path / "b" / "ingest"), tmp_path / "b" / "prune")
    assert shaken.digest == calm.digest
    assert {store.seen["GET", f"/pictures/in/{number:05d}.tar"] for number in range(TARS)} == {3}, "one in vain at ingest, two that came"


@pytest.fixture
def table(store: Store) -> str:
    """A Parquet file of pictures in the bucket."""
    import polars as pl
    import s3fs

    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(ROWS):
        packed = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(packed, "PNG")
        pictures.append(packed.getvalue())
    written = io.BytesIO()
    pl.DataFrame({"key": [str(row) for row in range(ROWS)], "image": pictures, "text": ["a picture"] * ROWS}).write_parquet(written)
    files = s3fs.S3FileSystem()
    files.mkdir("tables")
    files.pipe_file("tables/pairs.parquet", written.getvalue())
    store.seen.clear()
    return "s3://tables/pairs.parquet"


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_parquet_in_a_store_that_fails_now_and_then_is_read_whole(store: Store, table: str, tmp_path: Path, fault: str) -> None:
    expected = ingest_all(parquet.Config(path=table).build(), tmp_path / "plain").digest
    store.seen.clear()
    store.fault = lambda method, path, before: fault if method == "GET" and path.endswith(".parquet") and before % 3 == 0 else None
    assert ingest_all(parquet.Config(path=table).build(), tmp_path / "shaken").digest == expected


def test_parquet_in_a_store_that_breaks_down_is_told_in_a_sentence(store: Store, table: str, tmp_path: Path) -> None:
    store.fault = lambda method, path, before: "500" if method == "GET" and path.endswith(".parquet") and before else None
    with pytest.raises(DataError) as caught:
        ingest_all(parquet.Config(path=table).build(), tmp_path / "out")
    assert "A file cannot be read to its end" in str(caught.value)
    assert "give the same command again" in str(caught.value)


def test_a_store_that_breaks_down_stops_the_work_with_a_sentence_and_the_same_command_finishes_it(
    store: Store, tars: str, tmp_path: Path
) -> None:
    calm = pruned(ingested(tars, tmp_path / "a" / "ingest"), tmp_path / "a" / "prune")
    store.fault = lambda _method, path, _: "500" if path.endswith("1.tar") else None
    with pytest.raises(DataError, match=r"(?s)tar cannot be (opened|read).*s3://pictures/in/00001\.tar"):
        ingested(tars, tmp_path / "b" / "ingest")
    assert list((tmp_path / "b").iterdir()) == [], "half an ingest is no dataset"
    store.fault = lambda *_: None
    dataset = ingested(tars, tmp_path / "b" / "ingest")

    store.fault = lambda _method, path, _: "500" if path.endswith("1.tar") else None
    with pytest.raises(DataError, match="A shard cannot be read"):
        pruned(dataset, tmp_path / "b" / "prune")
    assert not (tmp_path / "b" / "prune").exists()
    store.fault = lambda *_: None
    store.seen.clear()
    assert pruned(dataset, tmp_path / "b" / "prune").digest == calm.digest
    asked = {path.rpartition("/")[2] for method, path in store.seen if method == "GET"}
    assert asked == {"00001.tar"}, "the features of the first table were kept"


def test_an_export_that_did_not_get_through_is_finished_by_the_same_command(store: Store, tars: str, tmp_path: Path) -> None:
    import s3fs

    dataset = ingested(tars, tmp_path / "ingest")
    sizes = {"shard_size_bytes": 8192}
    store.fault = lambda method, path, _: "500" if method == "PUT" and path.endswith("2.tar") else None
    with pytest.raises(DataError, match=r"(?s)did not reach its store.*the same command again"):
        export.export_to_store(dataset, "s3://pictures/out", "webdataset", **sizes)
    store.fault = lambda *_: None
    written = export.export_to_store(dataset, "s3://pictures/out", "webdataset", **sizes)
    assert len(written) > 3
    local = export.export(dataset, tmp_path / "local", "webdataset", **sizes)
    files = s3fs.S3FileSystem()
    assert [files.cat_file(name) for name in written] == [path.read_bytes() for path in local]


def test_an_export_touches_nothing_of_others(store: Store, tars: str, tmp_path: Path) -> None:
    dataset = ingested(tars, tmp_path / "ingest")
    with pytest.raises(ConfigError, match="Other files lie where the export goes"):
        export.export_to_store(dataset, "s3://pictures/in", "webdataset")
    assert not any(method == "PUT" and path.endswith("train-00000.tar") for method, path in store.seen)


def test_a_store_that_is_not_there_or_has_no_such_file_is_told_in_a_sentence(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No file of this name"):
        expand(["s3://no-such-bucket/*.tar"])
    with pytest.raises(DataError, match=r"(?s)A tar cannot be opened.*s3://no-such-bucket/0\.tar"):
        ingested("s3://no-such-bucket/0.tar", tmp_path / "ingest")
    store.stop()
    with pytest.raises(DataError, match="cannot be asked for its files"):
        expand(["s3://pictures/*.tar"])
    with pytest.raises(DataError, match="A tar cannot be opened"):
        ingested("s3://pictures/0.tar", tmp_path / "ingest")


def test_a_request_is_made_again_after_growing_waits_and_a_plain_no_is_taken() -> None:
    waits: list[float] = []
    answers: Iterator[Any] = iter([ValueError("odd"), OSError(5, "broken"), "fine"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    assert ranges.insist(ask, waits.append) == "fine"
    assert waits == list(ranges.WAITS_S[:2])
    answers = iter([FileNotFoundError(2, "no such file"), "never asked"])
    with pytest.raises(FileNotFoundError):
        ranges.insist(ask, waits.append)
    answers = iter([ValueError("odd")] * 9)
    with pytest.raises(OSError, match="ValueError: odd"):
        ranges.insist(ask, waits.append)
    assert len(list(answers)) == 9 - 1 - len(ranges.WAITS_S)


def test_an_answer_that_is_too_short_is_no_end_of_a_tar() -> None:
    class Short:
        size = 2048

        def read(self, offset: int, size: int) -> bytes:
            del offset
            return bytes(size // 2)

    with pytest.raises(OSError, match="1024 bytes came of 2048"):
        ranges.ReadAhead(Short()).read(0, 512)
