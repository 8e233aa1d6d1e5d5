"""What a person reads while a phase runs."""

from __future__ import annotations

import io

import pytest

from diptych.engine import progress


class Clock:
    """A clock that stands until it is moved."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(clock: Clock, at: list[tuple[float, float]], total: float) -> list[str]:
    """The lines of a phase that has `done` at a number of seconds after its start."""
    shown = progress.Progress(stream=io.StringIO())
    shown.start("train")
    for now_s, done in at:
        clock.now_s = now_s
        shown.update(done, total, "steps")
    assert isinstance(shown.stream, io.StringIO)
    return shown.stream.getvalue().splitlines()[1:]


def test_what_is_left_follows_the_pace_of_the_work_and_not_the_start_of_workers(clock: Clock) -> None:
    assert lines_of(clock, [(20, 0), (40, 10)], 100) == ["train      10% steps [40.0 s, about 3 min 00 s left]"]


def test_what_a_resumed_phase_found_done_is_not_its_pace(clock: Clock) -> None:
    assert lines_of(clock, [(10, 90), (40, 95)], 100) == ["train      95% steps [40.0 s, about 30.0 s left]"]


def test_nothing_is_foretold_from_hardly_any_work(clock: Clock) -> None:
    assert lines_of(clock, [(1, 0), (40, 1)], 100) == ["train       1% steps [40.0 s]"]


def test_a_line_comes_every_half_minute_without_a_terminal(clock: Clock) -> None:
    assert len(lines_of(clock, [(second, second) for second in range(100)], 100)) == 3


def test_a_phase_without_a_size_says_how_long_it_has_run(clock: Clock) -> None:
    assert lines_of(clock, [(1, 0), (40, 0)], 0) == ["train       0% steps [40.0 s]"]
