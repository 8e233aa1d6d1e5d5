"""Where a run's time goes, and which part of it limits the run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = {
    "data wait": "The model waits for bytes: bring the shards nearer, or raise loader_workers.",
    "decode": "The model waits for pixels: raise loader_workers, store pictures smaller, or raise cache_bytes so that they stay decoded.",
    "step": "The model computes most of the time, as it should: more workers, bf16 or a smaller model make it faster.",
    "synchronise": "Workers wait for each other's gradients: raise batch_size, or use fewer workers or a faster network.",
}


class Clock:
    """Adds up seconds by activity (`data_wait`, `read`, `decode`, `step`, `sync`, `checkpoint`), for the run and for the window since
    the last `window()`. Reading and decoding may happen in other threads, so only the other four add up to the wall time."""

    def __init__(self) -> None:
        self.total_s: defaultdict[str, float] = defaultdict(float)
        self._window_s: defaultdict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Times the body of a `with`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(activity, time.perf_counter() - started)

    def add(self, activity: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere."""
        self.total_s[activity] += seconds
        self._window_s[activity] += seconds

    def window(self) -> defaultdict[str, float]:
        """Seconds by activity since the last call, and starts a new window."""
        window, self._window_s = self._window_s, defaultdict(float)
        return window

    @property
    def wall_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    def limit(self) -> str:
        """What took most of the time: `data wait`, `decode`, `step` or `synchronise`. Waiting for data is put down to decoding if
        decoding took longer than reading."""
        spent = self.total_s
        largest = max(("step", "data_wait", "sync"), key=lambda activity: spent[activity])
        if largest == "data_wait":
            return "decode" if spent["decode"] > spent["read"] else "data wait"
        return {"step": "step", "sync": "synchronise"}[largest]
