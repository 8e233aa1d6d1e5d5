import numpy as np
import pytest
import torch

from diptych.adapt import nola
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Examples, Support

CLASSES, WIDTH, AUXILIARY = 4, 16, 8


def probabilities(*rows):
    return np.asarray(rows, dtype=np.float64)


def selected(selection):
    return list(zip(selection.row_S.tolist(), selection.label_S.tolist(), strict=True))


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def target(pictures=400, noise=0.55, seed=0, **auxiliary):
    """CLIP's features say little about the class, the other encoder's say nearly all of it, in directions of its own."""
    rng = np.random.default_rng(seed)
    label_N = rng.integers(CLASSES, size=pictures)
    text_CD = np.eye(CLASSES, WIDTH, dtype=np.float32)
    feature_ND = unit(text_CD[label_N] + noise * rng.normal(size=(pictures, WIDTH)))
    centre_CE = np.random.default_rng(99).normal(size=(CLASSES, AUXILIARY))
    auxiliary_NE = (centre_CE[label_N] + 0.3 * rng.normal(size=(pictures, AUXILIARY))).astype(np.float32)
    return text_CD, Examples(feature_ND, **({"auxiliary_NE": auxiliary_NE} | auxiliary)), label_N


def support(text_CD, unlabelled, seed=0):
    return Support(text_CD, logit_scale=100.0, unlabelled=unlabelled, seed=seed)


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("pictures", "classes", "k"), [(1000, 10, 20), (159, 2, 16), (800, 10, 16), (849, 10, 16), (850, 10, 17), (3, 7, 16)]
)
def test_a_fifth_of_the_even_part_and_never_under_sixteen(pictures, classes, k):
    assert nola.pictures_per_class(pictures, classes) == k


def test_share_and_floor_can_be_chosen():
    assert nola.pictures_per_class(100, 10, share=0.5, least=2) == 5


# ---------------------------------------------------------------- which


def test_the_surest_of_every_class_in_falling_order():
    p = probabilities([0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.45, 0.55])
    found = nola.select_pseudo_labels(p, 2)
    assert selected(found) == [(1, 0), (3, 0), (2, 1), (4, 1)]
    assert found.confidence_S.tolist() == [0.9, 0.7, 0.8, 0.55]


def test_a_class_that_is_nobodys_first_choice_takes_second_choices_and_records_the_first_probability():
    p = probabilities([0.6, 0.1, 0.3], [0.5, 0.1, 0.4], [0.1, 0.8, 0.1], [0.7, 0.25, 0.05])
    found = nola.select_pseudo_labels(p, 1)
    # Row 1 would choose class 2 with 0.4, row 0 with 0.3; the first choice of row 1 has 0.5.
    assert selected(found) == [(3, 0), (2, 1), (1, 2)]
    assert found.confidence_S.tolist() == [0.7, 0.8, 0.5]


def test_a_class_that_is_nobodys_first_or_second_choice_takes_third_choices():
    p = probabilities([0.5, 0.3, 0.15, 0.05], [0.3, 0.5, 0.05, 0.15], [0.6, 0.3, 0.08, 0.02], [0.1, 0.5, 0.05, 0.35])
    found = nola.select_pseudo_labels(p, 1)
    assert selected(found) == [(2, 0), (1, 1), (0, 2), (3, 3)]
    assert found.confidence_S.tolist() == [0.6, 0.5, 0.5, 0.5]


def test_second_choices_are_not_looked_at_where_there_are_first_ones():
    p = probabilities([0.9, 0.1], [0.51, 0.49], [0.4, 0.6])
    assert selected(nola.select_pseudo_labels(p, 5))[2:] == [(2, 1)]


def test_a_picture_stays_with_the_first_class_that_chose_it():
    # Class 1 is nobody's first choice; both its candidates were taken by class 0, so it ends with none.
    p = probabilities([0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7])
    found = nola.select_pseudo_labels(p, 2)
    assert selected(found) == [(0, 0), (1, 0), (2, 2)]
    # With k = 1 only the surer one was taken, and the class's best candidate is still free.
    assert selected(nola.select_pseudo_labels(p, 1)) == [(0, 0), (1, 1), (2, 2)]


def test_ties_go_to_the_lower_class_and_the_earlier_row():
    p = probabilities([0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.1, 0.9])
    assert selected(nola.select_pseudo_labels(p, 1)) == [(0, 0), (2, 1)]


def test_a_class_that_is_nobodys_choice_is_refused_and_more_choices_find_it():
    p = probabilities([0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1])
    with pytest.raises(DataError, match="choices") as caught:
        nola.select_pseudo_labels(p, 1)
    assert caught.value.problems[0].where == "class 3"
    # Looked for further down, the classes without a first choice may find their candidates taken already.
    assert set(nola.select_pseudo_labels(p, 1, choices=9).label_S.tolist()) == {0, 1}


def test_only_the_classes_asked_for_are_selected_for():
    p = probabilities([0.6, 0.4], [0.9, 0.1], [0.2, 0.8])
    assert selected(nola.select_pseudo_labels(p, 1, classes=np.array([1, 1]))) == [(2, 1)]


def test_the_probabilities_stay_as_they_are():
    p = probabilities([0.6, 0.4], [0.2, 0.8])
    before = p.copy()
    nola.select_pseudo_labels(p, 1)
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize("p", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan, 1.0]])])
def test_what_is_no_table_of_probabilities_is_refused(p):
    with pytest.raises(DataError, match="finite"):
        nola.select_pseudo_labels(p, 1)


