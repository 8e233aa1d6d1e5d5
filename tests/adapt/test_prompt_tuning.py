import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from diptych.adapt import prompt_tuning as tuning
from diptych.core.errors import ConfigError, DataError
from diptych.models import architectures, clip

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}
CLASSES = 3


def model_of(seed=0, **overrides):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return clip.build(architectures.merge(TINY, overrides))


def student_of(model, prompts=4, seed=0):
    head_CD = np.random.default_rng(seed).normal(size=(CLASSES, 8)).astype(np.float32)
    return tuning.Config(prompts=prompts).build(model, head_CD, seed)


def pictures(count=24, seed=0):
    """Pictures of one colour a class, under noise; uint8, with their classes."""
    rng = np.random.default_rng(seed)
    label_N = rng.integers(CLASSES, size=count)
    image_NCHW = rng.integers(0, 120, (count, 3, 16, 16))
    image_NCHW[np.arange(count), label_N] += 100
    return torch.from_numpy(image_NCHW.astype(np.uint8)), torch.from_numpy(label_N)


def one_batch(epoch):
    image_NCHW, label_N = pictures(seed=epoch)
    yield tuning.Views(image_NCHW, image_NCHW, label_N)


def digest(named):
    sha = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        sha.update(name.encode() + tensor.detach().numpy().tobytes())
    return sha.hexdigest()


# ---------------------------------------------------------------- the forward pass


@pytest.mark.parametrize(
    "vision_cfg",
    [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"no_ln_pre": True}, {"attentional_pool": True, "attn_pooler_heads": 2}],
)
def test_without_prompts_the_features_are_the_models_to_the_bit(vision_cfg):
    model = model_of(vision_cfg=vision_cfg).eval()
    student = tuning.PromptTuned(model, torch.zeros(0, 16), torch.zeros(CLASSES, 8))
    image_NCHW, _ = pictures()
    with torch.no_grad():
        assert torch.equal(student.features(image_NCHW), model.encode_image(image_NCHW, normalize=False))


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
def test_prompts_act_through_the_blocks_alone_and_never_through_the_pool(pool_type):
    model = model_of(vision_cfg={"layers": 0, "pool_type": pool_type}).eval()
    image_NCHW, _ = pictures()
    with torch.no_grad():
        torch.testing.assert_close(student_of(model).features(image_NCHW), model.encode_image(image_NCHW, normalize=False), rtol=0, atol=0)
    changed = student_of(model_of(vision_cfg={"pool_type": pool_type}))
    before = changed.features(image_NCHW).detach()
    with torch.no_grad():
        changed.prompts.neg_()  # a constant would not do: the first LayerNorm of a block takes it away
        assert not torch.allclose(changed.features(image_NCHW), before, atol=1e-4)


def test_prompts_have_no_position_and_no_first_norm():
    student = student_of(model_of())
    image_NCHW, _ = pictures()
    seen = []
    student.visual.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    student(image_NCHW)
    (token_NLW,) = seen
    assert token_NLW.shape == (24, 1 + 4 + 4, 16)
    assert torch.equal(token_NLW[:, 1:5], student.prompts.detach().expand(24, -1, -1))
    student.features(image_NCHW[:1])
    assert torch.equal(seen[1][:, :1], token_NLW[:1, :1])


def test_logits_are_plain_products():
    student = student_of(model_of())
    image_NCHW, _ = pictures()
    with torch.no_grad():
        feature_ND = student.features(image_NCHW)
        torch.testing.assert_close(student(image_NCHW), feature_ND @ student.head.T)
    assert not torch.allclose(feature_ND.norm(dim=-1), torch.ones(24), atol=1e-2)


def test_pixels_and_normalised_floats_are_the_same():
    model = model_of()
    student = student_of(model)
    image_NCHW, _ = pictures()
    normal_NCHW = (image_NCHW / 255 - model.mean.view(3, 1, 1)) / model.std.view(3, 1, 1)
    torch.testing.assert_close(student(image_NCHW), student(normal_NCHW))


def test_towers_without_tokens_are_refused():
    resnet = clip.create("rn-nano-64", seed=0)
    with pytest.raises(ConfigError, match="takes no prompts"):
        tuning.Config().build(resnet, np.zeros((2, 128), np.float32), 0)


def test_tensors_that_do_not_fit_are_refused():
    model = model_of()
    for prompts, head in [((2, 15), (3, 8)), ((2, 16), (3, 16)), ((16,), (3, 8))]:
        with pytest.raises(DataError, match="does not fit"):
            tuning.PromptTuned(model, torch.zeros(prompts), torch.zeros(head))


# ---------------------------------------------------------------- what is trained


def test_the_rest_of_the_tower_and_the_model_stay_bit_identical():
    model = model_of()
    student = student_of(model)
    trained = student.trained()
    frozen = {name: tensor for name, tensor in student.named_parameters() if name not in trained}
    whole, rest = digest(model.state_dict()), digest(frozen)
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    student.fit(one_batch, tuning.Config(epochs=3))
    assert (digest(model.state_dict()), digest(frozen)) == (whole, rest)
    assert {"visual.conv1.weight", "visual.proj", "visual.class_embedding", "visual.positional_embedding"} < frozen.keys()
    assert all(not torch.equal(before[name], tensor) for name, tensor in trained.items())


