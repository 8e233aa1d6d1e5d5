import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diptych.core.errors import ConfigError, DataError
from diptych.models import architectures, clip, store
from diptych.models.tokenizer import EOT, ForeignTokenizer, Tokenizer

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a cat", "a photo of a dog!", "naïve 😀", ""]


def tiny(seed=0, **overrides):
    torch.manual_seed(seed)
    return clip.build(architectures.merge(TINY, overrides))


def images(count=4, size=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def tokens(model, texts=TEXTS):
    return torch.from_numpy(model.tokenizer.encode(texts)), torch.from_numpy(model.tokenizer.encode_cut(texts))


# ---------------------------------------------------------------- features


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"custom_text": True},
        {"quick_gelu": True},
        {"custom_text": True, "text_cfg": {"proj_bias": True}},
        {"custom_text": True, "text_cfg": {"proj_type": "none", "width": 16}},
        {"text_cfg": {"pool_type": "eos", "eos_id": EOT}},
    ],
)
def test_cut_captions_have_the_features_and_gradients_of_the_whole_context(overrides):
    model = tiny(**overrides).double()
    whole_NL, cut_NL = tokens(model)
    assert cut_NL.shape[1] < whole_NL.shape[1]
    weight_ND = torch.randn(len(TEXTS), 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for feature_ND in (model.clip.encode_text(whole_NL, normalize=True), model.encode_text(cut_NL)):
        model.zero_grad()
        (feature_ND * weight_ND).sum().backward()
        gradients.append((feature_ND.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=1e-12)
    assert gradients[0][1].keys() == gradients[1][1].keys()
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradient, gradients[1][1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "text_cfg", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}, {"pool_type": "first", "no_causal_mask": True}]
)
def test_towers_that_see_padding_get_it_back(text_cfg):
    model = tiny(custom_text=True, text_cfg=text_cfg)
    whole_NL, cut_NL = tokens(model)
    expected_ND = model.clip.encode_text(whole_NL, normalize=True)
    torch.testing.assert_close(model.encode_text(cut_NL), expected_ND, rtol=0, atol=1e-6)


def test_full_length_captions_and_longer_ones():
    model = tiny()
    whole_NL = torch.from_numpy(model.tokenizer.encode(["word " * 50]))
    torch.testing.assert_close(model.encode_text(whole_NL), model.clip.encode_text(whole_NL, normalize=True))
    with pytest.raises(DataError, match="context"):
        model.encode_text(torch.zeros(1, 21, dtype=torch.int64))


def test_raw_pixels_equal_open_clips_transform():
    model = tiny()
    image = Image.fromarray(images(1, 24).numpy()[0].transpose(1, 2, 0))
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**model.preprocess_cfg), is_train=False)
    from diptych.models.preprocess import preprocess

    pixels_1CHW = torch.from_numpy(preprocess(image, model.image_size)).permute(2, 0, 1)[None]
    expected_1D = model.clip.encode_image(transform(image)[None], normalize=True)
    torch.testing.assert_close(model.encode_image(pixels_1CHW), expected_1D, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_image(transform(image)[None]), expected_1D)


