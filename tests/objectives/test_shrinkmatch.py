"""ShrinkMatch against its definition in loops, its state, its baseline, and the same losses on several ranks."""

from __future__ import annotations

import math

import pytest
import torch
from _ranks import run_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy
from worlds import FEATURES, Vectors, context, encoded

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded
from diptych.objectives.shrinkmatch import Config, ShrinkMatch, auxiliary_head, consistency_losses, shrink, shrink_losses

NAMES = {0: "cat", 1: "dog", 2: "owl", 3: "fox", 4: "bee"}


def probabilities(rows: int, classes: int, sharpness: float = 2.0, seed: int = 0) -> Tensor:
    return (sharpness * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(dim=1)


def by_definition(prob: list[float], threshold: float) -> tuple[set[int], int, float]:
    """Kept classes, the rank at which the search ended, and its confidence, for one uncertain picture."""
    order = sorted(range(len(prob)), key=lambda c: (-prob[c], c))
    for c in range(2, len(prob)):
        kept = [order[0], *order[c:]]
        confidence = prob[order[0]] / sum(prob[k] for k in kept)
        if confidence >= threshold or c == len(prob) - 1:
            return set(kept), c, confidence
    return set(range(len(prob))), 0, 1.0


@pytest.mark.parametrize(("classes", "threshold"), [(3, 0.9), (4, 0.8), (10, 0.95), (50, 0.7)])
def test_the_search_is_that_of_the_definition(classes: int, threshold: float) -> None:
    prob_NC = probabilities(200, classes)
    uncertain_N = prob_NC.amax(dim=1) < threshold
    shrunk = shrink(prob_NC, threshold, uncertain_N)
    assert 20 < int(uncertain_N.sum()) < 200 or classes == 50
    for n, prob in enumerate(prob_NC.tolist()):
        kept, stop, confidence = by_definition(prob, threshold)
        if not uncertain_N[n]:
            kept = set(range(classes))
        else:
            assert (int(shrunk.stop_N[n]), float(shrunk.confidence_N[n])) == (stop, pytest.approx(confidence))
            assert bool(shrunk.settled_N[n]) == (confidence >= threshold)
        assert {c for c in range(classes) if shrunk.kept_NC[n, c]} == kept
        assert int(shrunk.top_N[n]) in kept
    assert torch.equal(shrunk.searched_N, uncertain_N)
    assert not (shrunk.settled_N & ~uncertain_N).any()


def test_the_loss_is_a_weighted_cross_entropy_in_the_space_that_is_left() -> None:
    prob_NC, threshold = probabilities(60, 6), 0.9
    logits_NC = torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    shrunk = shrink(prob_NC, threshold, prob_NC.amax(dim=1) < threshold)
    loss_N = shrink_losses(logits_NC, shrunk, prob_NC.amax(dim=1))
    loss_N.sum().backward()
    for n, prob in enumerate(prob_NC.tolist()):
        kept, _, confidence = by_definition(prob, threshold)
        expected = 0.0
        if max(prob) < threshold and confidence >= threshold:
            left = sorted(kept)
            expected = max(prob) * float(cross_entropy(logits_NC[n, left].detach(), torch.tensor(left.index(prob.index(max(prob))))))
        assert float(loss_N[n].detach()) == pytest.approx(expected, abs=1e-12)
        gone = [c for c in range(6) if c not in kept]
        assert not logits_NC.grad[n, gone].any()
    assert (loss_N > 0).sum() > 10


def test_a_picture_torn_between_look_alikes_is_settled_without_them() -> None:
    prob_NC = torch.tensor([[0.4, 0.01, 0.3, 0.01, 0.28]])
    shrunk = shrink(prob_NC, 0.9, torch.tensor([True]))
    assert shrunk.kept_NC.tolist() == [[True, True, False, True, False]]
    assert shrunk.settled_N.tolist() == [True]


def test_two_classes_leave_nothing_to_remove() -> None:
    prob_NC = torch.tensor([[0.6, 0.4], [0.3, 0.7]])
    shrunk = shrink(prob_NC, 0.9, torch.tensor([True, True]))
    assert not shrunk.searched_N.any()
    logits_NC = torch.randn(2, 2, requires_grad=True)
    loss = shrink_losses(logits_NC, shrunk, prob_NC.amax(dim=1)).sum()
    assert float(loss.detach()) == 0
    loss.backward()  # there is a graph, so that every rank has the same gradients to average


def test_soft_and_hard_targets() -> None:
    prob_NC, logits_NC = probabilities(7, 4), torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(consistency_losses(logits_NC, prob_NC, hard=False), cross_entropy(logits_NC, prob_NC, reduction="none"))
    hard = cross_entropy(logits_NC, prob_NC.argmax(dim=1), reduction="none")
    torch.testing.assert_close(consistency_losses(logits_NC, prob_NC, hard=True), hard)


# ---------------------------------------------------------------- alignment and state


def built(classes: int, **settings: object) -> ShrinkMatch:
    made = Config.parse({"method": "shrinkmatch", **settings}).build()
    made.allocate(classes)
    return made.double()


def test_alignment_flattens_a_class_that_is_predicted_too_often() -> None:
    prob_NC = (torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64) + probabilities(400, 3).log()).softmax(dim=1)
    rows_N = torch.ones(400, dtype=torch.bool)
    for alignment in ("queue", "average"):
        aligned_NC = built(3, alignment=alignment).align(prob_NC, rows_N)
        torch.testing.assert_close(aligned_NC.sum(dim=1), torch.ones(400, dtype=torch.float64))
        assert aligned_NC.mean(dim=0)[0] < 0.5 < 0.55 < prob_NC.mean(dim=0)[0]
    assert torch.equal(built(3, alignment="none").align(prob_NC, rows_N), prob_NC)


