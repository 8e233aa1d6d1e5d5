"""Word that this process, or a node of the training, will be taken away: save what there is, and stop if it is this process that ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ASK_EVERY = 20
"""Steps between two questions to Ray about preemption: each is a barrier of all workers."""


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGTERM to this process only sets a flag; gives what reads it. A second one does what it did before.

    In a thread other than the main one signals stay as they are, and the answer is always no.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGTERM)
    if before in (signal.SIG_IGN, None):  # `nohup`; or set by C, which Python cannot put back
        yield asked.is_set
        return

    def note(number: int, frame: Any) -> None:
        del number, frame
        asked.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def preemption() -> Callable[[], bool]:
    """Whether Ray has word that a node of this training will be taken away, once for each word; for a worker of Ray Train.

    Every worker must ask equally often. Where Ray does not watch for it, the answer is always no.
    """
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") == "0":
        return lambda: False
    from ray.train import get_preemption_info

    return Preemption(get_preemption_info)


class Preemption:
    """Asks in every twentieth call, and says yes once for each word of a new node."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask, self._calls = ask, 0
        self._told: frozenset[str] = frozenset()

    def __call__(self) -> bool:
        """Whether there is new word."""
        self._calls += 1
        if self._calls % ASK_EVERY:
            return False
        info = self._ask()
        nodes = frozenset() if info is None else frozenset(info.preempted_node_ids)
        new, self._told = nodes - self._told, nodes
        return bool(new)