def test_forward_gives_unit_features_and_the_exponentiated_scale():
    model = tiny()
    image_ND, text_ND, scale = model(images(), tokens(model)[1])
    torch.testing.assert_close(image_ND.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(text_ND.norm(dim=-1), torch.ones(4))
    assert scale.item() == pytest.approx(1 / 0.07)
    assert model.logit_scale is model.clip.logit_scale
    assert model.logit_bias is None
    assert model.encode_image(images(), normalize=False).norm(dim=-1).sub(1).abs().min() > 1e-3


def test_an_open_clip_model_can_be_wrapped_as_it_is():
    reference = open_clip.CLIP(**TINY)
    model = clip.DualEncoder(reference)
    assert (model.image_size, model.context_length) == (16, 20)
    assert model.encode_image(images()).shape == (4, 16)
    assert pickle.loads(pickle.dumps(model)).encode_image(images()).shape == (4, 16)


def test_only_square_images():
    with pytest.raises(ConfigError, match="square"):
        tiny(vision_cfg={"image_size": [16, 24]})


def test_the_tokenizer_is_what_the_configuration_asks_for():
    assert isinstance(tiny().tokenizer, Tokenizer)
    from diptych.models.tokenizer import for_model

    canonical = for_model({"tokenizer_kwargs": {"clean": "canonicalize"}}, 12)
    assert isinstance(canonical, ForeignTokenizer)
    np.testing.assert_array_equal(canonical.encode(["A cat, a dog!"]), Tokenizer(12).encode(["a cat a dog"]))


# ---------------------------------------------------------------- names and creation


def test_names_are_cheap_complete_and_ours_first():
    ours = sorted(path.stem for path in architectures.OURS.glob("*.json"))
    assert clip.names()[: len(ours)] == ours
    assert set(open_clip.list_models()) <= set(clip.names())


@pytest.mark.parametrize("name", ["rn-nano-64", "vit-nano-64", "vit-micro-40"])
def test_our_small_architectures(name):
    model = clip.create(name, 0)
    assert (model.context_length, model.config["text_cfg"]["vocab_size"]) == (77, 49408)
    assert str(model.image_size) in name
    counts = clip.parameters_by_part(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.clip.parameters())
    image_ND, text_ND, _ = model(images(2, model.image_size), tokens(model)[1][:2])
    assert image_ND.shape == text_ND.shape == (2, model.config["embed_dim"])


def test_one_seed_one_model_whatever_came_before():
    first = clip.create("vit-micro-40", 3).state_dict()
    torch.rand(17)
    before = torch.get_rng_state()
    second, other = clip.create("vit-micro-40", 3).state_dict(), clip.create("vit-micro-40", 4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["clip.visual.conv1.weight"], other["clip.visual.conv1.weight"])


def test_overrides_reach_the_architecture():
    model = clip.create("vit-micro-40", 0, {"vision_cfg": {"layers": 1}, "quick_gelu": True})
    assert len(model.clip.visual.transformer.resblocks) == 1
    assert type(model.clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert json.loads(architectures.files()["vit-micro-40"].read_text())["vision_cfg"]["layers"] != 1
    with pytest.raises(ConfigError, match="describes no model"):
        clip.create("vit-micro-40", 0, {"vision_cfg": {"layer": 1}})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit-nano-65", "vit-nano-64"),
        ("ViT-B-33", "ViT-B-32"),
        ("open_clip:ViT-B-33/laion2b_s34b_b79k", "ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79q", "laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32", "ViT-B-32"),
    ],
)
def test_unknown_names_are_told_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=hint):
        clip.create(name, 0)


def test_published_weights_go_through_open_clip(monkeypatch, tmp_path):
    """Weights of a tag, from a stand-in for the hub: the file lies where open_clip's download would put it."""
    source = clip.create("ViT-B-32-quickgelu", 1, {"vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}})
    save_file(source.clip.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", source.config | {"quick_gelu": False})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.safetensors"))
    model = clip.create("open_clip:ViT-B-32/openai", 0)
    assert model.config["quick_gelu"] is True
    torch.testing.assert_close(model.encode_image(images(1, 224)), source.encode_image(images(1, 224)))


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(DataError, match="fetched"):
        clip.create("open_clip:ViT-B-32/laion2b_s34b_b79k", 0)


# ---------------------------------------------------------------- directories


@pytest.mark.parametrize("overrides", [{}, {"custom_text": True}, {"quick_gelu": True}, {"init_logit_bias": -10.0}])
def test_a_saved_model_opens_in_open_clip_with_equal_features(tmp_path, overrides):
    model = tiny(**overrides)
    clip.save(model, tmp_path / "model", {"run": "r1"})
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    ours = clip.load(tmp_path / "model")
    whole_NL, cut_NL = tokens(model)
    image = Image.fromarray(images(1, 30).numpy()[0].transpose(1, 2, 0))
    float_1CHW = transform(image)[None]
    assert tuple(float_1CHW.shape) == (1, 3, 16, 16)
    for other in (theirs, ours):
        torch.testing.assert_close(other.encode_image(float_1CHW, normalize=True), model.encode_image(float_1CHW))
    torch.testing.assert_close(theirs.encode_text(whole_NL, normalize=True), model.encode_text(cut_NL), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.encode_text(cut_NL), model.encode_text(cut_NL))
    np.testing.assert_array_equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(TEXTS).numpy(), ours.tokenizer.encode(TEXTS))
    assert store.read_lineage(tmp_path / "model") == {"run": "r1"}
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


CONVOLUTIONS = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}