def test_the_queue_forgets_and_labelled_rows_do_not_count() -> None:
    made = built(4, queue=2)
    batches = [probabilities(20, 4, seed=seed) for seed in range(3)]
    rows_N = torch.arange(20) < 15
    for prob_NC in batches:
        aligned_NC = made.align(prob_NC, rows_N)
    recent_C = (batches[1][:15].mean(dim=0) + batches[2][:15].mean(dim=0)) / 2
    ratio_NC = batches[2] / recent_C
    torch.testing.assert_close(aligned_NC, ratio_NC / ratio_NC.sum(dim=1, keepdim=True))


def test_without_unlabelled_pictures_nothing_moves() -> None:
    made, prob_NC = built(4), probabilities(5, 4)
    none_N = torch.zeros(5, dtype=torch.bool)
    assert torch.equal(made.align(prob_NC, none_N), prob_NC)
    logits_NC = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    parts = made.total(logits_NC.sum(), made.unlabelled(prob_NC, prob_NC, logits_NC, logits_NC, none_N))
    assert float(parts["loss"].detach()) == float(logits_NC.detach().sum())
    assert made.rho.isnan()
    assert not made.queue_QC.any()


def test_rho_is_a_running_mean_that_starts_at_the_first_share() -> None:
    made = built(4, threshold=0.6, rho_decay=0.9)
    shares, expected = [], 0.0
    for seed in range(4):
        prob_NC = probabilities(50, 4, seed=seed)
        found = made.unlabelled(prob_NC, prob_NC, prob_NC, prob_NC, torch.ones(50, dtype=torch.bool))
        parts = made.total(torch.tensor(0.0), found)
        shares.append(float((prob_NC.amax(dim=1) >= 0.6).double().mean()))
        expected = shares[0] if seed == 0 else 0.9 * expected + 0.1 * shares[-1]
        assert float(parts["rho"]) == pytest.approx(expected)
        assert float(parts["loss"]) == pytest.approx(float(found.certain + parts["rho"] * found.shrink))


def test_below_every_threshold_there_is_no_shrink_loss() -> None:
    made, prob_NC = built(6, threshold=1e-9), probabilities(30, 6)
    found = made.unlabelled(prob_NC, prob_NC, prob_NC, prob_NC, torch.ones(30, dtype=torch.bool))
    assert float(found.shrink) == 0
    assert float(found.mask) == 1


# ---------------------------------------------------------------- on a dual encoder


