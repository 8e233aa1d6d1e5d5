"""Every objective here has, on two and on four real ranks, the loss, the averaged gradients and the state of one process.

All objectives go through the same processes, since starting them is what costs. Add a line for a new one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _ranks import run_ranks
from sharded import Case, on_a_rank

pytestmark = pytest.mark.slow

CASES: dict[str, Case] = {
    "alip": ({"method": "alip", "decay": 0.5, "intact": "label"}, None),
    "distillation": ({"method": "distillation", "teacher": ".", "temperature": 2.0}, None),
    "distillation-features": ({"method": "distillation", "teacher": ".", "features": 10.0, "contrastive": 0.0}, None),
    "tinyclip": ({"method": "tinyclip", "teacher": "."}, None),
    "tinyclip-learnt-scale": ({"method": "tinyclip", "teacher": ".", "alpha": 0.6, "scale": None, "teacher_scale": None}, None),
    "vr-lwf": ({"method": "vr-lwf", "sentences": 20, "words": 3}, None),
    "vr-lwf-later": (
        {"method": "vr-lwf", "replay": ["vocabulary", "classes"], "earlier": ["bee", "elk"], "sentences": 20, "words": 3},
        None,
    ),
    "lwf": ({"method": "vr-lwf", "replay": ["classes"], "teacher": "."}, None),
    "vr-lwf-zscl": ({"method": "vr-lwf", "variant": "zscl", "sentences": 20, "words": 3}, None),
    "m2-mix": ({"method": "m2-mix", "tau": None, "tau2": 0.2, "multimodal": 0.5}, None),
    "m3-mix": ({"method": "m2-mix", "tau": 0.2, "tau2": None, "visual": 0.3, "language": 0.4, "joint": 0.6}, None),
    "m3-mix-original": (
        {"method": "m2-mix", "tau": 0.2, "multimodal": 0.0, "visual": 0.3, "language": 0.4, "original_negatives": True},
        None,
    ),
    "mobileclip": ({"method": "mobileclip", "contrastive": 0.25, "distillation": 0.75, "teacher_scale": [7.0, 5.0]}, None),
    "siglip": ({"method": "siglip", "bias": -2.0}, None),
    "siglip-own-bias": ({"method": "siglip"}, -2.0),
    "cloob": ({"method": "cloob", "inv_tau": None}, None),
    "cloob-infonce": ({"method": "cloob", "beta": 3.0, "loss": "infonce"}, None),
    "a-clip": ({"method": "a-clip", "hidden": 12, "width": 6, "cell": 1}, None),
    "a-clip-random": ({"method": "a-clip", "hidden": 12, "width": 6, "select": "random"}, None),
    "lightclip": ({"method": "lightclip", "vocabulary": "seen", "mask": 0.4, "fusion": [0, -1]}, None),
    "lightclip-exact": ({"method": "lightclip", "matching": "exact", "softening": "uniform", "mlm": 0.0}, None),
    "clip-rocket": ({"method": "clip-rocket", "hidden": 12, "width": 6, "reduction": "avg"}, None),
    "siamlip": ({"method": "clip-rocket", "hidden": 12, "width": 6, "extra_width": 5, "extra": "siamlip", "captions": "several"}, None),
    "byolip": ({"method": "clip-rocket", "hidden": 12, "width": 6, "extra_width": 5, "extra": "byolip"}, None),
    "barlip": ({"method": "clip-rocket", "hidden": 12, "width": 6, "extra_width": 5, "extra": "barlip", "separate": False}, None),
    "swalip": ({"method": "clip-rocket", "hidden": 12, "width": 6, "extra_width": 5, "extra": "swalip", "smoothing": 0.0}, None),
    "cloob-no-retrieval": ({"method": "cloob", "retrieval": False, "inv_tau": None}, None),
}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return dict(zip(CASES, on_a_rank(0, 1, list(CASES.values())), strict=True))


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    results = run_ranks(request.param, on_a_rank, list(CASES.values()), timeout_s=280.0)
    return [dict(zip(CASES, result, strict=True)) for result in results]


@pytest.mark.parametrize("name", CASES)
def test_ranks_do_what_one_process_does(name: str, single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    expected, found = single[name], [result[name] for result in ranks]
    mean = torch.stack([result["losses"] for result in found]).mean(dim=0)
    torch.testing.assert_close(mean, expected["losses"], rtol=1e-9, atol=1e-12)
    assert expected["grads"].keys() == found[0]["grads"].keys()
    for parameter, grad in expected["grads"].items():
        assert grad.any(), f"{parameter} learns nothing, so that this shows nothing"
        average = torch.stack([result["grads"][parameter] for result in found]).mean(dim=0)
        torch.testing.assert_close(average, grad, rtol=1e-8, atol=1e-11)
    for part, value in expected["state"].items():
        for result in found:
            torch.testing.assert_close(result["state"][part], value, rtol=1e-9, atol=1e-12)