def test_prompts_norms_and_classifier_are_trained_and_only_biases_do_not_decay():
    student = student_of(model_of())
    norms = {f"visual.{name}" for name, module in student.visual.named_modules() if isinstance(module, nn.LayerNorm)}
    assert student.trained().keys() == {"prompts", "head"} | {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
    assert len(norms) == 6
    decayed, undecayed = tuning.adamw(student, tuning.Config()).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"], decayed["lr"]) == (0.01, 0.0, 0.004)
    assert set(undecayed["param_names"]) == {f"{name}.bias" for name in norms}
    assert set(decayed["param_names"]) == {"prompts", "head"} | {f"{name}.weight" for name in norms}


def test_the_tower_stays_in_evaluation_mode():
    student = student_of(model_of(vision_cfg={"patch_dropout": 0.5})).train()
    assert not any(module.training for module in student.visual.modules())
    image_NCHW, _ = pictures()
    assert torch.equal(student(image_NCHW), student(image_NCHW))


@pytest.mark.parametrize(("patch_px", "bound"), [(None, (6 / (3 * 64 + 16)) ** 0.5), (16, (6 / (3 * 256 + 16)) ** 0.5)])
def test_first_prompts_are_uniform_within_the_bound_and_the_seeds(patch_px, bound):
    config = tuning.Config(prompts=200, init_patch_px=patch_px)
    first, again, other = (config.build(model_of(), np.zeros((2, 8), np.float32), seed).prompts for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.99 * bound < float(first.detach().abs().max()) <= bound
    assert abs(float(first.detach().mean())) < 0.05 * bound


# ---------------------------------------------------------------- tuning


def test_smoothing_is_the_mixture_that_the_paper_writes():
    logit_NC = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label_N = torch.tensor([0, 3, 1, 1, 2])
    surprise_NC = -logit_NC.log_softmax(dim=1)
    expected = 0.9 * surprise_NC[torch.arange(5), label_N].mean() + 0.1 * surprise_NC.mean()
    torch.testing.assert_close(tuning.smoothed_cross_entropy(logit_NC, label_N), expected)


def test_tuning_learns_the_teachers_labels():
    student = student_of(model_of())
    fresh = [pictures(count=200, seed=1000)]
    before = student.accuracy(fresh)
    epochs = student.fit(one_batch, tuning.Config(epochs=40, stop="fixed"))
    assert len(epochs) == 40
    assert epochs[-1].loss < epochs[0].loss
    assert {epoch.score for epoch in epochs} == {None}
    assert student.accuracy(fresh) > max(before, 1 / CLASSES) + 0.3


def test_equal_inputs_give_equal_students():
    first, again = (student_of(model_of()) for _ in range(2))
    assert first.fit(one_batch, tuning.Config(epochs=2)) == again.fit(one_batch, tuning.Config(epochs=2))
    assert digest(first.state_dict()) == digest(again.state_dict())


def test_agreement_is_measured_on_weak_views_and_the_best_epoch_is_kept():
    student = student_of(model_of())
    weak_NCHW, label_N = pictures(count=40, seed=7)

    def batches(epoch):
        # From the fourth epoch on the labels teach the wrong colour: agreement with the first teacher is lost.
        yield tuning.Views(weak_NCHW, weak_NCHW, label_N if epoch < 3 else (label_N + 1) % CLASSES)

    first_teacher = [(weak_NCHW, label_N)]
    config = tuning.Config(epochs=30, stop="validation", patience=4)
    epochs = student.fit(batches, config, validation=lambda: first_teacher)
    scores = [epoch.score for epoch in epochs]
    best = scores.index(max(scores))
    assert len(scores) == best + 1 + 4 < 30, "four epochs without improvement after the best, then no more"
    assert student.accuracy(first_teacher) == scores[best] > scores[-1]
    agreeing = student_of(model_of())
    assert [epoch.score for epoch in agreeing.fit(batches, tuning.Config(epochs=3, stop="agreement"))] == scores[:3]


def test_patience_before_and_after_the_first_improvement():
    trained = {"p": nn.Parameter(torch.zeros(1))}
    best = tuning.Best(left=3, patience=2)
    assert [best.is_over(score, trained) for score in (float("-inf"), float("-inf"), 0.5)] == [False, False, False]
    with torch.no_grad():
        trained["p"].fill_(7.0)
    assert [best.is_over(score, trained) for score in (0.5, 0.4)] == [False, True]
    best.restore(trained)
    assert trained["p"].item() == 0.0
    assert best.score == 0.5
    assert tuning.Best(left=1, patience=9).is_over(float("-inf"), trained)


@pytest.mark.parametrize(("stop", "validation"), [("validation", None), ("fixed", lambda: []), ("agreement", lambda: [])])
def test_validation_is_read_if_and_only_if_asked_for(stop, validation):
    with pytest.raises(ConfigError, match="go together"):
        student_of(model_of()).fit(one_batch, tuning.Config(stop=stop), validation)


def test_nothing_to_tune_on_is_refused():
    student = student_of(model_of())
    with pytest.raises(DataError, match="nothing to tune on"):
        student.fit(lambda _: [], tuning.Config())
    with pytest.raises(DataError, match="nothing to tune on"):
        student.fit(one_batch, tuning.Config(stop="validation"), lambda: [])


@pytest.mark.parametrize("label", [-100, CLASSES])
def test_labels_that_are_no_class_are_refused(label):
    image_NCHW, label_N = pictures()
    label_N[3] = label
    with pytest.raises(DataError, match="no class number"):
        student_of(model_of()).fit(lambda _: [tuning.Views(image_NCHW, image_NCHW, label_N)], tuning.Config())