def batch(rows: int = 24, labelled: int = 6, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image_NW, noise_NW = (torch.randn(rows, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    label_N = torch.where(torch.arange(rows) % (rows // labelled) == 0, torch.arange(rows) % 5, -1)
    return {"image_NCHW": image_NW, "view0_NCHW": image_NW + 0.3 * noise_NW, "label_N": label_N, "row_N": torch.arange(rows)}


def seen(model: Vectors, tensors: dict[str, Tensor]) -> Encoded:
    """At a temperature at which some pictures are certain."""
    return encoded(model, tensors, scale=40.0)


def started(**settings: object) -> tuple[ShrinkMatch, Vectors]:
    torch.manual_seed(0)
    model = Vectors().double()
    made = Config.parse({"method": "shrinkmatch", "threshold": 0.6, **settings}).build()
    made.start(context(model, NAMES))
    return made.double(), model


def test_the_main_head_is_made_of_class_names() -> None:
    made, model = started(shrink=False)
    given = seen(model, batch())
    parts = made(given)
    weight_CD = made.prompts.weights(given).detach()
    labelled_N = batch()["label_N"] >= 0
    logits_NC = 40.0 * given.image_ND.detach() @ weight_CD.T
    assert float(parts["supervised"]) == pytest.approx(float(cross_entropy(logits_NC[labelled_N], batch()["label_N"][labelled_N])))
    assert float(parts["loss"].detach()) == pytest.approx(float(parts["supervised"] + parts["certain"]))
    assert "shrink" not in parts
    assert made.auxiliary is None
    assert list(made.parameters()) == []
    assert 0 < float(parts["mask"]) < 1


def test_labels_of_unlabelled_pictures_are_not_looked_at_and_targets_carry_no_gradient() -> None:
    made, model = started(shrink=False)
    only_unlabelled = {**batch(), "label_N": torch.full((24,), -1)}
    given = seen(model, only_unlabelled)
    given.image_ND.retain_grad()
    made(given)["loss"].backward()
    assert given.image_ND.grad is None or not given.image_ND.grad.any(), "the weak view is a target"
    assert model.image.grad.any(), "the strong view learns"


def test_the_shrink_loss_teaches_the_tower_through_its_own_head() -> None:
    made, model = started(threshold=0.9)
    parts = made(seen(model, {**batch(), "label_N": torch.full((24,), -1)}))
    assert 0 < float(parts["settled"]) <= 1
    assert float(parts["shrink"]) > 0
    parts["loss"].backward()
    share = float(parts["rho"])
    assert share > 0
    assert all(parameter.grad is not None and parameter.grad.any() for name, parameter in made.named_parameters() if "0.bias" not in name)
    assert [layer.out_features for layer in auxiliary_head(64, 10) if hasattr(layer, "out_features")] == [16, 16, 10]
    assert made.auxiliary[0].in_features == FEATURES


def test_how_many_unlabelled_pictures_teach_and_whether_their_class_was_spared() -> None:
    tensors = batch()
    unlabelled_N = tensors["label_N"] < 0
    settled: list[float] = []
    for truth in range(5):
        made, model = started(threshold=0.9, truth="true")
        assert made.columns == ("label", "true")
        parts = made(seen(model, {**tensors, "true_N": torch.full((24,), truth)}))
        searched = round((1 - float(parts["mask"])) * int(unlabelled_N.sum()))
        count = round(float(parts["settled"]) * searched)
        assert float(parts["used"]) == pytest.approx(float(parts["mask"]) + count / int(unlabelled_N.sum()))
        settled.append(float(parts["spared"]) * count)
    # Summed over all five classes, each settled picture counts once for every class that its search kept.
    assert sum(settled) == pytest.approx(round(sum(settled)))
    assert count <= sum(settled) <= 4 * count
    plain, model = started(threshold=0.9, shrink=False, truth="true")
    parts = plain(seen(model, {**tensors, "true_N": torch.zeros(24, dtype=torch.int64)}))
    assert float(parts["used"]) == float(parts["mask"])
    assert "spared" not in parts


def test_the_truth_teaches_nothing() -> None:
    losses = []
    for truth in (None, "true"):
        made, model = started(threshold=0.9, truth=truth)
        losses.append(float(made(seen(model, {**batch(), "true_N": torch.arange(24) % 5}))["loss"].detach()))
    assert losses[0] == losses[1]


def test_state_goes_through_a_state_dict() -> None:
    made, model = started()
    for seed in range(3):
        made(seen(model, batch(seed=seed)))
    other, _ = started()
    other.load_state_dict(made.state_dict())
    losses = [float(each(seen(model, batch(seed=9)))["loss"].detach()) for each in (made, other)]
    assert losses[0] == losses[1]
    assert float(other.rho) == float(made.rho) > 0
    assert math.isnan(float(started()[0].rho))


def on_a_rank(rank: int, world: int) -> dict[str, object]:
    """FixMatch and the shrink loss without batch norm, whose statistics are a rank's own; ranks hold unequal numbers of labels."""
    made, model = started(threshold=0.9, rho_decay=0.5)
    made.auxiliary = torch.nn.Linear(FEATURES, 5, bias=False, dtype=torch.float64)
    torch.nn.init.orthogonal_(made.auxiliary.weight, generator=torch.Generator().manual_seed(0))
    for seed in (3, 4):
        whole = batch(seed=seed)
        whole["label_N"] = torch.where(torch.arange(24) < 7, torch.arange(24) % 5, -1)
        share = 24 // world
        own = {name: value[rank * share : (rank + 1) * share] for name, value in whole.items()}
        model.zero_grad()
        made.zero_grad()
        parts = made(seen(model, own))
        parts["loss"].backward()
    return {
        "loss": float(parts["loss"].detach()),
        "grads": [model.image.grad, model.words.grad, made.auxiliary.weight.grad],
        "state": {name: made.get_buffer(name) for name in ("queue_QC", "rho", "mean_C", "next_row")},
    }


def test_two_ranks_learn_what_one_does() -> None:
    single, ranks = on_a_rank(0, 1), run_ranks(2, on_a_rank)
    assert sum(result["loss"] for result in ranks) / 2 == pytest.approx(single["loss"])
    for index, grad in enumerate(single["grads"]):
        assert grad.any()
        torch.testing.assert_close(sum(result["grads"][index] for result in ranks) / 2, grad)
    for name, value in single["state"].items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])
        torch.testing.assert_close(ranks[0]["state"][name], value)


def test_impossible_settings_are_refused() -> None:
    for wrong, hint in (
        ({"threshold": 0.0}, "greater than 0"),
        ({"alignment": "ema"}, "'queue', 'average' or 'none'"),
        ({"tau": 1}, "tau"),
    ):
        with pytest.raises(ConfigError, match=hint):
            Config.parse({"method": "shrinkmatch", **wrong})
    with pytest.raises(ConfigError, match="no classes to name"):
        Config().build().start(context(Vectors(), {}))