def test_probabilities_are_a_softmax_that_does_not_saturate():
    text_CD = np.eye(2, dtype=np.float32)
    feature_ND = np.array([[1.0, 0.0], [0.9999, 0.0], [0.6, 0.8]], dtype=np.float32)
    p = nola.zero_shot_probabilities(feature_ND, text_CD, 30.0)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-15)
    np.testing.assert_allclose(p[2, 1] / p[2, 0], np.exp(30 * 0.2), rtol=1e-5)
    assert p[0, 0] > p[1, 0], "in float32 both are exactly 1"


# ---------------------------------------------------------------- the adapter


def test_the_head_beats_the_zero_shot_classifier_it_learned_from_without_a_label():
    text_CD, unlabelled, label_N = target(pictures=400)
    _, test, truth_N = target(pictures=400, seed=1)
    adapter = nola.Config().build().fit(support(text_CD, unlabelled))
    zero_shot = (test.feature_ND @ text_CD.T).argmax(axis=1)
    scores_NC = adapter.predict(test)
    assert scores_NC.dtype == np.float32
    assert scores_NC.shape == (400, CLASSES)
    assert (zero_shot == truth_N).mean() < 0.8
    assert (scores_NC.argmax(axis=1) == truth_N).mean() > (zero_shot == truth_N).mean() + 0.15
    chosen = adapter.selection
    assert (chosen.label_S == label_N[chosen.row_S]).mean() > (zero_shot == truth_N).mean()
    assert np.mean(adapter.losses[-3:]) < np.mean(adapter.losses[:3])
    np.testing.assert_array_equal(adapter.pseudo_labels(test), scores_NC.argmax(axis=1))


def test_labels_of_the_unlabelled_set_change_nothing_by_default():
    text_CD, unlabelled, label_N = target(pictures=200)
    with_labels = Examples(unlabelled.feature_ND, label_N=label_N * 0, auxiliary_NE=unlabelled.auxiliary_NE)
    blind, seeing = (nola.Config(epochs=2).build().fit(support(text_CD, u)) for u in (unlabelled, with_labels))
    np.testing.assert_array_equal(blind.predict(unlabelled), seeing.predict(unlabelled))


def test_the_released_loop_selects_for_the_classes_of_the_ground_truth():
    text_CD, unlabelled, label_N = target(pictures=200)
    config = nola.Config(classes="present", epochs=1)
    known = Examples(unlabelled.feature_ND, label_N=np.minimum(label_N, 1), auxiliary_NE=unlabelled.auxiliary_NE)
    assert set(config.build().fit(support(text_CD, known)).selection.label_S.tolist()) == {0, 1}
    for labels in (None, label_N + 1):
        wrong = Examples(unlabelled.feature_ND, label_N=labels, auxiliary_NE=unlabelled.auxiliary_NE)
        with pytest.raises(DataError, match="classes: all"):
            config.build().fit(support(text_CD, wrong))


def test_the_seed_names_the_head_and_nothing_else_does():
    text_CD, unlabelled, _ = target(pictures=200)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (nola.Config(epochs=2).build().fit(support(text_CD, unlabelled, seed)).predict(unlabelled) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_first_view_of_a_picture_is_used():
    text_CD, unlabelled, _ = target(pictures=200)
    picture_N = np.repeat(np.arange(100), 2)
    views = Examples(unlabelled.feature_ND, picture_N=picture_N, auxiliary_NE=unlabelled.auxiliary_NE)
    single = Examples(unlabelled.feature_ND[::2], auxiliary_NE=unlabelled.auxiliary_NE[::2])
    of_views, of_single = (nola.Config(epochs=1).build().fit(support(text_CD, u)) for u in (views, single))
    np.testing.assert_array_equal(of_views.selection.row_S, 2 * of_single.selection.row_S)
    np.testing.assert_array_equal(of_views.predict(single), of_single.predict(single))


def test_what_it_needs_is_said_and_its_absence_refused():
    text_CD, unlabelled, _ = target(pictures=40)
    assert nola.Nola.needs == {"unlabelled", "auxiliary"}
    auxiliary_NE = unlabelled.auxiliary_NE
    for broken, where in [
        (None, "support.unlabelled"),
        (Examples(np.zeros((0, WIDTH), np.float32)), "support.unlabelled"),
        (Examples(unlabelled.feature_ND), "support.unlabelled.auxiliary_NE"),
        (Examples(unlabelled.feature_ND, auxiliary_NE=auxiliary_NE[1:]), "support.unlabelled.auxiliary_NE"),
        (Examples(unlabelled.feature_ND, auxiliary_NE=auxiliary_NE * np.float32(np.nan)), "support.unlabelled.auxiliary_NE"),
    ]:
        with pytest.raises(DataError) as caught:
            nola.Config().build().fit(support(text_CD, broken))
        assert caught.value.problems[0].where == where


def test_pictures_that_the_head_cannot_see_are_refused():
    text_CD, unlabelled, _ = target(pictures=200)
    adapter = nola.Config(epochs=1).build().fit(support(text_CD, unlabelled))
    for auxiliary_NE in (None, unlabelled.auxiliary_NE[:, 1:]):
        with pytest.raises(DataError, match="second encoder"):
            adapter.predict(Examples(unlabelled.feature_ND, auxiliary_NE=auxiliary_NE))


def test_the_head_is_the_papers():
    head = nola.labelling_head(768, 10)
    assert [tuple(p.shape) for p in head.parameters()] == [(256, 768), (256,), (10, 256), (10,)]
    assert isinstance(head[1], torch.nn.ReLU)


def test_the_configuration_is_strict():
    assert nola.Config.parse({"method": "nola", "classes": "present"}).classes == "present"
    with pytest.raises(ConfigError):
        nola.Config.parse({"share": 0.0})
