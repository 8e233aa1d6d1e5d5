from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fit_tiny import STEPS, fit, start, weights

from diptych.core.errors import DataError

SCRIPT = Path(__file__).with_name("fit_tiny.py")


def records(scratch: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (scratch / "steps.jsonl").read_text().splitlines()]


def trained(scratch: Path, **settings: object) -> dict[str, torch.Tensor]:
    run, state = start(scratch, **settings)
    fit(run, state)
    return weights(state)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    scratch = tmp_path_factory.mktemp("straight")
    return scratch, trained(scratch)


@pytest.mark.parametrize("stop_at", [1, 5, 6, 11])
def test_stopping_and_going_on_changes_no_bit(straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, stop_at: int) -> None:
    run, state = start(tmp_path)
    run.should_stop = lambda: state.step == stop_at
    fit(run, state)
    assert state.step == stop_at < STEPS
    run, state = start(tmp_path)
    assert state.step == stop_at
    assert state.samples_seen == 12 * stop_at
    fit(run, state)
    assert equal(weights(state), straight[1])


def test_killing_the_process_changes_no_bit(straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Killed with signal 9 after step 7, one step past its newest checkpoint and in the middle of an epoch; then run again."""
    killed = subprocess.run([sys.executable, SCRIPT, tmp_path, "7"], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "step-000000006"
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1e9}\n{"step": 7, "lo')  # what a run leaves that got further and died in a write
    subprocess.run([sys.executable, SCRIPT, tmp_path], check=True, timeout=120)
    assert equal(torch.load(tmp_path / "weights.pt", weights_only=True), straight[1])
    for name in ("step", "samples_seen", "loss", "accuracy", "lr", "grad_norm", "logit_scale", "epoch"):
        assert [record[name] for record in records(tmp_path)] == [record[name] for record in records(straight[0])]


def test_threads_of_the_loader_change_no_bit(straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    assert equal(trained(tmp_path, loader_workers=2), straight[1])


def test_the_records_say_what_happened(straight: tuple[Path, dict[str, torch.Tensor]]) -> None:
    log = records(straight[0])
    assert [record["step"] for record in log] == [3, 6, 9, 12]
    assert [record["samples_seen"] for record in log] == [36, 72, 108, 144]
    assert [record["epoch"] for record in log] == [1, 2, 3, 4]
    assert {record["steps"] for record in log} == {12}
    for record in log:
        assert record["loss"] > 0
        assert 0 <= record["accuracy"] <= 1
        assert record["samples_per_s"] > 0
        assert 1 <= record["logit_scale"] <= 100
        assert record["data_wait_s"] >= record["decode_s"] * 0.5 > 0
        assert record["step_s"] > 0
        assert record["sync_s"] >= 0
    assert [record["lr"] for record in log] == pytest.approx([start_lr(step) for step in (2, 5, 8, 11)])


def start_lr(step: int) -> float:
    from diptych.train.schedule import cosine

    return cosine(step, 0.01, round(0.05 * 12), 12)


def test_training_learns(tmp_path: Path) -> None:
    trained(tmp_path, epochs=60, clip_grad_norm=None, checkpoint_every_steps=None, caption="first", augment={})
    losses = [record["loss"] for record in records(tmp_path)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_averaged_weights_follow(straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    run, state = start(tmp_path, ema=0.25)
    expected = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    after_step = run.task.after_step

    def follow() -> None:
        after_step()
        for name, value in state.model.named_parameters():
            expected[name] = 0.25 * expected[name] + 0.75 * value.detach()

    run.task.after_step = follow  # type: ignore[method-assign]
    fit(run, state)
    for name, value in state.ema.model.named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(value, expected[name])
        assert not torch.equal(value, dict(state.model.named_parameters())[name])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    run, state = start(tmp_path, clip_grad_norm=1e-3, schedule={"warmup": 0})
    norms = []
    step = state.optimizer.step

    def watch() -> None:
        grads = [parameter.grad for group in state.optimizer.param_groups for parameter in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        step()

    state.optimizer.step = watch  # type: ignore[method-assign,assignment]
    last = fit(run, state)
    assert max(norms) <= 1.001e-3
    assert last["grad_norm"] > 1e-3


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    run, state = start(tmp_path)
    losses = run.task.losses

    def broken(batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        found = losses(batch, step)
        return {**found, "loss": found["loss"] * float("nan")} if step == 5 else found

    run.task.losses = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(DataError, match="step 5") as error:
        fit(run, state)
    assert "loss nan" in str(error.value)
    assert "the last good checkpoint is" in str(error.value)
    assert "step-000000004" in str(error.value)
    assert state.step == 5
    assert all(torch.isfinite(value).all() for value in weights(state).values())
    run, state = start(tmp_path)
    assert state.step == 4, "the checkpoint before it is whole"


def test_checkpoints_by_time(tmp_path: Path) -> None:
    run, state = start(tmp_path, checkpoint_every_s=0, checkpoint_every_steps=None)
    saved = []
    save = run.checkpoints.save
    object.__setattr__(run.checkpoints, "save", lambda current, **how: saved.append(current.step) or save(current, **how))
    fit(run, state)
    assert saved == list(range(1, 13))


def test_the_last_step_leaves_a_checkpoint_and_a_record(tmp_path: Path) -> None:
    run, state = start(tmp_path, steps=5, epochs=None, log_every=100, checkpoint_every_steps=None)
    fit(run, state)
    assert [record["step"] for record in records(tmp_path)] == [5]
    assert run.checkpoints.latest() == tmp_path / "checkpoints" / "step-000000005"


def test_the_caller_hears_every_record(tmp_path: Path) -> None:
    run, state = start(tmp_path)
    heard: list[dict[str, float]] = []
    run.on_log = heard.append
    last = fit(run, state)
    assert heard == records(tmp_path)
    assert last == heard[-1]


def test_a_checkpoint_is_written_when_it_is_asked_for_and_training_goes_on(
    straight: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run, state = start(tmp_path, checkpoint_every_steps=None)
    asked, saved, save = [], [], run.checkpoints.save
    object.__setattr__(run.checkpoints, "save", lambda current, **how: saved.append(current.step) or save(current, **how))
    run.should_save = lambda: asked.append(state.step) or state.step == 7
    fit(run, state)
    assert asked == list(range(1, 13)), "once a step, whatever else is due"
    assert saved == [7, 12]
    assert equal(weights(state), straight[1])
