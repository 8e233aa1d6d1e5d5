from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize as unit

from diptych.evaluate import encode, retrieval, zero_shot
from diptych.evaluate.encode import ModelEncoder, encode_images, encode_texts
from diptych.models.tokenizer import Tokenizer


class SmallDual(nn.Module):
    """The surface of a dual encoder that encoding uses. A text's feature mixes its tokens up to the end token, whatever the padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(49408, 6)
        self.pixel = nn.Linear(3 * 4 * 4, 6)
        self.drop = nn.Dropout(0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.tokenizer = Tokenizer(77)
        self.preprocess_cfg = {"size": 4}
        self.text_shapes: list[tuple[int, ...]] = []
        self.image_shapes: list[tuple[int, ...]] = []

    def encode_text(self, text_NL: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        assert normalize
        assert not torch.is_grad_enabled()
        self.text_shapes.append(tuple(text_NL.shape))
        weight = (torch.arange(text_NL.shape[1]) <= text_NL.argmax(1, keepdim=True)) / (1.0 + torch.arange(text_NL.shape[1]))
        return self.drop(unit((self.token(text_NL) * weight[..., None]).sum(1), dim=-1))

    def encode_image(self, image_NCHW: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        assert normalize
        assert image_NCHW.dtype == torch.uint8
        self.image_shapes.append(tuple(image_NCHW.shape))
        return self.drop(unit(self.pixel(image_NCHW.flatten(1) / 255), dim=-1))


@pytest.fixture
def model():
    return SmallDual()


TEXTS = ["a cat", "!", "a " + "very " * 90 + "long text", "a photo of a small dog that runs", "a cat", "", "two red cats", "a cat"]


def test_texts_come_back_in_order_whatever_the_batches(model):
    text_NL = torch.from_numpy(model.tokenizer.encode(TEXTS))
    model.eval()
    with torch.no_grad():
        expected = model.encode_text(text_NL).numpy()
    for batch_size in (1, 3, 256):
        assert encode_texts(model, TEXTS, batch_size) == pytest.approx(expected, abs=1e-6)
    assert encode_texts(model, TEXTS).dtype == np.float32


def test_equal_texts_are_encoded_once_and_batches_are_cut(model):
    encode_texts(model, TEXTS, batch_size=2)
    assert sum(rows for rows, _ in model.text_shapes) == len(set(TEXTS)) == 6
    assert [length for _, length in model.text_shapes] == [3, 5, 77]


def test_texts_are_tokenised_in_bounded_blocks(model, monkeypatch):
    whole = encode_texts(model, TEXTS)
    monkeypatch.setattr(encode, "TEXTS_HELD", 2)
    model.text_shapes.clear()
    assert encode_texts(model, TEXTS) == pytest.approx(whole, abs=1e-6)
    assert len(model.text_shapes) == 3


def test_images_are_joined_and_cut_to_batches(model):
    image = np.random.default_rng(0).integers(0, 256, (11, 3, 4, 4), dtype=np.uint8)
    model.eval()
    with torch.no_grad():
        expected = model.encode_image(torch.from_numpy(image)).numpy()
    for cuts in ([], [1, 2, 9], [4, 8]):
        model.image_shapes.clear()
        found = encode_images(model, np.split(image, cuts), batch_size=4)
        assert found == pytest.approx(expected, abs=1e-6)
        assert [shape[0] for shape in model.image_shapes] == [4, 4, 3]


def test_nothing_to_encode(model):
    assert encode_images(model, []).shape[0] == 0
    assert encode_texts(model, []).shape[0] == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_put_back(model, training):
    model.train(training)
    first, second = encode_texts(model, ["a cat"]), encode_texts(model, ["a cat"])
    assert model.training is training
    assert (first == second).all()  # no dropout


def test_model_encoder_reads_pixels_in_blocks(model, monkeypatch):
    monkeypatch.setattr(encode, "READ", 3)
    pairs = pl.DataFrame({"key": [f"k{i}" for i in range(7)], "shade": list(range(7))})
    asked = []

    def load_pixels(rows):
        asked.append(rows["key"].to_list())
        return np.stack([np.full((3, 4, 4), 30 * shade, np.uint8) for shade in rows["shade"]])

    encoder = ModelEncoder(model, load_pixels, batch_size=2)
    feature = encoder.images(pairs)
    assert [len(keys) for keys in asked] == [3, 3, 1]
    assert [shape[0] for shape in model.image_shapes] == [2, 2, 2, 1]
    assert encoder.images(pairs[[6, 2]]) == pytest.approx(feature[[6, 2]], abs=1e-6)
    assert encoder.logit_scale == pytest.approx(np.exp(2.0))
    assert encoder.settings == {"size": 4}
    assert encoder.texts(["x", "y"]).shape == (2, 6)
    assert ModelEncoder(model, load_pixels, settings={"crop": "centre"}).settings == {"crop": "centre"}


class Darker:
    """Halves pictures whose key ends in an even digit, and notes what it was given."""

    tag = "darker"

    def __init__(self):
        self.keys = []

    def __call__(self, keys, image_NHWC):
        self.keys += keys
        assert image_NHWC.shape == (len(keys), 4, 4, 3)
        even = np.array([int(key[-1]) % 2 == 0 for key in keys])
        return np.where(even[:, None, None, None], image_NHWC // 2, image_NHWC).astype(np.uint8)


def test_model_encoder_encodes_transformed_pictures(model, monkeypatch):
    monkeypatch.setattr(encode, "READ", 3)
    image = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), dtype=np.uint8)
    image.flags.writeable = False
    pairs = pl.DataFrame({"key": [f"k{i}" for i in range(7)], "row": list(range(7))})
    darker = Darker()
    found = ModelEncoder(model, lambda rows: image[rows["row"].to_numpy()]).images(pairs, darker)
    assert darker.keys == pairs["key"].to_list()
    halved = np.where((np.arange(7) % 2 == 0)[:, None, None, None], image // 2, image)
    assert found == pytest.approx(encode_images(model, [halved]), abs=1e-6)


def test_a_transform_that_changes_the_shape_is_a_bug():
    class Cropped:
        tag = "cropped"

        def __call__(self, keys, image_NHWC):
            return image_NHWC[:, 1:]

    with pytest.raises(AssertionError, match="cropped"):
        list(encode.transformed([np.zeros((2, 3, 4, 4), np.uint8)], ["a", "b"], Cropped()))


def test_another_tokenizer_is_left_alone(model):
    """Its end token need not have the largest id, so its batches are neither sorted nor cut."""
    ids = np.array([[5, 9, 1, 0], [5, 1, 0, 0], [9, 5, 1, 0]])
    model.tokenizer = type("Foreign", (), {"encode_cut": lambda self, texts: ids[: len(texts)]})()
    encode_texts(model, ["a", "b", "c"], batch_size=2)
    assert model.text_shapes == [(2, 4), (1, 4)]


@pytest.fixture(scope="module")
def clip():
    from diptych.models.clip import create

    return create("vit-micro-40", seed=0).eval()


def test_a_dual_encoder_of_ours(clip):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 3, clip.image_size, clip.image_size), dtype=np.uint8)
    texts = ["a cat", "", "a photo of two dogs in the snow", "naïve café", "word " * 99]
    encoder = ModelEncoder(clip, lambda rows: image[rows["row"].to_numpy()])
    with torch.no_grad():
        image_ND, text_ND, scale = clip(torch.from_numpy(image), torch.from_numpy(clip.tokenizer.encode(texts)))
    assert encoder.images(pl.DataFrame({"row": range(5)})) == pytest.approx(image_ND.numpy(), abs=1e-5)
    assert encoder.texts(texts) == pytest.approx(text_ND.numpy(), abs=1e-5)
    assert encoder.logit_scale == pytest.approx(float(scale))


def test_rows_of_a_dual_encoder_name_its_preprocessing(clip, pairs_of):
    image = np.random.default_rng(0).integers(0, 256, (6, 3, clip.image_size, clip.image_size), dtype=np.uint8)
    pairs = pairs_of([str(i) for i in range(6)], [["a dot"]] * 6, label=[0, 1, 2] * 2, label_name=["a", "b", "c"] * 2)
    encoder = ModelEncoder(clip, lambda rows: image[rows["key"].cast(int).to_numpy()])
    for config in (zero_shot.Config(), retrieval.Config()):
        rows = config.build().run(encoder, pairs, "dots", seed=0)
        assert rows[0].settings["preprocessing"]["size"] == clip.image_size
        assert json.loads(json.dumps(rows[0].settings)) == rows[0].settings
        assert all(row.low <= row.value <= row.high for row in rows)
