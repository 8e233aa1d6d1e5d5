"""In-context prompts for language models (LaCLIP, section 3.2): three example pairs, then the caption to rewrite."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from diptych.core.chance import generator

ExampleSet = Literal["plain", "rich", "human-like", "keyword"]
"""Four sets of 16 (caption, rewrite) pairs in `examples.json`; in the paper: ChatGPT, Bard, MSCOCO, human."""

EXAMPLE_SETS: tuple[ExampleSet, ...] = get_args(ExampleSet)
Pair = tuple[str, str]

ARROW = "=>"
SHOTS = 3
_INDENT = " " * 12  # the official prompt is an indented triple-quoted string; models were measured with these very characters
_CAPTION_LINE = 8


@cache
def examples(name: ExampleSet) -> tuple[Pair, ...]:
    """The 16 pairs of one example set."""
    data = json.loads(files("diptych.caption").joinpath("examples.json").read_text(encoding="utf-8"))
    return tuple((source, rewrite) for source, rewrite in data[name])


def shots(name: ExampleSet, seed: int, key: str, copy: int) -> list[Pair]:
    """Three pairs of a set, drawn without replacement by `(seed, key, copy)`."""
    pairs = examples(name)
    return [pairs[index] for index in generator(seed, "laclip.shots", key, copy).choice(len(pairs), SHOTS, replace=False)]


def build_prompt(pairs: Sequence[Pair], source: str) -> str:
    """The prompt in the official layout, to be continued by the model after its last `=>`.

    Line breaks inside `source` are removed, not replaced: collapse white space before if words must stay apart.
    """
    lines = [f"{before} {ARROW} {after}" for before, after in pairs]
    lines.append(f"{source.replace(chr(10), '')} {ARROW}")
    return f"\n\n{_INDENT}".join(["write image captions differently,", *lines])


def truncate(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], max_len: int) -> str | None:
    """The official cut of a long prompt: more than `max_len - 5` tokens become `max_len - 10` and ` =>`. None: it fits."""
    if len(token_ids) <= max_len - 5:
        return None
    return f"{decode(token_ids[: max_len - 10])} {ARROW}"


def parse_official(prompt: str, completion: str) -> str:
    """The official parsing, for parity: line 8 of prompt and completion, what stands after its first `=>`; "" if there is none.

    Wrong for a caption that holds `=>` itself (it returns the caption's tail); `parse` is not.
    """
    lines = (prompt + completion).split("\n")
    fields = lines[_CAPTION_LINE].strip().split(ARROW) if len(lines) > _CAPTION_LINE else []
    return fields[1].strip() if len(fields) > 1 else ""


def parse(completion: str, source: str = "") -> str:
    """The rewrite in what a model wrote after the prompt: its first line up to the next `=>`, white space collapsed.

    Chat models like to repeat the question (`source => rewrite`) or to put the answer in quotation marks; both are taken off.
    """
    line = next(iter(completion.strip().splitlines()), "").strip()
    if source:
        line = line.removeprefix(source).strip().removeprefix(ARROW).strip() if line.startswith(f"{source} {ARROW}") else line
    text = " ".join(line.split(ARROW)[0].split())
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'`" else text
