"""Against a real server on loopback that is slow, busy, broken or talking nonsense, by what the prompt's caption asks for."""

import base64
import io
import json
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from diptych.caption.rewriters import Request
from diptych.caption.rewriters.endpoint import EndpointConfig, EndpointRewriter, completion, retry_after_s
from diptych.core.errors import ConfigError, ResourceError

pytestmark = pytest.mark.server

Reply = tuple[int, dict[str, str], bytes]


def good(text: str) -> Reply:
    return 200, {}, json.dumps({"choices": [{"index": 0, "text": text}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request by `script(caption, how often it was asked before)` and remembers what it saw."""

    daemon_threads = True

    def __init__(self, script: Callable[[str, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        caption = prompt.rpartition("\n")[2].strip().removesuffix("=>").strip()
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            before = self.server.asked[caption]
            self.server.asked[caption] += 1
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        status, headers, reply = self.server.script(caption, before)
        with self.server.lock:
            self.server.in_flight -= 1
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(reply))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, int], Reply]], Server]]:
    servers: list[Server] = []

    def start(script: Callable[[str, int], Reply]) -> Server:
        servers.append(Server(script))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def rewriter(url: str, waits: list[float] | None = None, **fields: Any) -> EndpointRewriter:
    config = EndpointConfig(base_url=url, model="tiny", backoff_s=0.5, timeout_s=5.0).model_copy(update=fields)
    return EndpointRewriter(config, 0, ("plain", "rich"), sleep=(waits if waits is not None else []).append)


def requests(*captions: str) -> list[Request]:
    return [Request(f"key-{index}", index % 2, caption) for index, caption in enumerate(captions)]


def test_answers_come_in_order_whatever_order_the_server_takes(serve: Any) -> None:
    def script(caption: str, _: int) -> Reply:
        time.sleep(0.05 if caption.endswith("0") else 0)
        return good(f" {caption} rewritten\n\nnext => line")

    server = serve(script)
    captions = [f"caption {index}" for index in range(25)]
    assert rewriter(server.url, concurrency=5).rewrite(requests(*captions)) == [f"{caption} rewritten" for caption in captions]
    assert 1 < server.most_in_flight <= 5


def test_what_is_sent(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda *_: good("fine"))
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    rewriter(server.url, api_key_env="SECRET_KEY").rewrite(requests("a cat"))
    [(path, headers, body)] = server.seen
    assert path == "/v1/completions"
    assert headers["Authorization"] == "Bearer s3cret"
    assert body["prompt"].startswith("write image captions differently,\n\n            ")
    assert body["prompt"].endswith("\n            a cat =>")
    wanted = {"model": "tiny", "temperature": 0.9, "top_p": 0.95, "max_tokens": 77, "stop": ["\n"]}
    assert {name: body[name] for name in wanted} == wanted
    assert 0 <= body["seed"] < 2**31


def test_seed_and_examples_are_named_by_key_and_copy(serve: Any) -> None:
    server = serve(lambda *_: good("fine"))
    ask = rewriter(server.url)
    for request in [Request("a", 0, "cat"), Request("a", 0, "cat"), Request("a", 1, "cat"), Request("b", 0, "cat")]:
        pickle.loads(pickle.dumps(EndpointRewriter(ask.config, ask.seed, ask.examples))).rewrite([request])
    bodies = [(body["seed"], body["prompt"]) for *_, body in server.seen]
    assert bodies[0] == bodies[1]
    assert len({seed for seed, _ in bodies}) == len({prompt for _, prompt in bodies}) == 3


def test_chat_servers(serve: Any) -> None:
    server = serve(lambda *_: (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": '"A feline."'}}]}).encode()))
    assert rewriter(server.url, api="chat").rewrite(requests("a cat")) == ["A feline."]
    assert server.seen[0][0] == "/v1/chat/completions"


@pytest.mark.parametrize(
    "trouble",
    [
        (500, {}, b"oops"),
        (503, {}, b""),
        (429, {}, b"slow down"),
        (200, {}, b"<html>not json"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"text": 3}]}'),
        (200, {}, b"[" * 100_000),
        good("  \n "),
    ],
)
def test_trouble_that_passes_is_retried_and_trouble_that_stays_is_reported(serve: Any, trouble: Reply) -> None:
    server = serve(lambda caption, before: trouble if caption == "hopeless" or before < 2 else good("better now"))
    waits: list[float] = []
    assert rewriter(server.url, waits, retries=3, concurrency=1).rewrite(requests("cat", "hopeless")) == ["better now", None]
    assert server.asked == {"cat": 3, "hopeless": 4}
    backoffs = [wait for wait in waits if wait]
    assert all(0.75 <= wait / expected <= 1.25 for wait, expected in zip(backoffs, (0.5, 1, 0.5, 1, 2), strict=True))


def test_a_server_that_hangs_is_given_up_after_the_timeout(serve: Any) -> None:
    def script(caption: str, before: int) -> Reply:
        if caption == "slow" or before == 0:
            time.sleep(0.6)
        return good("awake")

    server = serve(script)
    start = time.monotonic()
    assert rewriter(server.url, timeout_s=0.2, retries=1).rewrite(requests("slow", "drowsy")) == [None, "awake"]
    assert time.monotonic() - start < 3


def test_retry_after_is_honoured(serve: Any) -> None:
    server = serve(lambda _, before: (429, {"Retry-After": "7"}, b"") if before == 0 else good("thanks"))
    waits: list[float] = []
    assert rewriter(server.url, waits).rewrite(requests("cat")) == ["thanks"]
    assert waits == [0.0, 7.0]


def test_a_server_that_asks_for_too_long_a_wait_is_given_up(serve: Any) -> None:
    server = serve(lambda *_: (429, {"Retry-After": "3600"}, b""))
    waits: list[float] = []
    assert rewriter(server.url, waits).rewrite(requests("cat")) == [None]
    assert waits == [0.0]
    assert server.asked["cat"] == 1


def test_a_bad_request_is_not_repeated(serve: Any) -> None:
    server = serve(lambda caption, _: (400, {}, b"context too long") if caption == "long" else good("fine"))
    assert rewriter(server.url).rewrite(requests("long", "short")) == [None, "fine"]
    assert server.asked["long"] == 1


@pytest.mark.parametrize(("status", "word"), [(401, "api_key_env"), (403, "key that may"), (404, "model")])
def test_a_refusal_stops_the_run_and_says_what_to_mend(serve: Any, status: int, word: str) -> None:
    server = serve(lambda *_: (status, {}, b'{"error": "nope"}'))
    with pytest.raises(ConfigError, match=f"(?s)HTTP {status}.*nope.*{word}"):
        rewriter(server.url).rewrite(requests(*"abcdef"))


@pytest.mark.parametrize("value", ["", "s3c\nret", "s3crét"])
def test_an_unusable_key_is_named_and_never_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ConfigError, match="SOME_KEY") as error:
        rewriter("http://127.0.0.1:9/v1", api_key_env="SOME_KEY").rewrite(requests("cat"))
    assert "s3c" not in str(error.value)


def test_a_server_that_is_down_is_reported_in_a_sentence(serve: Any) -> None:
    server = serve(lambda *_: good("fine"))
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ResourceError, match=r"(?s)cannot be reached.*127\.0\.0\.1"):
        rewriter(url).rewrite(requests("cat"))
    assert rewriter(url).rewrite([]) == []


def test_a_server_that_goes_away_stops_the_run(serve: Any) -> None:
    server = serve(lambda *_: good("fine"))
    ask = rewriter(server.url, retries=1)
    assert ask.rewrite(requests("cat")) == ["fine"]
    server.shutdown()
    server.server_close()
    with pytest.raises(ResourceError, match="no longer accepts connections"):
        ask.rewrite(requests("cat"))


def test_a_model_that_never_says_anything_usable_stops_the_run(serve: Any) -> None:
    server = serve(lambda *_: good(""))
    with pytest.raises(ResourceError, match="nothing usable"):
        rewriter(server.url, retries=0).rewrite(requests(*map(str, range(32))))
    assert rewriter(server.url, retries=0).rewrite(requests(*map(str, range(31)))) == [None] * 31


def test_a_megabyte_caption_is_cut_like_a_long_prompt(serve: Any) -> None:
    server = serve(lambda *_: good("fine"))
    assert rewriter(server.url).rewrite(requests("word " * 200_000)) == ["fine"]
    prompt = server.seen[0][2]["prompt"]
    assert len(prompt) == 2000
    assert prompt.endswith(" =>")


@pytest.mark.parametrize(
    "body", [b"", b"null", b"3", b'{"choices": {}}', b'{"choices": [{}]}', b'{"choices": [{"message": null}]}', b"\xff"]
)
def test_malformed_replies_read_as_nothing(body: bytes) -> None:
    assert completion(body) == ""


def test_retry_after_in_both_forms() -> None:
    def headers(value: str) -> Any:
        message = Message()
        message["Retry-After"] = value
        return message

    assert retry_after_s(headers("12")) == 12
    assert retry_after_s(headers(formatdate(1000, usegmt=True)), now_s=970) == 30
    assert retry_after_s(headers(formatdate(1000, usegmt=True)), now_s=2000) == 0
    assert retry_after_s(headers("soon")) == 0
    assert retry_after_s(Message()) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "127.0.0.1:8000",
        "http://",
        "http://user:pw@host/v1",
        "http://host/v1?key=1",
        "file:///etc/passwd",
        "http://host:port/v1",
        "http://höst/v1",
    ],
)
def test_only_plain_web_addresses_are_accepted(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        EndpointConfig.parse({"base_url": url, "model": "m"})


def test_a_prompt_of_its_own_is_sent_as_it_stands_and_a_picture_with_it() -> None:
    file = io.BytesIO()
    Image.new("L", (7, 5)).save(file, "PNG")
    picture = file.getvalue()
    chat = EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m", api="chat").build(0)
    (message,) = json.loads(chat._body(Request("k", 0, "", prompt="what is it?", picture=picture)))["messages"]
    text, image = message["content"]
    assert text == {"type": "text", "text": "what is it?"}
    assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(picture).decode()
    plain = EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m").build(0)
    assert json.loads(plain._body(Request("k", 0, "a caption", prompt="one sentence of two")))["prompt"] == "one sentence of two"
