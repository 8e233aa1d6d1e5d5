"""A run's record on its way to MLflow: written here first, sent when the server answers, lost never.

Every event is one JSON line in `events.jsonl`; `sent` counts the lines that MLflow has. Sending goes in order, so a server
that was down for an hour, or a driver that was killed, only makes the record late.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Outbox:
    """An append-only queue of tracking events in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._events = folder / "events.jsonl"
        self._sent = folder / "sent.json"

    def add(self, kind: str, **values: Any) -> None:
        """Appends an event; it is on disk when this returns."""
        line = json.dumps({"kind": kind, "time_ms": time.time_ns() // 1_000_000, **values}, ensure_ascii=False)
        with self._events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def waiting(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Events not yet sent, with their positions. A half-written last line is left for later."""
        if not self._events.exists():
            return
        done = self.state()["sent"]
        with self._events.open(encoding="utf-8") as file:
            for position, line in enumerate(file):
                if position >= done and line.endswith("\n"):
                    yield position, json.loads(line)

    def state(self) -> dict[str, Any]:
        """How many events are sent, and which MLflow run each of ours became."""
        if self._sent.exists():
            state: dict[str, Any] = json.loads(self._sent.read_text())
            return state
        return {"sent": 0, "runs": {}}

    def mark(self, state: Mapping[str, Any]) -> None:
        """Records progress atomically."""
        partial = self._sent.with_suffix(".partial")
        partial.write_text(json.dumps(state))
        partial.replace(self._sent)

    @property
    def behind(self) -> int:
        """Events that MLflow does not have yet."""
        return sum(1 for _ in self.waiting())


def new_id() -> str:
    """A name for a run before MLflow has given it one."""
    return uuid.uuid4().hex
