"""Against a real server on loopback that answers, refuses, is busy or talks nonsense, by the picture that it is asked about."""

from __future__ import annotations

import base64
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from diptych.caption.captioners import Picture
from diptych.caption.captioners.endpoint import EndpointCaptioner, VisionEndpointConfig, data_url
from diptych.core.errors import ConfigError, ResourceError

pytestmark = pytest.mark.server

Reply = tuple[int, dict[str, str], bytes]
PNG = b"\x89PNG"


def good(text: str) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request by `script(picture, how often it was asked before)`."""

    daemon_threads = True

    def __init__(self, script: Callable[[bytes, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.lock = script, threading.Lock()
        self.asked: Counter[bytes] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.paths: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        data = base64.b64decode(body["messages"][0]["content"][1]["image_url"]["url"].partition(",")[2])
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.paths.add(self.path)
            before = self.server.asked[data]
            self.server.asked[data] += 1
        status, headers, reply = self.server.script(data, before)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(reply))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[bytes, int], Reply]], Server]]:
    servers: list[Server] = []

    def start(script: Callable[[bytes, int], Reply]) -> Server:
        servers.append(Server(script))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def captioner(server: Server, waits: list[float] | None = None, **fields: Any) -> EndpointCaptioner:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    config = VisionEndpointConfig(base_url=url, model="tiny", timeout_s=5.0).model_copy(update=fields)
    return EndpointCaptioner(config, 3, sleep=(waits if waits is not None else []).append)


def pictures(count: int) -> list[Picture]:
    return [Picture(f"key-{index}", PNG + bytes([index])) for index in range(count)]


def test_every_picture_gets_its_answer_and_what_is_sent(serve: Any) -> None:
    server = serve(lambda data, _: good(f'\n "picture {data[-1]}" \nmore'))
    assert captioner(server).caption(pictures(9)) == [f"picture {index}" for index in range(9)]
    assert server.paths == {"/v1/chat/completions"}
    body = server.bodies[0]
    assert body["model"] == "tiny"
    assert body["temperature"] == 0
    assert body["messages"][0]["content"][0]["text"].startswith("Describe the picture")
    assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert len({body["seed"] for body in server.bodies}) == 9


def test_a_busy_server_is_asked_again_after_a_while_and_garbage_too(serve: Any) -> None:
    def script(data: bytes, before: int) -> Reply:
        if before == 0:
            return (429, {"Retry-After": "7"}, b"") if data[-1] == 0 else (200, {}, b"{garbage")
        return good("fine")

    waits: list[float] = []
    server = serve(script)
    assert captioner(server, waits).caption(pictures(2)) == ["fine", "fine"]
    assert 7.0 in waits


def test_what_fails_every_time_is_answered_none(serve: Any) -> None:
    server = serve(lambda data, _: good("fine") if data[-1] else (500, {}, b"broken"))
    assert captioner(server, retries=2).caption(pictures(3)) == [None, "fine", "fine"]
    assert server.asked[PNG + b"\x00"] == 3


def test_a_server_that_refuses_or_is_not_there_stops_the_run(serve: Any) -> None:
    server = serve(lambda *_: (401, {}, b"no key"))
    with pytest.raises(ConfigError, match="refuses to work"):
        captioner(server).caption(pictures(1))
    server.shutdown()
    server.server_close()
    with pytest.raises(ResourceError, match="cannot be reached"):
        captioner(server).caption(pictures(1))


def test_pictures_tell_their_type() -> None:
    kinds = [data_url(data).partition(";")[0] for data in (PNG, b"\xff\xd8\xff", b"GIF89a", b"RIFF....WEBP", b"?")]
    assert kinds == ["data:image/png", "data:image/jpeg", "data:image/gif", "data:image/webp", "data:application/octet-stream"]


def test_only_a_chat_can_be_asked_about_pictures() -> None:
    with pytest.raises(ConfigError):
        VisionEndpointConfig.parse({"base_url": "http://127.0.0.1:1/v1", "model": "tiny", "api": "completions"})