def test_convolutions_lie_channels_last_and_are_stored_plainly(tmp_path):
    torch.manual_seed(0)
    model = clip.build(TINY | {"vision_cfg": CONVOLUTIONS}).eval()
    weight = model.clip.visual.layer1[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    clip.save(model, tmp_path / "m", {})
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'm'}").eval()
    assert theirs.visual.layer1[0].conv2.weight.is_contiguous()
    image_NCHW = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.encode_image(image_NCHW), theirs.encode_image(image_NCHW, normalize=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.load(tmp_path / "m").eval().encode_image(image_NCHW), model.encode_image(image_NCHW))


def test_preprocessing_is_saved_with_the_model(tmp_path):
    model = clip.build(TINY, {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash", "interpolation": "bilinear"})
    clip.save(model, tmp_path / "m", {})
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'm'}")
    ours = clip.create(f"local-dir:{tmp_path / 'm'}", 0)
    assert ours.preprocess_cfg == model.preprocess_cfg == {**theirs.visual.preprocess_cfg, "size": 16}
    assert ours.mean.tolist() == [0.5, 0.5, 0.5]


def test_saving_replaces_the_model_that_was_there(tmp_path):
    clip.save(tiny(0), tmp_path / "m", {"n": 1})
    (tmp_path / "m" / "stray").touch()
    clip.save(tiny(1), tmp_path / "m", {"n": 2})
    assert store.read_lineage(tmp_path / "m") == {"n": 2}
    assert {path.name for path in (tmp_path / "m").iterdir()} == {store.CONFIG, store.WEIGHTS, store.LINEAGE}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_old_model(tmp_path):
    clip.save(tiny(0), tmp_path / "m", {"n": 1})
    with pytest.raises(TypeError):
        clip.save(tiny(1), tmp_path / "m", {"n": object()})
    assert store.read_lineage(tmp_path / "m") == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_masks_are_kept_and_open_clip_does_not_mind(tmp_path):
    model = tiny()
    layer = model.clip.visual.transformer.resblocks[0].mlp.c_fc
    mask = torch.rand(layer.weight.shape) > 0.5
    layer.weight.data *= mask
    layer.register_buffer("weight_mask", mask)
    clip.save(model, tmp_path / "m", {})
    loaded = clip.load(tmp_path / "m").clip.visual.transformer.resblocks[0].mlp.c_fc
    assert torch.equal(loaded.weight_mask, mask)
    assert torch.equal(loaded.weight, layer.weight)
    open_clip.create_model(f"local-dir:{tmp_path / 'm'}", require_pretrained=True)


def test_open_clips_own_directories_can_be_read(tmp_path):
    model = tiny()
    (tmp_path / store.CONFIG).write_text(json.dumps({"model_cfg": model.config, "preprocess_cfg": {}}))
    torch.save(model.clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    torch.testing.assert_close(clip.create(str(tmp_path), 0).encode_image(images()), model.encode_image(images()))


def _drop(name):
    return lambda folder: (folder / name).unlink()


def _cut_weights(folder):
    data = (folder / store.WEIGHTS).read_bytes()
    (folder / store.WEIGHTS).write_bytes(data[: len(data) // 2])


def _other_shape(folder):
    state = load_file(folder / store.WEIGHTS)
    save_file(state | {"positional_embedding": torch.zeros(10, 32)}, folder / store.WEIGHTS)


def _missing_parameter(folder):
    state = load_file(folder / store.WEIGHTS)
    del state["ln_final.weight"]
    save_file(state, folder / store.WEIGHTS)


@pytest.mark.parametrize(
    ("harm", "headline"),
    [
        (_drop(store.CONFIG), "missing"),
        (_drop(store.WEIGHTS), "missing"),
        (_cut_weights, "cannot be read"),
        (_other_shape, "do not fit"),
        (_missing_parameter, "do not fit"),
        (lambda folder: (folder / store.CONFIG).write_text("{"), "not JSON"),
        (lambda folder: (folder / store.CONFIG).write_text("{}"), "no architecture"),
    ],
)
def test_a_harmed_directory_is_a_data_error(tmp_path, harm, headline):
    clip.save(tiny(), tmp_path / "m", {})
    harm(tmp_path / "m")
    with pytest.raises(DataError, match=headline):
        clip.load(tmp_path / "m")


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="missing"):
        clip.create(f"local-dir:{tmp_path / 'nowhere'}", 0)
    clip.save(tiny(), tmp_path / "m", {})
    with pytest.raises(ConfigError, match="overrides"):
        clip.create(f"local-dir:{tmp_path / 'm'}", 0, {"embed_dim": 3})
