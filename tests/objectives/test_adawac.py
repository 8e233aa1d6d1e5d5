"""AdaWAC's weights and losses: the definition, log-space, every mode, dual encoders, and the same table on every rank."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from _ranks import run_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from worlds import Vectors, context, encoded

from diptych.core.errors import ConfigError
from diptych.objectives.adawac import ONE_VIEW, AdaWac, Config, Mode, Terms, consistency, dice_loss, segmentation_terms

ROWS = 20
NAMES = {0: "cat", 1: "dog", 2: "owl"}


def built(**settings: object) -> AdaWac:
    made = Config.parse({"method": "adawac", "density": "density", **settings}).build()
    made.allocate(ROWS)
    return made.double()


def terms(first: list[float], second: list[float] | None = None, apart: list[float] | None = None) -> Terms:
    values = [
        torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in (first, second or first, apart or [0.0] * len(first))
    ]
    return Terms(*values, torch.arange(len(first)) > 0, *torch.zeros(2, dtype=torch.float64))


def test_the_weights_move_before_they_are_used() -> None:
    made = built(eta_w=2.0, clip=None)
    given = terms([1.0, 3.0], [2.0, 3.0], [0.5, 0.25])
    loss = made.step(torch.tensor([4, 7]), given)
    ratio = torch.tensor([2.0 * (1.5 - 0.5), 2.0 * (3.0 - 0.25)], dtype=torch.float64).exp()
    weight_N2 = torch.stack([ratio / (1 + ratio), 1 / (1 + ratio)], dim=1)
    torch.testing.assert_close(made.weight_R2[[4, 7]], weight_N2)
    assert float(loss.detach()) == pytest.approx(float((weight_N2 * torch.tensor([[1.5, 0.5], [3.0, 0.25]])).sum() / 2))
    others = [row for row in range(ROWS) if row not in (4, 7)]
    torch.testing.assert_close(made.weight_R2[others], torch.full((ROWS - 2, 2), 0.5, dtype=torch.float64))
    loss.backward()
    torch.testing.assert_close(given.first_N.grad, weight_N2[:, 0] / 4)
    torch.testing.assert_close(given.consistency_N.grad, weight_N2[:, 1] / 2)


def test_supervised_pairs_and_others_part() -> None:
    """The saddle point: a label that says much keeps its pair, one that says nothing gives it to consistency."""
    made = built(eta_w=1.0)
    for _ in range(10):
        made.step(torch.tensor([0, 1]), terms([0.8, 0.05], None, [0.3, 0.3]))
    dense, sparse = made.weight_R2[:2, 0].tolist()
    assert dense - sparse > 0.2
    torch.testing.assert_close(made.weight_R2.sum(dim=1), torch.ones(ROWS, dtype=torch.float64))


def test_a_weight_comes_back_from_next_to_nothing() -> None:
    weights = {}
    for clip in (None, 20.0):
        made = built(eta_w=8.0, clip=clip)
        for sign in [1.0] * 30 + [-1.0] * 6:
            made.step(torch.tensor([3]), terms([3.0 + 3 * sign], None, [3.0 - 3 * sign]))
        weights[clip] = made.weight_R2[3].tolist()
    assert weights[None][0] == 1.0, "30 visits are not undone by six"
    assert weights[20.0][0] < 1e-8
    assert weights[20.0][0] > 0


def test_without_a_learning_rate_it_is_plain_consistency() -> None:
    given = terms([1.0, 2.0, 0.5], [1.5, 2.5, 0.0], [0.1, 0.7, 0.9])
    still, plain = built(eta_w=0.0), built(mode="dac_only")
    rows = torch.tensor([0, 5, 9])
    assert float(still.step(rows, given).detach()) == pytest.approx(float(plain.step(rows, given).detach()), rel=1e-12)
    torch.testing.assert_close(still.weight_R2, torch.full((ROWS, 2), 0.5, dtype=torch.float64))


def test_the_baselines_on_numbers_that_can_be_worked_out() -> None:
    def loss(mode: Mode, **settings: object) -> float:
        given = terms([1.0, 2.0, 4.0], [3.0, 2.0, 4.0], [0.2, 0.4, 0.6])  # means 2, 2, 4; the first is label-sparse
        return float(built(mode=mode, **settings).step(torch.tensor([0, 1, 2]), given).detach())

    assert loss("base") == pytest.approx(7 / 3)
    assert loss("pair") == pytest.approx(8 / 3)
    assert loss("dac_only") == pytest.approx((2.2 + 2.4 + 4.6) / 6)
    assert loss("pseudo") == pytest.approx((0.2 + 2 + 4) / 3)
    assert loss("trim_train") == pytest.approx((2.4 + 4.6) / 4)
    assert loss("trim_ratio", trim_ratio=0.5) == pytest.approx(4.6 / 2)
    assert loss("trim_ratio", trim_ratio=1.0) == 0
    exp = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).softmax(dim=0)
    assert loss("reweight_only") == pytest.approx(float(exp @ torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)) / 3)


def test_entropy_pulls_weights_together() -> None:
    spread = []
    for entropy in (0.0, 0.3):
        made = built(mode="pm_dro", entropy=entropy)
        for _ in range(20):
            made.step(torch.arange(3), terms([0.2, 0.3, 0.5]))
        spread.append(float(made.weight_R2[:3, 0].std()))
    assert spread[1] < 0.5 * spread[0]


def test_dice_is_that_of_the_whole_batch() -> None:
    label_NHW = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    sure_NKHW = 50.0 * torch.nn.functional.one_hot(label_NHW, 3).movedim(-1, 1)
    assert float(dice_loss(sure_NKHW, label_NHW)) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(-sure_NKHW, label_NHW)) > 0.9
    swapped = torch.stack([sure_NKHW[0], -sure_NKHW[1]])
    assert float(dice_loss(swapped, label_NHW)) == pytest.approx(float(dice_loss(swapped.flip(0), label_NHW.flip(0))))


def test_pictures_of_background_alone_are_sparse() -> None:
    label_NHW = torch.zeros(3, 4, 4, dtype=torch.int64)
    label_NHW[1, 2, 2] = 2
    logits, latents = torch.randn(3, 3, 4, 4), torch.randn(3, 5, 2, 2)
    found = segmentation_terms((logits, logits), (label_NHW, label_NHW), (latents, latents + 2), 0.5)
    assert found.dense_N.tolist() == [False, True, False]
    torch.testing.assert_close(found.consistency_N, torch.full((3,), 2.0))
    torch.testing.assert_close(found.first_N, torch.stack([cross_entropy(logits[n : n + 1], label_NHW[n : n + 1]) for n in range(3)]))


# ---------------------------------------------------------------- on a dual encoder


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image_NW, noise_NW = (torch.randn(8, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    text_NL = torch.randint(1, 30, (8, 4), generator=generator)
    label_N = torch.tensor([0, -1, 2, 1, -1, -1, 0, 2])
    row_N = torch.randperm(ROWS, generator=generator)[:8]
    density_N = torch.tensor([3.0, 0.0, 1.0, float("nan"), 2.0, 0.0, 1.0, 1.0])
    views = {"image_NCHW": image_NW, "view0_NCHW": image_NW + 0.1 * noise_NW}
    return {**views, "text_NL": text_NL, "label_N": label_N, "row_N": row_N, "density_N": density_N}


def started(**settings: object) -> tuple[AdaWac, Vectors]:
    model = Vectors().double()
    made = Config.parse({"method": "adawac", **settings}).build()
    made.start(context(model, NAMES, ROWS))
    return made.double(), model


def test_captions_supervise_both_views_and_features_are_compared_at_their_length() -> None:
    made, model = started(mode="dac_only", lambda_ac=2.0)
    given, tensors = encoded(model, batch()), batch()
    parts = made(given)
    views = [model.encode_image(tensors[name], normalize=False) for name in ("image_NCHW", "view0_NCHW")]
    losses = []
    for view_ND in views:
        logits = 5.0 * normalize(view_ND, dim=-1) @ given.text_ND.T
        losses.append((cross_entropy(logits, torch.arange(8)) + cross_entropy(logits.T, torch.arange(8))) / 2)
    distance = 2.0 * (views[0] - views[1]).square().mean()
    assert float(parts["supervised"]) == pytest.approx(float(sum(losses).detach() / 2))
    assert float(parts["consistency"]) == pytest.approx(float(distance.detach()))
    assert float(parts["loss"].detach()) == pytest.approx(float((sum(losses) / 2 + distance).detach() / 2))
    torch.testing.assert_close(consistency(*views).mean() * 2, distance)


def test_labels_supervise_those_that_have_one_and_the_others_turn_to_consistency() -> None:
    made, model = started(supervised="label", eta_w=2.0)
    for _ in range(5):
        parts = made(encoded(model, batch()))
        parts["loss"].backward()
    labelled_N, row_N = batch()["label_N"] >= 0, batch()["row_N"]
    weight_N = made.weight_R2[row_N, 0]
    assert weight_N[labelled_N].min() > 0.5 > weight_N[~labelled_N].max()
    torch.testing.assert_close(parts["weight_dense"], weight_N[labelled_N].mean())
    torch.testing.assert_close(parts["weight_sparse"], weight_N[~labelled_N].mean())
    assert made.columns == ("label",)
    assert made.encodes == ()


@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_mode_trains_both_towers(mode: Mode) -> None:
    made, model = started(mode=mode, density="density")
    assert made.views == (() if mode in ONE_VIEW else ("weak",))
    assert made.columns == ("density",)
    given = batch()
    if mode in ONE_VIEW:
        del given["view0_NCHW"]
    parts = made(encoded(model, given))
    parts["loss"].backward()
    assert model.image.grad.any()
    assert model.words.grad.any()
    assert not any(value.requires_grad for name, value in parts.items() if name != "loss")
    moved = (made.weight_R2 - 0.5).abs().amax(dim=1) > 1e-9
    assert sorted(torch.nonzero(moved).flatten().tolist()) == (
        sorted(given["row_N"].tolist()) if mode in ("adawac", "reweight_only", "pm_dro") else []
    )


def test_a_kind_of_pairs_that_a_batch_has_none_of_has_no_weight() -> None:
    made, model = started(supervised="label")
    parts = made(encoded(model, {**batch(), "label_N": torch.zeros(8, dtype=torch.int64)}))
    assert "weight_sparse" not in parts
    torch.testing.assert_close(parts["weight_dense"], parts["weight"])


def test_density_says_which_pairs_are_trimmed() -> None:
    made, _ = started(mode="trim_train", density="density")
    assert made._dense(batch()).tolist() == [True, False, True, False, True, False, True, True]


def test_the_table_goes_through_a_state_dict() -> None:
    made, model = started()
    for seed in range(3):
        made(encoded(model, batch(seed)))
    other, _ = started()
    other.load_state_dict(made.state_dict())
    losses = [float(each(encoded(model, batch(9)))["loss"].detach()) for each in (made, other)]
    assert losses[0] == losses[1] != float(started()[0](encoded(model, batch(9)))["loss"].detach())
    assert list(made.state_dict()) == ["log_weight_R2"]


def on_a_rank(rank: int, world: int) -> dict[str, dict[str, object]]:
    results = {}
    for mode in get_args(Mode):
        made, model = started(mode=mode, density="density", supervised="caption", trim_ratio=0.3)
        share = 8 // world
        for seed in (0, 1):
            own = {name: value[rank * share : (rank + 1) * share] for name, value in batch(seed).items()}
            model.zero_grad()
            parts = made(encoded(model, own))
            parts["loss"].backward()
        grads = [model.image.grad, model.words.grad]
        kinds = [float(parts[f"weight_{kind}"]) for kind in ("dense", "sparse")]
        results[mode] = {"loss": float(parts["loss"].detach()), "grads": grads, "table": made.log_weight_R2, "kinds": kinds}
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, object]]]:
    return run_ranks(2, on_a_rank)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_two_ranks_learn_what_one_does_and_hold_one_table(ranks: list[dict[str, dict[str, object]]], mode: Mode) -> None:
    single = on_a_rank(0, 1)[mode]
    ours = [result[mode] for result in ranks]
    assert sum(result["loss"] for result in ours) / 2 == pytest.approx(single["loss"])
    for index in (0, 1):
        torch.testing.assert_close(sum(result["grads"][index] for result in ours) / 2, single["grads"][index])
    assert torch.equal(ours[0]["table"], ours[1]["table"])
    torch.testing.assert_close(ours[0]["table"], single["table"])
    assert ours[0]["kinds"] == ours[1]["kinds"] == pytest.approx(single["kinds"])


def test_impossible_settings_are_refused() -> None:
    for wrong, hint in (({"mode": "pseudo"}, "density"), ({"mode": "adwac"}, "did you mean 'adawac'"), ({"clip": 0.0}, "greater than 0")):
        with pytest.raises(ConfigError, match=hint):
            Config.parse({"method": "adawac", **wrong})
    with pytest.raises(ConfigError, match="no classes to name"):
        Config(supervised="label").build().start(context(Vectors(), {}))
