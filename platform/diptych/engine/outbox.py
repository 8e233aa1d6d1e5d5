"""A run's record on its way to MLflow: written here first, sent when the server answers, lost never.

A driver writes its events into a journal of its own, one JSON line each, and holds the journal's lock while it lives. Events are
sent in order, and a journal that is sent whole is deleted. A journal without an owner was left by a driver that ended before the
server answered: whoever runs next adopts it. So drivers of one project never wait for each other, and none sends another's events.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

Event = Mapping[str, Any]

DIED = {"diptych.ended": "the driver ended without saying how; its record was completed by a later run"}


class Outbox:
    """The folder of journals. It is made by the first event."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, target: Mapping[str, Any]) -> Journal:
        """A new journal for events that are meant for `target`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = None
        while journal is None:  # an adopter may have found the empty file and taken it for a dead driver's
            journal = Journal.own(self.folder / f"{time.time_ns()}-{os.getpid()}-{new_id()[:8]}.jsonl")
        journal.add("open", target=dict(target), pid=os.getpid(), host=socket.gethostname())
        return journal

    def adopt(self) -> list[Journal]:
        """The journals that nobody owns any more, the oldest first. Runs that their driver left open are ended as KILLED."""
        owned = filter(None, map(Journal.own, sorted(self.folder.glob("*.jsonl"))))
        return [journal for journal in owned if journal.complete()]

    @property
    def behind(self) -> int:
        """Events of all journals that MLflow does not have yet."""
        return sum(_waiting(path, _state(path)["offset"]) for path in self.folder.glob("*.jsonl"))

    @property
    def refused(self) -> int:
        """Events that MLflow refused for good; they are kept in `refused`, with the reason."""
        path = self.folder / "refused"
        return _waiting(path, 0) if path.exists() else 0


class Journal:
    """One driver's events and how far they are sent. Safe for threads; owned by one process at a time."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        self._lock = threading.Lock()
        state = _state(path)
        self._offset: int = state["offset"]
        self.runs: dict[str, str] = state["runs"]

    @classmethod
    def own(cls, path: Path) -> Self | None:
        """The journal at a path, made if there is none; None when another process owns it."""
        file = path.open("ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        if os.fstat(file.fileno()).st_nlink == 0:  # sent and deleted by its owner while we waited
            file.close()
            return None
        return cls(path, file)

    @property
    def target(self) -> dict[str, Any]:
        """Where the events are meant to go."""
        with self.path.open(encoding="utf-8") as file:
            target: dict[str, Any] = json.loads(file.readline())["target"]
        return target

    def add(self, kind: str, **values: Any) -> None:
        """Appends an event; it is on disk when this returns."""
        line = json.dumps({"kind": kind, "time_ms": now_ms(), **values}) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def waiting(self) -> Iterator[tuple[int, Event]]:
        """Events not yet sent, each with the offset behind it; a line that is no event is a `damaged` one."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                yield file.tell(), _parsed(line)

    def mark(self, offset: int) -> None:
        """Records, atomically, that everything before `offset` is sent, and which MLflow run each of ours became."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"offset": offset, "runs": self.runs}))
        partial.replace(self.path.with_suffix(".sent"))
        self._offset = offset

    def refuse(self, event: Event, reason: str) -> None:
        """Puts an event aside that MLflow will never take, so that those behind it can go."""
        with (self.path.parent / "refused").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"reason": reason, "target": self.target, **event}) + "\n")

    @property
    def behind(self) -> int:
        """Events that MLflow does not have yet."""
        return _waiting(self.path, self._offset)

    def complete(self) -> bool:
        """Ends what a dead driver left open: cuts a half-written line, ends its runs. False when nothing was recorded at all."""
        size = self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(size)
        if size == 0:
            self.close()
            return False
        events = [_parsed(line) for line in self.path.read_bytes().splitlines()]
        ended = {event["run"] for event in events if event["kind"] == "end"}
        for run in [event["run"] for event in events if event["kind"] == "start"]:
            if run not in ended:
                self.add("tags", run=run, values=DIED)
                self.add("end", run=run, status="KILLED", time_ms=events[-1].get("time_ms", now_ms()))
        return True

    def close(self) -> None:
        """Gives the journal up; one that is sent whole is deleted."""
        if self.behind == 0:
            self.path.with_suffix(".sent").unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self._file.close()


def _parsed(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) and "kind" in event else {"kind": "damaged", "line": line.decode(errors="replace")}


def _state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.with_suffix(".sent").read_text())
    except FileNotFoundError:
        return {"offset": 0, "runs": {}}
    return state


def _waiting(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return sum(line.endswith(b"\n") for line in file)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """A name for a run before MLflow has given it one."""
    return uuid.uuid4().hex
