"""Rewrites captions through a language model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, a hosted one."""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from diptych.caption.rewriters import Request
from diptych.caption.rewriters.prompts import ARROW, EXAMPLE_SETS, ExampleSet, build_prompt, parse, shots
from diptych.core.chance import key_hash, mix, uniform
from diptych.core.config import Config
from diptych.core.errors import ConfigError, DiptychError, ResourceError, shorten
from diptych.pairs.image import probe

WEB_ADDRESS = r"^https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/%+-]*)?$"
MAX_BODY_BYTES = 1 << 20
REFUSED = {
    HTTPStatus.UNAUTHORIZED: "set the variable that api_key_env names to a valid key",
    HTTPStatus.FORBIDDEN: "use a key that may call this model",
    HTTPStatus.NOT_FOUND: "check base_url (it usually ends in /v1), model, and api (completions or chat)",
}
NO_ANSWER, UNREACHABLE = 0, -1  # in place of an HTTP status: time-out or broken connection; nobody listens
HOPELESS = 32  # so many requests of one batch in vain are no bad luck
DOWN = "The language model's server cannot be reached"
BUSY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


class EndpointConfig(Config):
    """A server, the model on it, how to sample, and how patient to be. Sampling defaults are the paper's."""

    base_url: str = Field(pattern=WEB_ADDRESS, description="where the API begins, e.g. http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="the model's name as the server knows it")
    api: Literal["completions", "chat"] = Field(
        "completions", description="completions continues the prompt, as in the paper; chat asks for it"
    )
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="name of the environment variable that holds the key"
    )
    temperature: float = Field(0.9, ge=0, le=2, description="sampling temperature")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling: share of the probability to sample from")
    max_tokens: int = Field(77, ge=1, le=4096, description="most new tokens a rewrite")
    max_prompt_chars: int = Field(2000, ge=400, description="a longer prompt is cut, as the paper cuts at 512 tokens")
    timeout_s: float = Field(60.0, gt=0, description="seconds without an answer, or without progress of one, before a request is given up")
    retries: int = Field(4, ge=0, le=20, description="further attempts after one that failed or gave nothing usable")
    backoff_s: float = Field(1.0, gt=0, description="seconds before the first retry; doubles each time")
    max_wait_s: float = Field(60.0, gt=0, description="longest wait in seconds before a retry; a server that asks for more is given up on")
    concurrency: int = Field(8, ge=1, le=256, description="requests in flight at a time, per worker")

    def build(self, seed: int, examples: Sequence[ExampleSet] = EXAMPLE_SETS) -> EndpointRewriter:
        """The rewriter; copy k is prompted with the example set `k mod len(examples)`. Talks to nobody yet."""
        return EndpointRewriter(self, seed, examples)


@dataclass(frozen=True)
class Reply:
    """An HTTP reply, its body cut at one MiB; or, by a status of ours, that there was none."""

    status: int
    headers: http.client.HTTPMessage = field(default_factory=http.client.HTTPMessage)
    body: bytes = b""


