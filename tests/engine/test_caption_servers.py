"""Caption phases whose server is slow, busy or talks nonsense: asked again, then the pair keeps what it has, and the dataset says how many."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from diptych.core import catalogue
from diptych.core.config import Config
from diptych.engine import passes
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import ingest_all

pytestmark = pytest.mark.server

TROUBLES = ("slow", "busy", "garbage", "broken")
TIMEOUT_S, RETRIES = 2.0, 2


class Server(ThreadingHTTPServer):
    """In trouble with two thirds of the requests, by their seed: half of those for good, half only when first asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.over = threading.Lock(), threading.Event()
        self.asked: Counter[int] = Counter()

    def trouble(self, seed: int, before: int) -> str | None:
        lasts = seed % 3 == 0
        return TROUBLES[seed % len(TROUBLES)] if lasts or (seed % 3 == 1 and before == 0) else None

    @property
    def hopeless(self) -> int:
        return sum(1 for seed in self.asked if seed % 3 == 0)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            before = self.server.asked[body["seed"]]
            self.server.asked[body["seed"]] += 1
        trouble = self.server.trouble(body["seed"], before)
        if trouble == "slow":
            self.server.over.wait(2 * TIMEOUT_S)
        said = f"something new {body['seed']}"
        reply = json.dumps({"choices": [{"message": {"content": said}} if "messages" in body else {"text": said}]}).encode()
        status = {"busy": 429, "broken": 500}.get(trouble or "", 200)
        reply = b"<html>" if trouble == "garbage" else reply if status == 200 else b""
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)
        except OSError:  # the other side has given up
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield started
    started.over.set()
    started.shutdown()
    started.server_close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    source = config({"method": "digits", "train": 24, "size_px": 8})
    return ingest_all(source.build(), tmp_path_factory.mktemp("pairs") / "ingest", version="0")  # type: ignore[attr-defined]


def config(values: dict[str, Any]) -> Config:
    return catalogue.config_class(catalogue.find(str(values["method"]))).parse(values)


def captioned(pairs: PairDataset, server: Server, out: Path, values: dict[str, Any], block: str) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The training pairs with `before`, the captions that they came with; and the method's report."""
    address = {"base_url": f"http://127.0.0.1:{server.server_address[1]}/v1", "model": "tiny"}
    patience = {"timeout_s": TIMEOUT_S, "retries": RETRIES, "backoff_s": 0.01, "concurrency": 8}
    dataset = passes.run(
        pairs, [config({**values, block: {**address, **patience, **values.get(block, {})}})], "caption", out, seed=3,
        session=Session(in_process=True), scratch=out.parent / "scratch", code="c", version="0", progress=Progress(quiet=True), feature_specs={},
    )  # fmt: skip
    before = pairs.read(["key", "captions"]).rename({"captions": "before"})
    frame = dataset.read().filter(pl.col("split") == "train").join(before, on="key", maintain_order="left")
    assert frame.height == 24
    (report,) = dataset.manifest.phase.report.values()
    return frame, report


def check_asked(server: Server) -> int:
    """Requests in vain: there are some, each was asked again as often as allowed, and so was what worked at the second time."""
    assert 0 < server.hopeless < len(server.asked)
    assert {count for seed, count in server.asked.items() if seed % 3 == 0} == {RETRIES + 1}
    assert min(count for seed, count in server.asked.items() if seed % 3 == 1) == 2
    return server.hopeless


def test_a_picture_that_the_server_never_describes_keeps_its_captions(pairs: PairDataset, server: Server, tmp_path: Path) -> None:
    values = {"method": "cfg-captioning", "captioner": "endpoint", "place": "replace"}
    frame, report = captioned(pairs, server, tmp_path / "out", values, "endpoint")
    failed = check_asked(server)
    assert report == {"captioned": 24 - failed, "captions_failed": failed}
    without = frame.filter(pl.col("meta.captioning_dropped") == "failed")
    assert without.height == failed
    assert without["captions"].to_list() == without["before"].to_list()
    given = frame.filter(pl.col("meta.captioning_dropped").is_null())["captions"].list.last().struct.unnest()
    assert given["text"].str.starts_with("something new").all()


def test_a_caption_that_the_server_never_rewrites_stays_as_it_is(pairs: PairDataset, server: Server, tmp_path: Path) -> None:
    values = {"method": "laclip", "rewriter": "endpoint", "copies": 1}
    frame, report = captioned(pairs, server, tmp_path / "out", values, "endpoint")
    failed = check_asked(server)
    assert report == {"rewrites_empty": 0, "rewrites_failed": failed, "rewrites_identical": 0, "rewrites_long": 0}
    without = frame.filter(pl.col("meta.laclip_dropped").struct.field("failed") == 1)
    assert without.height == failed
    assert without["captions"].to_list() == without["before"].to_list()
    assert set(frame["captions"].list.len() - frame["before"].list.len()) == {0, 1}


def test_a_picture_that_is_never_described_for_veclip_keeps_its_alt_text(pairs: PairDataset, server: Server, tmp_path: Path) -> None:
    values = {"method": "veclip", "captioner": "endpoint", "rewriter": "none", "vision": {"api": "chat"}}
    frame, report = captioned(pairs, server, tmp_path / "out", values, "vision")
    failed = check_asked(server)
    assert report["captions_error"] == failed
    assert report["captions_ok"] == 24 - failed
    without = frame.filter(pl.col("meta.veclip_status") == "error")
    assert without["captions"].to_list() == without["before"].to_list()
