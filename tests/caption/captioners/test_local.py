"""With a real, random and very small vision encoder-decoder on disk."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.caption.captioners import Picture
from diptych.caption.captioners.local import LocalConfig
from diptych.core.errors import ConfigError, DataError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        PreTrainedTokenizerFast,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    path = tmp_path_factory.mktemp("ved")
    words = {word: index for index, word in enumerate(["<end>", "a", "red", "blue", "square", "on", "white"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(path)
    torch.manual_seed(0)
    vision = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    text = GPT2Config(
        vocab_size=len(words), n_positions=32, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True, bos_token_id=0, eos_token_id=0
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 0
    model = VisionEncoderDecoderModel(config=config)
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def picture(row: int) -> Picture:
    pixels = np.random.default_rng(row).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Picture(f"key-{row}", file.getvalue())


def build(folder: Path, **fields: Any) -> Any:
    return LocalConfig(path=str(folder), batch_size=2, max_new_tokens=5).model_copy(update=fields).build()


def test_every_picture_gets_words_of_the_model_whatever_its_neighbours(folder: Path) -> None:
    pictures = [picture(row) for row in range(5)]
    answers = build(folder).caption(pictures)
    assert len(answers) == 5
    assert all(answer is None or set(answer.split()) <= {"a", "red", "blue", "square", "on", "white"} for answer in answers)
    assert any(answers)
    assert answers == [build(folder, batch_size=1).caption([each])[0] for each in pictures]
    assert len(build(folder, beams=3).caption(pictures)) == 5
    assert build(folder).caption([]) == []


def test_it_travels_without_its_weights(folder: Path) -> None:
    first = build(folder)
    first.caption([picture(0)])
    assert len(pickle.dumps(first)) < 2000
    assert pickle.loads(pickle.dumps(first)).caption([picture(0)]) == first.caption([picture(0)])


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no captioner"):
        LocalConfig(path=str(tmp_path)).build()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        LocalConfig(path=str(tmp_path)).build().caption([picture(0)])
    with pytest.raises(DataError, match="cannot be decoded") as error:
        build(folder).caption([Picture("broken", b"no picture")])
    assert "broken" in str(error.value)
