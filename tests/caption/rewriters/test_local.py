"""With a real, random and very small GPT-2 on disk."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.caption.rewriters import Request
from diptych.caption.rewriters.local import LocalConfig, LocalRewriter, sample
from diptych.core.errors import ConfigError, DataError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokens), n_positions=640, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def requests(count: int) -> list[Request]:
    return [Request(f"key-{index // 2}", index % 2, "a cat " + "and a dog " * (index % 5)) for index in range(count)]


def build(folder: Path, seed: int = 0, **fields: Any) -> LocalRewriter:
    return LocalConfig(path=str(folder), max_new_tokens=12, max_len=600, batch_size=4).model_copy(update=fields).build(seed)


def test_rewrites_are_one_line_and_named_by_seed_key_and_copy(folder: Path) -> None:
    asked = requests(6)
    answers = build(folder).rewrite(asked)
    assert len(answers) == 6
    assert len(set(answers)) > 1
    assert all(answer is None or (answer and "\n" not in answer) for answer in answers)
    assert build(folder).rewrite(asked) == answers
    assert build(folder).rewrite(asked[::-1]) == answers[::-1]
    assert build(folder, 1).rewrite(asked) != answers


def test_neighbours_in_the_batch_change_nothing(folder: Path) -> None:
    asked = requests(5)
    assert [build(folder).rewrite([request])[0] for request in asked] == build(folder, batch_size=5).rewrite(asked)


def test_torchs_own_generator_is_neither_used_nor_touched(folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    answers = build(folder).rewrite(requests(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert build(folder).rewrite(requests(2)) == answers


def test_long_prompts_are_cut_by_the_official_rule(folder: Path) -> None:
    rewriter = build(folder, max_len=128)
    prompt = rewriter.prompt(Request("key", 0, "word " * 200_000))
    assert prompt.startswith("write image captions differently,")
    assert prompt.endswith(" =>")
    assert len(prompt) == 128 - 10 + len(" =>")  # a token a byte
    assert len(rewriter.rewrite([Request("key", 0, "word " * 200_000)])) == 1


def test_generation_stops_at_the_end_of_the_first_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewriter = build(folder, max_new_tokens=12)
    letters = [rewriter._tokenizer.encode(letter)[0] for letter in " ab\n" + 8 * "x"]
    steps = []

    def scripted(logits_BV: Any, *_: Any) -> Any:
        steps.append(len(logits_BV))
        return torch.full((len(logits_BV),), letters[len(steps) - 1])

    monkeypatch.setattr("diptych.caption.rewriters.local.sample", scripted)
    assert rewriter.rewrite(requests(1)) == ["ab"]
    assert len(steps) == 4


def test_it_travels_without_its_weights(folder: Path) -> None:
    rewriter = build(folder)
    answers = rewriter.rewrite(requests(2))
    data = pickle.dumps(rewriter)
    assert len(data) < 5000
    assert pickle.loads(data).rewrite(requests(2)) == answers


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no language model"):
        LocalConfig(path=str(tmp_path / "nowhere")).build(0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        LocalConfig(path=str(tmp_path)).build(0).rewrite(requests(1))


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"(?s)cannot be loaded.*safetensors"):
        LocalConfig(path=str(tmp_path)).build(0).rewrite(requests(1))


def test_code_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    import json

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match="cannot be loaded"):
        LocalConfig(path=str(tmp_path)).build(0).rewrite(requests(1))


def test_sampling_by_inverse_transform() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64))

    def picks(top_p: float, temperature: float = 1.0) -> list[float]:
        draws = (np.arange(1000) + 0.5) / 1000
        return (torch.bincount(sample(logits.expand(1000, 4), draws, temperature, top_p), minlength=4) / 1000).tolist()

    np.testing.assert_allclose(picks(1.0), [0.1, 0.5, 0.15, 0.25], atol=2e-3)
    np.testing.assert_allclose(picks(0.74), [0, 2 / 3, 0, 1 / 3], atol=2e-3)  # the run that reaches 0.74 has two tokens
    np.testing.assert_allclose(picks(0.01), [0, 1, 0, 0])
    np.testing.assert_allclose(picks(1.0, 0.0), [0, 1, 0, 0])
    squared = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(picks(1.0, 0.5), squared / squared.sum(), atol=2e-3)
    assert sample(logits, np.asarray([1 - 2**-53]), 1.0, 1.0).item() == 0
