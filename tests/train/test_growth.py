"""Growing batches: the same stream of pairs, exact resume, the mean of the micro-batches' gradients, statistics that are right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from fit_tiny import fit, start, weights

from diptych.core import chance
from diptych.core.errors import ConfigError
from diptych.train.growth import Growth
from diptych.train.loop import Run, passes

MICRO, TOTAL = 12, 12


class Doubling:
    """Two updates a size, then twice as large, up to `largest`; keeps what it was told."""

    def __init__(self, largest: int = 48) -> None:
        self.largest, self.seen = largest, []  # type: ignore[var-annotated]

    def next(self, statistics: Mapping[str, float]) -> int:
        self.seen.append(dict(statistics))
        size = int(statistics["batch_size"])
        return min(self.largest, size * 2) if int(statistics["updates"]) % 2 else size

    def lr_factor(self, batch_size: int, first: int) -> float:
        return batch_size / first


def begun(scratch: Path, **settings: object) -> tuple[Run, object, Doubling]:
    run, state = start(scratch, **settings)
    controller = Doubling()
    run.growth = Growth(controller, MICRO)
    return run, state, controller


def recorded(run: Run) -> list[list[int]]:
    """The rows of the batches that a run reads from here on."""
    rows, make = [], run.loader.batch

    def batch(step: int) -> object:
        made = make(step)
        rows.append(made.tensors["row_N"].tolist())
        return made

    run.loader.batch = batch  # type: ignore[method-assign, assignment]
    return rows


def test_the_stream_is_that_of_a_run_with_fixed_batches(tmp_path: Path) -> None:
    fixed, fixed_state = start(tmp_path / "fixed")
    plain = recorded(fixed)
    fit(fixed, fixed_state)
    run, state, controller = begun(tmp_path / "growing", checkpoint_every_steps=None)
    rows = recorded(run)
    fit(run, state)
    assert rows == plain
    assert state.step == TOTAL
    assert state.samples_seen == MICRO * TOTAL
    assert [each["batch_size"] / MICRO for each in controller.seen] == [2, 2, 4, 4]
    assert [each["updates"] for each in controller.seen] == [0, 1, 2, 3]


def test_the_last_update_takes_what_is_left(tmp_path: Path) -> None:
    run, state, controller = begun(tmp_path, epochs=None, steps=11)
    fit(run, state)
    assert [each["batch_size"] / MICRO for each in controller.seen] == [2, 2, 4, 3]
    assert state.step == 11


@pytest.mark.parametrize("stop_at", [2, 4, 8])
def test_stopping_and_going_on_changes_no_bit(tmp_path: Path, stop_at: int) -> None:
    run, state, straight = begun(tmp_path / "straight")
    fit(run, state)
    expected = weights(state)
    run, state, _ = begun(tmp_path / "stopped")
    run.should_stop = lambda: state.step == stop_at
    fit(run, state)
    assert state.step == stop_at
    run, resumed, controller = begun(tmp_path / "stopped")
    assert resumed.step == stop_at
    fit(run, resumed)
    assert straight.seen[-len(controller.seen) :] == controller.seen
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_the_gradient_is_the_mean_and_the_statistics_are_its_micro_batches(tmp_path: Path) -> None:
    run, state, controller = begun(tmp_path, epochs=None, steps=2, ema=None)
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    grads = []
    for step in range(2):
        state.optimizer.zero_grad()
        torch.manual_seed(int(chance.mix(run.seed, step, 0)) >> 1)
        run.task.losses(run.loader.batch(step).tensors, step)["loss"].backward()
        grads.append(torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None]))
    seen = {}
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.update(mean=torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None]))
    )
    run.config = run.config.model_copy(update={"clip_grad_norm": None})
    state.optimizer.zero_grad()
    fit(run, state)
    both = torch.stack(grads)
    torch.testing.assert_close(seen["mean"], both.mean(dim=0), rtol=1e-5, atol=1e-7)
    [statistics] = controller.seen
    assert statistics["square_norm"] == pytest.approx(float(both.mean(dim=0).square().sum()), rel=1e-4)
    assert statistics["variance"] == pytest.approx(float(both.var(dim=0).sum()) * MICRO, rel=1e-3)


def test_records_and_rates_follow(tmp_path: Path) -> None:
    run, state, _ = begun(tmp_path, log_every=1)
    fit(run, state)
    log = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 4, 8, 12]
    assert [record["batch_size"] for record in log] == [24, 24, 48, 48]
    assert log[2]["lr"] == pytest.approx(2 * run.schedule(4))


def test_multiples_that_are_stepped_over_count() -> None:
    assert [passes(step, 1, 3) for step in range(1, 7)] == [False, False, True, False, False, True]
    assert passes(8, 4, 5)
    assert not passes(8, 2, 5)


def test_refusals() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ConfigError, match="variance"):
        Growth(Doubling(), MICRO, first=1)
    optimizer.curvature = "hutchinson"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="plans by updates"):
        Growth(Doubling(), MICRO, optimizer=optimizer)
