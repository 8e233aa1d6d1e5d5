"""Progress as a person reads it: one line a phase in a terminal, a plain line every 30 s without one."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

PLAIN_EVERY_S = 30.0
TERMINAL_EVERY_S = 0.1


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class Progress:
    """Prints the state of the phase at hand; `quiet` prints nothing.

    One object a run: `start(phase)`, any number of `update(…)`, `done(…)`.
    """

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    quiet: bool = False
    phase: str = ""
    _started: float = 0.0
    _printed: float = 0.0
    _first: tuple[float, float] | None = None

    @property
    def terminal(self) -> bool:
        """Whether lines can be rewritten in place."""
        return self.stream.isatty()

    def start(self, phase: str, text: str = "") -> None:
        """A phase begins."""
        self.phase, self._started, self._printed, self._first = phase, time.monotonic(), time.monotonic(), None
        self._print(f"{phase:<9} {text or 'starting'}", final=False)

    def update(self, done: float, total: float, text: str = "") -> None:
        """`done` of `total` units; printed only when the time for the next line has come.

        What is left is foretold from the pace since the phase's first word: neither workers that start nor what a resumed phase found
        done is work.
        """
        now = time.monotonic()
        since, before = self._first = self._first or (now, done)
        if now - self._printed < (TERMINAL_EVERY_S if self.terminal else PLAIN_EVERY_S):
            return
        self._printed = now
        share = min(1.0, done / total) if total else 0.0
        elapsed = now - self._started
        paced = done - before > 0.02 * (total - before)
        left = f", about {duration((now - since) * (total - done) / (done - before))} left" if paced else ""
        self._print(f"{self.phase:<9} {share:4.0%} {text} [{duration(elapsed)}{left}]", final=False)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(text, final=True)

    def cached(self, phase: str, text: str) -> None:
        """A phase that has nothing to do."""
        self._print(f"{phase:<9} cached: {text}", final=True)

    def done(self, text: str, seconds: float | None = None) -> None:
        """The phase ended; the line stays. `seconds` is what it took by its own figures, without what is measured and recorded around it."""
        took = time.monotonic() - self._started if seconds is None else seconds
        self._print(f"{self.phase:<9} {text} [{duration(took)}]", final=True)

    def _print(self, text: str, *, final: bool) -> None:
        if self.quiet:
            return
        if self.terminal:
            self.stream.write(f"\r\033[K{text}" + ("\n" if final else ""))
        else:
            self.stream.write(text + "\n")
        self.stream.flush()