class EndpointRewriter:
    """Asks the server for every rewrite on its own, several at a time. What fails after all retries is answered None."""

    def __init__(
        self, config: EndpointConfig, seed: int, examples: Sequence[ExampleSet], sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.config = config
        self.seed = seed
        self.examples = tuple(examples)
        self._sleep = sleep
        self._greeted = False

    def rewrite(self, requests: Sequence[Request]) -> list[str | None]:
        """One answer a request, in order.

        Raises:
            ResourceError: the server cannot be reached, at the start or later, or answers 32 requests or more without one usable rewrite.
            ConfigError: the server refuses the key, the model or the address, or the key's variable is not set.
        """
        if not requests:
            return []
        headers = self._headers()
        self._greet()
        with ThreadPoolExecutor(min(self.config.concurrency, len(requests))) as pool:
            answers = list(pool.map(partial(self._one, headers=headers), requests))
        if len(answers) >= HOPELESS and not any(answers):
            raise self._unusable(
                "The language model's server gives nothing usable", f"<{len(answers)} requests, all in vain>", "check the model"
            )
        return answers

    def _greet(self) -> None:
        """Makes sure, once, that somebody listens, before a thousand requests wait for their time-outs."""
        if not self._greeted:
            try:
                with closing(self._connect()) as connection:
                    connection.connect()
            except (OSError, OverflowError) as error:  # overflow: a port that does not exist
                raise self._unusable(DOWN, f"<{error}>", "start it, or correct base_url") from None
            self._greeted = True

    def _one(self, request: Request, headers: dict[str, str]) -> str | None:
        body = self._body(request)
        status, wait_s = NO_ANSWER, 0.0
        for attempt in range(self.config.retries + 1):
            if wait_s > self.config.max_wait_s:
                return None
            self._sleep(wait_s)
            reply = self._post(body, headers)
            status = reply.status
            text = self._read(reply, request)
            if text or not _worth_retrying(status):
                return text or None
            wait_s = max(self._backoff_s(request, attempt), retry_after_s(reply.headers))
        if status == UNREACHABLE:
            raise self._unusable(DOWN, "<it no longer accepts connections>", "start it again; the run goes on where it stopped")
        return None

    def _read(self, reply: Reply, request: Request) -> str:
        """The rewrite in a reply, "" if there is none. Raises ConfigError for a refusal that will not change by waiting."""
        if reply.status in REFUSED:
            said = f"<HTTP {reply.status}: {shorten(reply.body.decode(errors='replace'))}>"
            fix = REFUSED[HTTPStatus(reply.status)]
            raise ConfigError.at("The language model's server refuses to work", self.config.base_url, said, "HTTP 200", fix)
        return parse(completion(reply.body), request.source) if reply.status == HTTPStatus.OK else ""

    def _body(self, request: Request) -> bytes:
        config, prompt = self.config, request.prompt or self._prompt(request)
        fields: dict[str, Any] = {
            "model": config.model,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_tokens,
        }
        fields["seed"] = int(mix(self.seed, key_hash(request.key), request.copy)) & 0x7FFFFFFF
        if config.api == "chat":
            fields["messages"] = [{"role": "user", "content": prompt if request.picture is None else shown(prompt, request.picture)}]
        else:
            assert request.picture is None, "pictures are for chats"
            fields |= {"prompt": prompt, "stop": ["\n"]}
        return json.dumps(fields).encode()

    def _prompt(self, request: Request) -> str:
        """Three example pairs and the caption, cut to the longest prompt allowed."""
        pairs = shots(self.examples[request.copy % len(self.examples)], self.seed, request.key, request.copy)
        prompt = build_prompt(pairs, request.source)
        if len(prompt) > self.config.max_prompt_chars:
            prompt = f"{prompt[: self.config.max_prompt_chars - len(ARROW) - 1]} {ARROW}"
        return prompt

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        name = self.config.api_key_env
        if name is not None:
            key = os.environ.get(name, "").strip()
            if not (key and key.isascii() and key.isprintable()):  # the value itself must never be shown
                raise ConfigError.at(
                    "The key of the language model's server is not set", "caption.endpoint.api_key_env", name, f"a key in ${name}"
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _connect(self) -> http.client.HTTPConnection:
        url = urlsplit(self.config.base_url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        return kind(url.netloc, timeout=self.config.timeout_s)

    def _post(self, body: bytes, headers: dict[str, str]) -> Reply:
        path = urlsplit(self.config.base_url).path.rstrip("/") + ("/chat/completions" if self.config.api == "chat" else "/completions")
        try:
            with closing(self._connect()) as connection:
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                return Reply(response.status, response.headers, response.read(MAX_BODY_BYTES))
        except ConnectionRefusedError:
            return Reply(UNREACHABLE)
        except (OSError, http.client.HTTPException):
            return Reply(NO_ANSWER)

    def _backoff_s(self, request: Request, attempt: int) -> float:
        """Doubling waits, spread by a quarter so that parallel requests do not return together."""
        spread = 0.75 + 0.5 * float(uniform(self.seed, key_hash(request.key), request.copy, attempt))
        return min(self.config.backoff_s * 2.0**attempt * spread, self.config.max_wait_s)

    def _unusable(self, headline: str, got: str, fix: str) -> DiptychError:
        return ResourceError.at(headline, self.config.base_url, got, "a server that answers", fix)


def shown(prompt: str, picture: bytes) -> list[dict[str, Any]]:
    """A chat message of a text and an encoded picture. Raises Fault for bytes that are no picture."""
    kind = probe(picture).format.lower()
    address = f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
    return [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": address}}]


def completion(body: bytes) -> str:
    """The text of the first choice in a completions or chat reply; "" for anything else, however malformed."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return text if isinstance(text, str) else ""


def retry_after_s(headers: http.client.HTTPMessage, now_s: float | None = None) -> float:
    """Seconds that a `Retry-After` header asks for, given as seconds or as a date; 0 without one or with one that cannot be read."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment_s = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, moment_s - (time.time() if now_s is None else now_s))


def _worth_retrying(status: int) -> bool:
    """A busy or broken server may recover, and a model may say something better next time; a bad request stays bad."""
    return status <= NO_ANSWER or status == HTTPStatus.OK or status in BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR
