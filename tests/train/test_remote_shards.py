"""Training from shards in an S3 store, here moto's server on loopback: the same bits as from a local disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_run import run, weights
from tiny import write_dataset

moto = pytest.importorskip("moto.server")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield address
    server.stop()


@pytest.mark.server
def test_shards_in_an_s3_store_train_the_same_model(store: str, tmp_path: Path) -> None:
    import s3fs

    from diptych.pairs.dataset import PairDataset

    write_dataset(tmp_path / "local" / "data", rows=40)
    files = s3fs.S3FileSystem(endpoint_url=store)
    files.mkdir("shards")
    files.put_file(str(tmp_path / "local" / "s.tar"), "shards/s.tar")
    remote = tmp_path / "remote" / "data"
    remote.parent.mkdir()
    (tmp_path / "local" / "data").rename(remote)
    manifest = json.loads((remote / "manifest.json").read_text())
    manifest["shards"]["s"]["uri"] = "s3://shards/s.tar"
    (remote / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "local" / "s.tar").unlink()
    assert PairDataset.open(remote).shards["s"].uri == "s3://shards/s.tar"

    write_dataset(tmp_path / "again" / "data", rows=40)
    settings = {"epochs": 1, "cache_bytes": 0, "loader_workers": 2}  # bytes are asked for on every visit, from two threads
    run(remote, tmp_path / "of-s3", changes=settings)
    run(tmp_path / "again" / "data", tmp_path / "of-disk", changes=settings)
    ours, theirs = weights(tmp_path / "of-s3"), weights(tmp_path / "of-disk")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
