"""Quantised weights: the grid, the edge cases, the packed file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diptych.adapt import codes
from diptych.core.errors import ConfigError, DataError


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 10


def one(tensor: Tensor, levels: int, kind: codes.Kind = "linear") -> Tensor:
    return codes.quantise([{"w": tensor}], levels, kind)[0].decode()["w"]


@pytest.mark.parametrize("levels", [3, 4, 16, 255, 256])
def test_linear_rounds_to_the_nearest_of_the_levels(levels: int) -> None:
    value, found = weights(40, 5), one(weights(40, 5), levels)
    grid = torch.linspace(float(value.min()), float(value.max()), levels, dtype=torch.float64)
    nearest = (value[..., None] - grid).abs().min(dim=-1).values
    assert torch.allclose((found - value).abs(), nearest, atol=1e-12)
    assert len(found.unique()) <= levels


def test_tanh_is_finer_near_zero_and_log_keeps_signs_and_orders_of_magnitude() -> None:
    value = torch.cat([torch.logspace(-6, 0, 30, dtype=torch.float64), -torch.logspace(-6, 0, 30, dtype=torch.float64)])
    assert (one(value, 64, "log") / value - 1).abs().max() < 0.6
    assert torch.equal(one(value, 64, "log").sign(), value.sign())
    wide = torch.linspace(-3, 3, 601, dtype=torch.float64)
    near, far = wide.abs() < 0.5, wide.abs() > 2
    error = (one(wide, 33, "tanh") - wide).abs()
    assert error[near].max() < 0.05 < error[far].max()


def test_exact_zeros_survive_log_and_cost_nothing_where_there_are_none() -> None:
    value = weights(100)
    without = codes.quantise([{"w": value}], 16, "log")[0]
    value[3] = value[50] = 0.0
    found = codes.quantise([{"w": value}], 16, "log")[0]
    assert torch.equal(found.decode()["w"] == 0, value == 0)
    assert torch.isfinite(found.decode()["w"]).all()
    assert (without.size_bytes, found.size_bytes) == (50 + 16, 63 + 16)  # 4 and 5 bits a weight, two float64 a tensor
    assert not one(torch.zeros(5), 16, "log").any()


@pytest.mark.parametrize("kind", ["linear", "tanh", "log"])
def test_a_constant_tensor_stays(kind: codes.Kind) -> None:
    constant = torch.full((2, 3), -0.37, dtype=torch.float64)
    assert torch.allclose(one(constant, 16, kind), constant, rtol=1e-12)


def test_signatures_share_one_grid() -> None:
    first, second = codes.quantise([{"w": torch.tensor([0.0, 0.4])}, {"w": torch.tensor([1.0, 0.6])}], 3)
    assert first.ranges == second.ranges == {"w": (0.0, 1.0)}
    assert (first.decode()["w"].tolist(), second.decode()["w"].tolist()) == ([0.0, 0.5], [1.0, 0.5])


def test_two_levels_need_a_symmetric_range() -> None:
    with pytest.raises(ConfigError, match="symmetric"):
        one(torch.tensor([-1.0, 0.2]), 2)
    assert one(torch.tensor([-1.0, 0.2, 1.0]), 2).tolist() == [-1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match="Too few levels"):
        one(torch.tensor([-1.0, 0.2]), 3, "log")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "linear"), (float("inf"), "log"), (40.0, "tanh")])
def test_weights_without_a_place_on_the_grid_are_refused(value: float, kind: codes.Kind) -> None:
    with pytest.raises(DataError, match=r"cannot be quantised(.|\n)*\n  w\n"):
        one(torch.tensor([0.1, value]), 16, kind)


@pytest.mark.parametrize(
    ("levels", "kind", "bits"), [(3, "linear", 2), (16, "tanh", 4), (17, "linear", 5), (64, "log", 6), (4096, "linear", 12)]
)
def test_the_file_gives_back_the_very_weights_and_is_small(tmp_path: Path, levels: int, kind: codes.Kind, bits: int) -> None:
    state = {"a.weight": weights(50, 41), "a.bias": weights(1), "scalar": torch.tensor(0.25, dtype=torch.float64)}
    coded = codes.quantise([state], levels, kind)[0]
    size = codes.save(coded, tmp_path / "patch.safetensors")
    back = codes.load(tmp_path / "patch.safetensors")
    assert all(torch.equal(tensor, back.decode()[name]) for name, tensor in coded.decode().items())
    assert back.decode()["scalar"].shape == ()
    assert coded.size_bytes == (2050 * bits + 7) // 8 + 1 + 1 + 3 * 16
    assert coded.size_bytes <= size == (tmp_path / "patch.safetensors").stat().st_size < coded.size_bytes + 800
    assert [path.name for path in tmp_path.iterdir()] == ["patch.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    with pytest.raises(DataError, match="no file of quantised weights"):
        codes.load(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="no file of quantised weights"):
        codes.load(path)
    codes.save(codes.quantise([{"w": weights(30)}], 16)[0], path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="no file of quantised weights"):
        codes.load(path)
