"""Captions through a vision-language model behind an OpenAI-compatible server; pictures travel as data URLs in a chat.

The HTTP, the back-off and what counts as hopeless are those of the rewriters (`caption/rewriters/endpoint.py`).
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from pydantic import Field

from diptych.caption.captioners import Picture
from diptych.caption.rewriters import Request
from diptych.caption.rewriters.endpoint import EndpointConfig, EndpointRewriter, Reply, completion
from diptych.core.chance import key_hash, mix

PROMPT = "Describe the picture in one short, specific sentence. Answer with the sentence alone."
KINDS = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))


class VisionEndpointConfig(EndpointConfig):
    """A server, the vision-language model on it, what to ask, and how patient to be."""

    api: Literal["chat"] = Field("chat", description="pictures can only be asked about in a chat")
    temperature: float = Field(0.0, ge=0, le=2, description="sampling temperature")
    prompt: str = Field(PROMPT, min_length=1, max_length=4000, description="what is asked of every picture")

    def caption_with(self, seed: int) -> EndpointCaptioner:
        """The captioner. Talks to nobody yet."""
        return EndpointCaptioner(self, seed)


@dataclass(frozen=True)
class Question(Request):
    """A picture on its way to the server."""

    data: bytes = b""


class EndpointCaptioner(EndpointRewriter):
    """Asks the server about every picture on its own, several at a time. What fails after all retries is answered None."""

    config: VisionEndpointConfig

    def __init__(self, config: VisionEndpointConfig, seed: int, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(config, seed, (), sleep)

    def caption(self, pictures: Sequence[Picture]) -> list[str | None]:
        """One answer a picture, in order. Raises ResourceError and ConfigError as `EndpointRewriter.rewrite` does."""
        return self.rewrite([Question(picture.key, 0, "", data=picture.data) for picture in pictures])

    def _read(self, reply: Reply, request: Request) -> str:
        if reply.status != HTTPStatus.OK:
            return super()._read(reply, request)
        lines = (line.strip().strip('"').strip() for line in completion(reply.body).splitlines())
        return next(filter(None, lines), "")

    def _body(self, request: Request) -> bytes:
        assert isinstance(request, Question)
        config = self.config
        content = [{"type": "text", "text": config.prompt}, {"type": "image_url", "image_url": {"url": data_url(request.data)}}]
        fields: dict[str, Any] = {
            "model": config.model,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_tokens,
            "seed": int(mix(self.seed, key_hash(request.key), request.copy)) & 0x7FFFFFFF,
            "messages": [{"role": "user", "content": content}],
        }
        return json.dumps(fields).encode()


def data_url(data: bytes) -> str:
    """An encoded picture as a `data:` URL, of the type that its first bytes tell."""
    kind = next((kind for magic, kind in KINDS if data.startswith(magic)), "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
