"""The small CoCa of the package, held against open_clip's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diptych.core.errors import ConfigError
from diptych.models import clip, preprocess
from diptych.models.captioner import Captioner, in_caption, keep_only, said_tokens, tokens_of
from diptych.models.clip import DualEncoder

TEXTS = ["the digit seven", "a dog", "a digit that is odd"]
NAMES = ("coca-digits-16", "coca-digits-16-bottleneck")


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> DualEncoder:
    return clip.create(request.param, 0).eval()


@pytest.fixture(scope="module")
def small() -> DualEncoder:
    """A captioner that may say nothing but the words of `TEXTS`."""
    model = clip.create(NAMES[0], 1).eval()
    keep_only(model, tokens_of(TEXTS, model.tokenizer))
    return model


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def ids(model: DualEncoder, texts: list[str]) -> torch.Tensor:
    return torch.from_numpy(model.tokenizer.encode_cut(texts))


@torch.no_grad()
def test_logits_are_open_clips(model: DualEncoder) -> None:
    captioner, text_NL = Captioner(model), ids(model, TEXTS)
    image_ND, seen_NSW = captioner.see(pictures(3))
    torch.testing.assert_close(image_ND, model.encode_image(pictures(3), normalize=False))
    logits = captioner.logits(seen_NSW, text_NL)
    if captioner.condition == "tokens":
        theirs = model.clip(preprocess.normalize(pictures(3), model.mean, model.std), text_NL, output_labels=False)["logits"]
    else:
        assert seen_NSW.shape == (3, 1, 64)
        theirs = model.clip.text_decoder(seen_NSW, model.clip.text(text_NL)[1])
    torch.testing.assert_close(logits, theirs)


@torch.no_grad()
def test_features_of_captions_do_not_depend_on_the_batchs_length(model: DualEncoder) -> None:
    captioner = Captioner(model)
    text_ND, state_NLW = captioner.read(ids(model, TEXTS))
    torch.testing.assert_close(text_ND[1:2], captioner.read(ids(model, TEXTS[1:2]))[0])
    torch.testing.assert_close(text_ND, model.encode_text(ids(model, TEXTS), normalize=False))
    torch.testing.assert_close(state_NLW, captioner.states(ids(model, TEXTS)))


def test_equal_seeds_give_equal_weights_and_the_head_is_drawn() -> None:
    first, second = (clip.create(NAMES[0], 3).clip.text_decoder.text_projection for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(64**-0.5, rel=0.05)


def test_what_is_ruled_out_is_never_said(small: DualEncoder) -> None:
    captioner = Captioner(small)
    assert captioner.token_V.tolist() == tokens_of(TEXTS, small.tokenizer).tolist()
    for scale in (0.0, 1.0, 3.0):
        said = {word for text in captioner.caption(pictures(4), scale, max_length=5) for word in text.split()}
        assert said <= {word for text in TEXTS for word in text.split()}
    assert len(said_tokens(clip.create(NAMES[0], 0).clip)) == 49408


def test_captions_do_not_depend_on_their_neighbours_and_follow_the_guidance(small: DualEncoder) -> None:
    captioner = Captioner(small)
    together = captioner.caption(pictures(5), 2.0)
    assert together == [captioner.caption(pictures(5)[row : row + 1], 2.0)[0] for row in range(5)]
    assert captioner.caption(pictures(5), 0.0) == [captioner.caption(pictures(1) * 0, 0.0)[0]] * 5
    assert together != captioner.caption(pictures(5), 0.0)
    assert all(len(text.split()) <= 4 for text in captioner.caption(pictures(5), beams=3, max_length=4))


def test_sampling_is_by_the_draws(small: DualEncoder) -> None:
    captioner = Captioner(small)
    first = captioner.caption(pictures(6), draw=lambda position: torch.full((6,), 0.3 + 0.01 * position))
    assert first == captioner.caption(pictures(6), draw=lambda position: torch.full((6,), 0.3 + 0.01 * position))
    assert first != captioner.caption(pictures(6), draw=lambda position: torch.full((6,), 0.9))


def test_a_directory_keeps_the_condition_and_opens_in_open_clip(model: DualEncoder, tmp_path: Path) -> None:
    import open_clip

    clip.save(model, tmp_path / "model", {})
    again = clip.load(tmp_path / "model").eval()
    assert again.captioner == model.captioner
    assert Captioner(again).condition == Captioner(model).condition
    assert Captioner(again).caption(pictures(2), 1.5, max_length=4) == Captioner(model).caption(pictures(2), 1.5, max_length=4)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    text_NL = torch.from_numpy(model.tokenizer.encode(TEXTS))
    torch.testing.assert_close(theirs.encode_text(text_NL, normalize=False), model.encode_text(text_NL, normalize=False))


def test_a_model_that_cannot_caption_is_refused() -> None:
    with pytest.raises(ConfigError, match="The model is no captioner"):
        Captioner(clip.create("digits-16", 0))
    with pytest.raises(ConfigError, match="no class token"):
        Captioner(clip.create(NAMES[0], 0, {"text_cfg": {"embed_cls": False}}))
    with pytest.raises(ConfigError, match="cannot look at the features"):
        Captioner(clip.create(NAMES[1], 0, {"embed_dim": 32}))
    with pytest.raises(ConfigError, match="looks at a picture's tokens"):
        Captioner(clip.create(NAMES[0], 0)).of_feature(torch.zeros(1, 64))


def test_padding_is_told_from_words_by_the_end_token() -> None:
    tokenizer = clip.create("digits-16", 0).tokenizer
    text_NL = torch.tensor([[49406, 0, 320, 49407, 0, 0], [49406, 320, 320, 320, 320, 49407]])  # "!" within a word has the id of padding
    assert in_caption(text_NL).sum(dim=1).tolist() == [4, 6]
    assert 0 not in tokens_of(["a very long one", "a"], tokenizer).tolist()


def test_decoding_is_the_inverse_of_encoding() -> None:
    tokenizer = clip.create("digits-16", 0).tokenizer
    texts = ["the digit seven", "über naïve café", "日本", "x"]
    assert tokenizer.decode(tokenizer.encode(texts).tolist()) == texts  # type: ignore[union-attr]
    assert tokenizer.decode([[49406, 49407], []]) == ["", ""]  # type: ignore[union-attr]
