"""FSDP2 on two gloo processes: the run that whole models make, in parts; checkpoints and models are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _ranks import run_ranks
from test_run import log, run, weights

from diptych.core.errors import ConfigError
from diptych.train import sharding

CHANGES = {"parallel": "fsdp", "clip_grad_norm": 0.5, "layer_decay": 0.9, "checkpoint_activations": True}


def on_rank(rank: int, world: int, root: str, folder: str) -> list[dict[str, Any]]:
    """Whole models; shared out; shared out, stopped after three updates, and gone on with."""
    torch.set_num_threads(1)
    made = []
    for name, parallel, stop_after in (("whole", "ddp", 0), ("shared", "fsdp", 0), ("stopped", "fsdp", 3), ("stopped", "fsdp", 0)):
        steps = iter(range(1, 100))
        changes = {**CHANGES, "parallel": parallel}
        made.append(
            vars(run(Path(root), Path(folder) / name, rank, world, changes, should_stop=lambda s=steps, n=stop_after: next(s) == n))
        )
        torch.distributed.barrier()
    return made


@pytest.mark.slow
def test_sharded_training_is_that_of_whole_models_and_goes_on_exactly(dataset_root: Path, tmp_path: Path) -> None:
    made = run_ranks(2, on_rank, str(dataset_root), str(tmp_path), timeout_s=280)[0]
    assert [(each["finished"], each["resumed_from"]) for each in made] == [(True, 0), (True, 0), (False, 0), (True, 3)]
    for ours, theirs in zip(log(tmp_path / "shared"), log(tmp_path / "whole"), strict=True):
        for name in ("loss", "grad_norm", "logit_scale", "image_rank"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    ours, theirs, plain = (weights(tmp_path / name) for name in ("stopped", "shared", "whole"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in plain.items()}
    newest = max((tmp_path / "stopped" / "scratch" / "checkpoints").glob("step-*"))
    moments = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == sum(value.size for value in plain.values())


def test_optimizers_that_need_whole_weights_are_refused() -> None:
    from diptych.optimizers.adamp import Config as AdamP
    from diptych.optimizers.adamw import Config as AdamW

    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]
    sharding.refuse_optimizer(AdamW().build(groups))
    with pytest.raises(ConfigError, match="whole weights"):
        sharding.refuse_optimizer(AdamP().build(groups))


@pytest.mark.parametrize(
    ("plain", "whole"),
    [
        ({"method": "clip"}, False),
        ({"method": "cloob"}, False),
        ({"method": "clip-rocket"}, False),
        ({"method": "clip-rocket", "extra": "byolip"}, True),
        ({"method": "a-clip"}, True),
        ({"method": "lightclip"}, True),
        ({"method": "coca"}, True),
    ],
    ids=str,
)
def test_objectives_that_look_inside_the_towers_are_refused(plain: dict[str, Any], whole: bool) -> None:
    from diptych.core import catalogue

    objective = catalogue.config_class(catalogue.find(plain["method"], "objective")).parse(plain).build()  # type: ignore[attr-defined]
    if not whole:
        return sharding.refuse_objective(objective)
    with pytest.raises(ConfigError, match="set parallel: ddp"):
        sharding.refuse_objective(objective)


def test_other_devices_are_refused() -> None:
    from diptych.models import clip

    with pytest.raises(ConfigError, match="on this device"):
        sharding.shard(clip.create("vit-micro-40", 0), 2, "meta")


def test_whole_tensors_pass_through() -> None:
    plain = [torch.ones(3), torch.full((2,), 2.0)]
    assert float(sharding.total_norm(plain)) == pytest.approx(11**0.5)
    assert sharding.whole({"a": plain, "b": 3})["a"][0] is plain[0]
    assert sharding.part(plain[0], plain[1]) is plain[0]
