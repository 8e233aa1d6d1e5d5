"""Rewrites captions with a causal language model on this machine, by 🤗 transformers from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from diptych.caption.rewriters import Request
from diptych.caption.rewriters.prompts import EXAMPLE_SETS, ExampleSet, build_prompt, parse, shots, truncate
from diptych.core.chance import key_hashes, uniform
from diptych.core.config import Config
from diptych.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CHARS_PER_TOKEN = 64  # no prompt needs more characters than this a token; keeps a megabyte caption from the tokenizer


class LocalConfig(Config):
    """A model folder and how to sample from it. Sampling defaults are the paper's (LLaMA-7B, section 3.2)."""

    path: str = Field(min_length=1, description="folder with config.json, safetensors weights and a tokenizer")
    batch_size: int = Field(32, ge=1, description="rewrites generated at a time")
    max_new_tokens: int = Field(77, ge=1, le=4096, description="most new tokens a rewrite")
    max_len: int = Field(512, ge=64, description="tokens of prompt and rewrite together; longer prompts are cut as in the official code")
    temperature: float = Field(0.9, ge=0, description="sampling temperature; 0 takes the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling: share of the probability to sample from")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?|mps)$", description="cpu, cuda, cuda:1, mps")

    def build(self, seed: int, examples: Sequence[ExampleSet] = EXAMPLE_SETS) -> LocalRewriter:
        """The rewriter; copy k is prompted with the example set `k mod len(examples)`. Weights are loaded at first use.

        Raises:
            ConfigError: there is no model folder at `path`.
        """
        if not (Path(self.path) / "config.json").is_file():
            raise ConfigError.at(
                "There is no language model", "caption.local.path", self.path, "a folder with config.json and *.safetensors"
            )
        return LocalRewriter(self, seed, examples)


class LocalRewriter:
    """Generates in batches. Tokens are drawn by `(seed, key, copy, position)`, never from torch's generator.

    A batch's padding still moves logits by rounding errors; `batch_size=1` takes even that away.
    """

    def __init__(self, config: LocalConfig, seed: int, examples: Sequence[ExampleSet]) -> None:
        self.config = config
        self.seed = seed
        self.examples = tuple(examples)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to workers without its weights."""
        return LocalRewriter, (self.config, self.seed, self.examples)

    def rewrite(self, requests: Sequence[Request]) -> list[str | None]:
        """One answer a request, in order. Raises DataError for a folder that cannot be loaded safely."""
        # Prompts of like length share a batch: less padding, and the same batches whatever order the requests came in.
        prompts = [self.prompt(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (len(prompts[index]), requests[index].key, requests[index].copy))
        answers: dict[int, str | None] = {}
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            texts = self._generate([prompts[row] for row in rows], [requests[row] for row in rows])
            answers |= {row: parse(text, requests[row].source) or None for row, text in zip(rows, texts, strict=True)}
        return [answers[row] for row in range(len(requests))]

    def prompt(self, request: Request) -> str:
        """The prompt of a request, cut to the model's length by the official rule; one of its own stays as it stands."""
        if request.prompt:
            return request.prompt
        pairs = shots(self.examples[request.copy % len(self.examples)], self.seed, request.key, request.copy)
        text = build_prompt(pairs, request.source[: self.config.max_len * CHARS_PER_TOKEN])
        decode = self._tokenizer.decode
        return truncate(self._tokenizer(text, add_special_tokens=False)["input_ids"], decode, self.config.max_len) or text

    def _generate(self, prompts: list[str], requests: Sequence[Request]) -> list[str]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        tokenizer, model = self._tokenizer, self._model
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(self.config.device)
        width = inputs["input_ids"].shape[1]
        names = key_hashes(request.key for request in requests)
        copies = np.asarray([request.copy for request in requests], dtype=np.uint64)

        def choose(ids_BL: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            draw_B = uniform(self.seed, names, copies, ids_BL.shape[1] - width)
            chosen_B = sample(logits_BV, draw_B, self.config.temperature, self.config.top_p)
            return torch.full_like(logits_BV, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)

        def ended(ids_BL: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            lines = tokenizer.batch_decode(ids_BL[:, width:], skip_special_tokens=True)
            return torch.tensor(["\n" in line.lstrip() for line in lines], device=ids_BL.device)

        settings = GenerationConfig(max_new_tokens=self.config.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        settings.eos_token_id = tokenizer.eos_token_id
        with torch.inference_mode():
            ids_BL = model.generate(
                **inputs,
                generation_config=settings,
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([ended]),
            )
        texts: list[str] = tokenizer.batch_decode(ids_BL[:, width:], skip_special_tokens=True)
        return texts

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = self._loaded(AutoTokenizer, padding_side="left")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return self._loaded(AutoModelForCausalLM, use_safetensors=True).to(self.config.device).eval()

    def _loaded(self, kind: Any, **options: Any) -> Any:
        """Loads from the folder alone: no network, no code from the folder, no pickles."""
        try:
            return kind.from_pretrained(self.config.path, local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            expected = "a 🤗 causal language model with safetensors weights and a tokenizer"
            raise DataError.at("The language model cannot be loaded", self.config.path, f"<{reason}>", expected) from None


def sample(logits_BV: torch.Tensor, draw_B: NDArray[np.float64], temperature: float, top_p: float) -> torch.Tensor:
    """Nucleus sampling by inverse transform: token ids `[B]`, int64, from logits `[B, V]` and uniform draws `[B]` in [0, 1).

    The nucleus is the shortest run of likeliest tokens whose probabilities reach `top_p`. Temperature 0 takes the likeliest.
    """
    import torch

    if temperature == 0:
        return logits_BV.argmax(dim=1)
    sorted_BV, index_BV = (logits_BV.double() / temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(dim=1) - sorted_BV
    nucleus_BV = torch.where(before_BV < top_p, sorted_BV, 0.0)
    reach_BV = nucleus_BV.cumsum(dim=1)
    aim_B1 = torch.as_tensor(draw_B, device=logits_BV.device)[:, None] * reach_BV[:, -1:]
    place_B1 = torch.searchsorted(reach_BV, aim_B1, right=True).clamp(max=logits_BV.shape[1] - 1)
    return index_BV.gather(1, place_B1)[:, 0]
