"""What a model costs: parameters, arithmetic and time of one pass, for the report of methods that make it smaller."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diptych.compress.blocks import device_of
from diptych.models.attention import in_the_open

PAIRS, PASSES = 16, 3


@dataclass(frozen=True)
class Footprint:
    """The cost of a dual encoder.

    Attributes:
        parameters: all of them.
        image_flops, text_flops: floating-point operations of one picture and of one caption; a multiply-add counts two.
        image_ms, text_ms: median milliseconds of a pass over `pairs` pairs, as they are on this machine now.
        pairs: of those passes.
    """

    parameters: int
    image_flops: int
    text_flops: int
    image_ms: float
    text_ms: float
    pairs: int

    def plain(self) -> dict[str, Any]:
        """The figures as JSON-able data."""
        return asdict(self)


@torch.no_grad()
def measure(model: Any, batch: Mapping[str, Tensor]) -> Footprint:
    """Measures on at most 16 pairs of a batch; one pass goes before those that count. The model should be in evaluation mode."""
    device = device_of(model)
    image_NCHW, text_NL = batch["image_NCHW"][:PAIRS].to(device), batch["text_NL"][:PAIRS].to(device)
    pairs = len(image_NCHW)
    return Footprint(
        parameters=parameters_of(model),
        image_flops=_flops(model, model.encode_image, image_NCHW) // pairs,
        text_flops=_flops(model, model.encode_text, text_NL) // pairs,
        image_ms=round(_median_ms(model.encode_image, image_NCHW), 3),
        text_ms=round(_median_ms(model.encode_text, text_NL), 3),
        pairs=pairs,
    )


def parameters_of(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def _flops(model: nn.Module, encode: Any, inputs: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with in_the_open(model), FlopCounterMode(display=False) as counter:  # torch's fused attention would count for nothing
        encode(inputs)
    return int(counter.get_total_flops())


def _median_ms(encode: Any, inputs: Tensor) -> float:
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        encode(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
