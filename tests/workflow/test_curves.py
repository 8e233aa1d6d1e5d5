from __future__ import annotations

import math

from diptych.workflow import curves

RECORDS = [
    {"step": step, "steps": 4, "epoch": step / 2, "samples_seen": 8 * step, "loss": 3.0 - step, "consistency": 0.5, "accuracy": 0.25 * step,
     "lr": 1e-3, "grad_norm": 2.0, "logit_scale": 14.0, "data_wait_s": 0.1, "read_s": 0.0, "decode_s": 0.1, "step_s": 0.9, "sync_s": 0.0,
     "samples_per_s": 8.0, **({"val_loss": 2.5} if step % 2 == 0 else {})}
    for step in (1, 2, 3, 4)
]  # fmt: skip


def test_losses_come_first_then_their_parts_then_what_every_run_has() -> None:
    assert curves.names(RECORDS) == [
        "loss", "val_loss", "consistency", "accuracy", "lr", "logit_scale", "grad_norm", "samples_per_s", "data_wait_s", "step_s", "sync_s",
    ]  # fmt: skip
    assert curves.metrics(RECORDS)["consistency"] == "train/consistency"
    assert curves.names([]) == []


def test_figures_that_some_records_lack_or_that_are_not_finite_are_drawn_without_them() -> None:
    broken = [{**record, "grad_norm": math.nan, "loss": math.inf if record["step"] == 2 else record["loss"]} for record in RECORDS]
    page = curves.drawn(broken)
    assert "gradient norm" not in page
    assert "nan" not in page
    assert "inf" not in page
    assert page.count("<svg") == len(curves.names(broken)) - 1
    assert "loss of the split val" in page


def test_a_method_with_many_parts_does_not_flood_the_server() -> None:
    many = [{"step": 1, "loss": 1.0, **{f"part{index}": 0.0 for index in range(200)}}]
    assert len(curves.metrics(many)) == curves.MAX_CURVES
