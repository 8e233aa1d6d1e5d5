from __future__ import annotations

import pytest

from diptych.train.clock import ADVICE, Clock


@pytest.mark.parametrize(
    ("spent", "limit"),
    [
        ({"step": 3, "data_wait": 1, "sync": 1, "decode": 9}, "step"),
        ({"step": 1, "data_wait": 3, "sync": 1, "decode": 2, "read": 1}, "decode"),
        ({"step": 1, "data_wait": 3, "sync": 1, "decode": 1, "read": 2}, "data wait"),
        ({"step": 1, "data_wait": 1, "sync": 3}, "synchronise"),
    ],
)
def test_the_limit_is_where_most_time_goes(spent: dict[str, float], limit: str) -> None:
    clock = Clock()
    for activity, seconds in spent.items():
        clock.add(activity, seconds)
    assert clock.limit() == limit
    assert ADVICE[limit].endswith(".")


def test_windows_start_anew_and_totals_do_not() -> None:
    clock = Clock()
    clock.add("step", 1.0)
    with clock("step"):
        pass
    assert clock.window()["step"] >= 1.0
    clock.add("step", 2.0)
    assert clock.window()["step"] == 2.0
    assert clock.window()["step"] == 0.0
    assert clock.total_s["step"] >= 3.0
    assert clock.wall_s > 0


def test_time_counts_when_the_body_fails() -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock("sync"):
        raise KeyError
    assert clock.total_s["sync"] > 0
