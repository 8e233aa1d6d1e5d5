"""A text tower of Hugging Face behind the dual encoder, as BiomedCLIP has it: long context, padding that does not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diptych.models import architectures, clip
from diptych.models.tokenizer import for_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cell", "nodule", "##s", "ct", "of", "the"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights: the files that a published one has."""
    folder = tmp_path_factory.mktemp("bert")
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(WORDS), "hidden_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 40, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    return folder


@pytest.fixture(scope="module")
def model(tower: Path) -> clip.DualEncoder:
    released = architectures.find("biomedclip")
    text = {**released["text_cfg"], "hf_model_name": str(tower), "hf_tokenizer_name": str(tower), "context_length": 24}
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 32, "patch_size": 8}
    return clip.build({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}).eval()


def test_the_context_is_that_of_the_configuration(model: clip.DualEncoder) -> None:
    assert model.context_length == 24
    assert model.tokenizer.encode(["a cell"]).shape == (1, 24)


def test_a_batch_is_cut_to_its_longest_caption(model: clip.DualEncoder) -> None:
    text_NL = model.tokenizer.encode_cut(["CT of the nodules", "a cell"])
    assert text_NL.tolist() == [[2, 9, 10, 11, 7, 8, 3], [2, 5, 6, 3, 0, 0, 0]]


def test_padding_changes_neither_features_nor_gradients(model: clip.DualEncoder) -> None:
    texts = ["ct of the nodules", "a cell"]
    found = []
    for encode in (model.tokenizer.encode, model.tokenizer.encode_cut):
        model.zero_grad()
        feature_ND = model.encode_text(torch.from_numpy(encode(texts)), normalize=False)
        feature_ND.square().sum().backward()
        weight = model.clip.text.transformer.embeddings.word_embeddings.weight
        found.append((feature_ND.detach(), weight.grad.clone()))
    (full_ND, full_grad), (cut_ND, cut_grad) = found
    torch.testing.assert_close(cut_ND, full_ND, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cut_grad, full_grad, rtol=1e-4, atol=1e-6)
    alone_ND = model.encode_text(torch.from_numpy(model.tokenizer.encode_cut(texts[1:])), normalize=False)
    torch.testing.assert_close(alone_ND, full_ND[1:].detach(), rtol=1e-4, atol=1e-6)


def test_the_projection_is_two_layers_without_bias(model: clip.DualEncoder) -> None:
    shapes = [tuple(parameter.shape) for parameter in model.clip.text.proj.parameters()]
    assert shapes == [((12 + 8) // 2, 12), (8, (12 + 8) // 2)]


def test_a_tokenizer_of_unknown_padding_does_not_cut(tower: Path) -> None:
    assert for_model({"hf_tokenizer_name": str(tower), "tokenizer_mode": "clips"}, 9).pad_id is None  # type: ignore[union-attr]
