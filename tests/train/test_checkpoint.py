from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TinyEncoder, TinyLoss

from diptych.core.errors import ConfigError, DataError
from diptych.train.checkpoint import Checkpoints, TrainState
from diptych.train.ema import Ema


def trained(seed: int = 0, steps: int = 3) -> TrainState:
    model, objective = TinyEncoder(seed), TinyLoss()
    objective.register_buffer("queue", torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=0.1)
    state = TrainState(model, objective, optimizer, Ema(model, 0.5))
    for _ in range(steps):
        for parameter in [*model.parameters(), *objective.parameters()]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        objective.queue += 1  # type: ignore[operator]
        state.ema.update(model)  # type: ignore[union-attr]
        state.step += 1
        state.samples_seen += 8
    return state


def content(state: TrainState) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    found |= {f"objective.{name}": value for name, value in state.objective.state_dict().items()}
    found |= {f"ema.{name}": value for name, value in state.ema.model.state_dict().items()}  # type: ignore[union-attr]
    for index, moments in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return found


def test_everything_comes_back(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path / "c", {"seed": 0, "range": (1, 2)}), trained()
    path = checkpoints.save(state)
    assert path.name == "step-000000003"
    assert checkpoints.latest() == path
    other = trained(seed=9, steps=1)
    checkpoints.restore(path, other)
    assert (other.step, other.samples_seen) == (3, 24)
    before, after = content(state), content(other)
    assert before.keys() == after.keys()
    assert any(key.startswith("optimizer.") for key in before)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert other.optimizer.param_groups[0]["params"][0] is next(other.model.parameters())


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, {}), trained()
    for step in (3, 5, 12, 104):
        state.step = step
        checkpoints.save(state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000012", "step-000000104"]
    checkpoints.save(state)
    assert checkpoints.latest() == tmp_path / "step-000000104"


@pytest.mark.parametrize("part", ["model.safetensors", "ema.safetensors", "objective.pt", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["removed", "cut off"])
def test_a_missing_part_is_named_and_the_checkpoint_passed_over(tmp_path: Path, part: str, damage: str) -> None:
    checkpoints, state = Checkpoints(tmp_path, {}), trained()
    older = checkpoints.save(state)
    state.step += 1
    newer = checkpoints.save(state)
    if damage == "removed":
        (newer / part).unlink()
    else:
        (newer / part).write_bytes((newer / part).read_bytes()[:-7])
    assert checkpoints.latest() == older
    untouched = trained(seed=5)
    before = {name: value.clone() for name, value in content(untouched).items()}
    with pytest.raises(DataError, match=part):
        checkpoints.restore(newer, untouched)
    assert all(torch.equal(before[name], value) for name, value in content(untouched).items())
    assert untouched.step == 3


def test_a_part_that_this_run_needs_and_the_checkpoint_never_had_is_named(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, {}), trained()
    averaged, state.ema = state.ema, None
    path = checkpoints.save(state)
    state.ema = averaged
    with pytest.raises(DataError, match=r"ema\.safetensors"):
        checkpoints.restore(path, state)


def test_half_written_checkpoints_do_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    assert checkpoints.latest() is None
    (tmp_path / ".partial-step-000000009").mkdir()
    (tmp_path / "step-000000007").mkdir()
    assert checkpoints.latest() is None
    state = trained()
    state.step = 9
    assert checkpoints.save(state) == checkpoints.latest()


def test_another_runs_checkpoint_is_refused_by_what_differs(tmp_path: Path) -> None:
    state = trained()
    path = Checkpoints(tmp_path, {"dataset": "a", "seed": 0}).save(state)
    with pytest.raises(ConfigError, match="another run") as error:
        Checkpoints(tmp_path, {"dataset": "a", "seed": 1}).restore(path, state)
    assert "seed" in str(error.value)
    assert "dataset" not in str(error.value)


def test_no_pickled_code_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "owned",)  # type: ignore[return-value]

    checkpoints, state = Checkpoints(tmp_path / "c", {}), trained()
    path = checkpoints.save(state)
    torch.save(Evil(), path / "optimizer.pt")
    record = json.loads((path / "state.json").read_text())
    record["size_bytes"]["optimizer.pt"] = (path / "optimizer.pt").stat().st_size
    (path / "state.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        checkpoints.restore(path, state)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_written_later_holds_the_state_of_its_step(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, {}), trained()
    state.model.register_parameter("twin", state.model.words.weight)  # type: ignore[arg-type, union-attr]
    state.ema.model.register_parameter("twin", state.ema.model.words.weight)  # type: ignore[arg-type, union-attr]
    before = {name: value.clone() for name, value in content(state).items()}
    path = checkpoints.save(state, later=True)
    with torch.no_grad():
        for value in [*state.model.parameters(), *state.objective.parameters()]:
            value.add_(1)
        for moments in state.optimizer.state.values():
            moments["exp_avg"].add_(1)
    state.step = 99
    checkpoints.wait()
    checkpoints.restore(path, state)
    assert state.step == 3
    assert all(torch.equal(before[name], value) for name, value in content(state).items())


def test_what_goes_wrong_in_the_thread_is_told_and_the_one_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, state = Checkpoints(tmp_path, {}), trained()
    first = checkpoints.save(state, later=True)
    checkpoints.wait()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("diptych.train.checkpoint._make_durable", full)
    state.step = 9
    checkpoints.save(state, later=True)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.wait()
    assert checkpoints.latest() == first
    checkpoints.wait()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from test_checkpoint import trained
from diptych.train.checkpoint import Checkpoints
checkpoints, state = Checkpoints(Path({folder!r}), {{}}), trained()
checkpoints.save(state, later=True)
checkpoints.wait()
torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
state.step = 9
checkpoints.save(state, later=True)
checkpoints.wait()
"""


def test_a_crash_in_the_middle_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    script = KILLED.format(paths=[str(Path(__file__).parent)], folder=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / ".partial-step-000000009").exists()
    checkpoints = Checkpoints(tmp_path, {})
    assert checkpoints.latest() == tmp_path / "step-000000003"
    state = trained(seed=4)
    checkpoints.restore(tmp_path / "step-000000003", state)
    assert state.step == 3


def test_the_newest_healthy_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, {}), trained()
    state.best = {"step": 4}
    for step, healthy in ((2, 1), (4, 2), (6, 4), (8, 6), (10, 6), (12, 6)):
        state.step, state.healthy_step = step, healthy
        checkpoints.save(state)
    assert [path.name[-2:] for path in sorted(tmp_path.iterdir())] == ["04", "06", "10", "12"]
    assert checkpoints.withdraw(6) == tmp_path / "step-000000006"
    assert checkpoints.of_step(4) == tmp_path / "step-000000004"
    with pytest.raises(DataError, match="kept checkpoint is gone"):
        checkpoints.of_step(12)
