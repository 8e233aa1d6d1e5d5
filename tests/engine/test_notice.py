"""Word of an end: SIGTERM in process, and Ray's notice of preemption."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from diptych.engine import notice, training
from diptych.engine.session import Session

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    """Counts the SIGTERMs that reach the handler that was there before."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_the_first_signal_sets_a_flag_and_the_second_does_what_it_did_before(terminated: list[int]) -> None:
    with notice.termination() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        assert terminated == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated == [signal.SIGTERM]
    with notice.termination() as asked:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert not asked()
    assert len(terminated) == 2


def test_another_thread_leaves_signals_alone(terminated: list[int]) -> None:
    answers: list[bool] = []

    def ask() -> None:
        with notice.termination() as asked:
            answers.append(asked())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_each_word_of_preemption_is_told_once() -> None:
    words = iter([None, ["a"], ["a"], ["a", "b"], None])
    asked = notice.Preemption(lambda: None if (nodes := next(words)) is None else SimpleNamespace(preempted_node_ids=nodes))
    answers = [asked() for _ in range(5 * notice.ASK_EVERY)]
    told = [index // notice.ASK_EVERY for index, answer in enumerate(answers) if answer]
    assert told == [1, 3]


def test_a_session_without_the_watcher_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    assert not any(notice.preemption()() for _ in range(3 * notice.ASK_EVERY))


def test_sigterm_in_process_leaves_a_checkpoint_of_its_step_and_no_model(tmp_path: Path, terminated: list[int]) -> None:
    from tiny import write_dataset

    from diptych.train.config import TrainConfig

    write_dataset(tmp_path / "data", rows=40)
    config = TrainConfig.parse({"steps": 100_000, "batch_size": 16, "log_every": 1, "checkpoint_every_s": 1e6})
    job = training.Job(
        tmp_path / "data", config, "vit-micro-40", "random", {"method": "clip"}, {"method": "adamw", "lr": 1e-4},
        tmp_path / "model", tmp_path / "scratch", 0, 1,
    )  # fmt: skip

    def end() -> None:
        while not training.last_record(tmp_path / "scratch" / "steps.jsonl"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        training.run(job, Session(in_process=True))
    assert terminated == []
    last = training.last_record(tmp_path / "scratch" / "steps.jsonl")
    assert last is not None
    assert (tmp_path / "scratch" / "checkpoints" / f"step-{last['step']:09d}" / "state.json").exists()
    assert not (tmp_path / "model").exists()
