from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from diptych.core.errors import ConfigError
from diptych.train.schedule import ScheduleConfig, constant_with_cooldown, cosine, laclip_schedule

VECTORS = Path(__file__).parents[1] / "golden" / "vectors"


def test_cosine_meets_its_corners() -> None:
    rates = [cosine(step, 1.0, 10, 110, final_lr=0.1) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_constant_decays_over_its_last_steps_only() -> None:
    rates = [constant_with_cooldown(step, 1.0, 5, 100, 20, 2.0, 0.2) for step in range(101)]
    assert rates[4:81] == [1.0] * 77
    assert rates[90] == pytest.approx(0.25 * 0.8 + 0.2)
    assert rates[100] == pytest.approx(0.2)
    assert constant_with_cooldown(99, 1.0, 0, 100, 0) == 1.0


def test_laclip_warms_up_with_both_ends() -> None:
    table = laclip_schedule(1e-3, 1e-5, 5, 7, 1, 1e-6)
    assert table.shape == (35,)
    assert table.dtype == np.float64
    assert table[0] == 1e-6
    assert table[6] == table[7] == pytest.approx(1e-3)
    middle = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 14 / 28))
    assert table[21] == pytest.approx(middle)
    assert table[-1] > 1e-5


def test_reference_schedules_of_clip() -> None:
    path = VECTORS / "clip.npz"
    if not path.exists():
        pytest.skip("no reference vectors")
    golden = np.load(path)
    given = {key.removeprefix("lr/in/"): golden[key] for key in golden if key.startswith("lr/in/")}
    base, warmup, total = float(given["base_lr"]), int(given["warmup"]), int(given["total"])
    cooldown = int(given["cooldown_steps"]), float(given["cooldown_power"]), float(given["cooldown_end_lr"])
    steps = given["step"].tolist()
    np.testing.assert_allclose([cosine(step, base, warmup, total) for step in steps], golden["lr/out/cosine"], rtol=1e-12, atol=1e-18)
    ours = [constant_with_cooldown(step, base, warmup, total, *cooldown) for step in steps]
    np.testing.assert_allclose(ours, golden["lr/out/const_cooldown"], rtol=1e-12, atol=1e-18)


def test_reference_schedules_of_laclip() -> None:
    path = VECTORS / "laclip.npz"
    if not path.exists():
        pytest.skip("no reference vectors")
    golden = np.load(path)
    cases = [key for key in golden if key.startswith("sched_") and key.endswith("_args")]
    assert cases
    for key in cases:
        base, final, epochs, iters, warmup, start = golden[key].tolist()
        ours = laclip_schedule(base, final, int(epochs), int(iters), warmup, start)
        np.testing.assert_allclose(ours, golden[key.removesuffix("_args")], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "laclip"])
def test_every_kind_builds_and_peaks_at_the_base_rate(kind: str) -> None:
    cooldown = {"cooldown": 0.2} if kind in ("constant", "wsd") else {}
    config = ScheduleConfig.parse({"kind": kind, "warmup": 0.1, "final_lr": 1e-5, **cooldown})
    schedule = config.build(2e-3, 50)
    rates = [schedule(step) for step in range(50)]
    assert max(rates) == pytest.approx(2e-3)
    assert rates[0] < 1e-3
    assert rates[-1] < 5e-4
    by_steps = ScheduleConfig.parse({"kind": kind, "warmup": 5, "final_lr": 1e-5, **({"cooldown": 10} if cooldown else {})}).build(2e-3, 50)
    assert [by_steps(step) for step in range(50)] == rates


@pytest.mark.parametrize("warmup", [0, 0.0, 1, 50, 900])
def test_any_warmup_gives_finite_rates(warmup: float) -> None:
    for kind in ("cosine", "constant", "laclip"):
        schedule = ScheduleConfig.parse({"kind": kind, "warmup": warmup}).build(1.0, 50)
        assert all(0 <= schedule(step) <= 1 for step in range(50))


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="share below 1"):
        ScheduleConfig.parse({"warmup": 1.5})


def test_fixmatchs_schedule_ends_at_a_fifth() -> None:
    schedule = ScheduleConfig.parse({"kind": "fixmatch", "warmup": 2}).build(0.03, 102)
    assert [schedule(step) for step in (0, 1, 2)] == pytest.approx([0.015, 0.03, 0.03])
    assert schedule(52) == pytest.approx(0.03 * math.cos(7 * math.pi / 32))
    assert schedule(102) == pytest.approx(0.03 * math.cos(7 * math.pi / 16))


def test_linear_is_a_straight_line_after_the_warm_up() -> None:
    rate = ScheduleConfig(kind="linear", warmup=2, final_lr=0.2).build(1.0, 10)
    assert [rate(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])


def test_wsd_is_stable_and_then_falls_as_one_minus_a_root() -> None:
    rate = ScheduleConfig(kind="wsd", warmup=0.1, cooldown=0.4, final_lr=0.1).build(1.0, 20)
    assert [rate(step) for step in (0, 1, 2, 11, 12)] == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])
    assert [rate(step) for step in (14, 20)] == pytest.approx([0.1 + 0.5 * 0.9, 0.1])


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"kind": "wsd"}, "needs one"),
        ({"kind": "cosine", "cooldown": 5}, "no effect with kind: cosine"),
        ({"kind": "linear", "cooldown_power": 2.0}, "only with constant"),
        ({"kind": "fixmatch", "final_lr": 0.1}, "no effect with kind: fixmatch"),
        ({"kind": "wsd", "warmup": 0.5, "cooldown": 0.6}, "more than the whole run"),
        ({"kind": "triangle"}, "cosine"),
    ],
)
def test_settings_that_a_schedule_does_not_read_are_refused(wrong: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        ScheduleConfig.parse(wrong)
