"""Training inside a compressor: batches from the calibration pairs, the contrastive loss, AdamW with a rate that rises and falls.

Source of the recipe: PERP (arXiv 2312.15230), its code: no decay, linear warm-up over a tenth of the steps, then linearly to zero.

Shape legend: N pairs, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diptych.compress.blocks import Batch, device_of
from diptych.core.chance import generator
from diptych.models.clip import pad_id
from diptych.models.contrastive import contrastive_loss

MAX_LOG_SCALE = math.log(100)
WARMUP = 0.1


def pair_loss(model: Any, batch: Batch) -> Tensor:
    """CLIP's loss of a batch, in nats."""
    return contrastive_loss(model.encode_image(batch["image_NCHW"]), model.encode_text(batch["text_NL"]), model.logit_scale.exp())


@torch.no_grad()
def clamp_scale(model: Any) -> None:
    """Keeps the logit scale between 1 and 100, as training does."""
    model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of an update, counted from 0: up over the first tenth, from 0, then down to 0 after the last."""
    warmup = int(WARMUP * steps)
    return peak * (step / warmup if step < warmup else (steps - step) / (steps - warmup))


def train(
    parameters: Sequence[nn.Parameter], loss_at: Callable[[int], Tensor], steps: int, peak: float, after: Callable[[], None] | None = None
) -> list[float]:
    """Trains by AdamW without decay at `rate`; gives the loss before every update.

    Args:
        parameters: what is trained.
        loss_at: the loss of a step, scalar.
        steps, peak: see `rate`.
        after: called after every update.
    """
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
    losses = []
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_at(step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
            if after is not None:
                after()
    return losses


class Pool:
    """Batches for any number of steps, from calibration pairs held as they were given: every epoch is another order of all pairs.

    Args:
        model: whose device and padding they are for.
        batches: `image_NCHW` and `text_NL`, of any sizes.
        size: pairs a batch; of fewer pairs than that, all.
        seed: names the orders. The last pairs of an epoch that do not fill a batch are left out of it.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], size: int, seed: int) -> None:
        inner = getattr(model, "clip", model)
        length = max(batch["text_NL"].shape[1] for batch in batches)
        filler = pad_id(getattr(inner, "text", inner))
        texts = [nn.functional.pad(batch["text_NL"], (0, length - batch["text_NL"].shape[1]), value=filler) for batch in batches]
        self.image_NCHW, self.text_NL = torch.cat([batch["image_NCHW"] for batch in batches]), torch.cat(texts)
        self.size, self.seed, self.device = min(size, len(self.text_NL)), seed, device_of(model)

    def at(self, step: int) -> Batch:
        """The batch of a step, on the model's device; `row_N` says which of the pairs, in the order given, it holds."""
        epoch, place = divmod(step, len(self.text_NL) // self.size)
        order = generator(self.seed, "retrain", epoch).permutation(len(self.text_NL))
        chosen = torch.from_numpy(order[place * self.size : (place + 1) * self.size])
        sides = {"image_NCHW": self.image_NCHW[chosen].to(self.device), "text_NL": self.text_NL[chosen].to(self.device)}
        return {**sides, "row_N": chosen.to(self.device)}
