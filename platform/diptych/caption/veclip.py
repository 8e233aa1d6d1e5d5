"""VeCLIP: captions every picture, fuses that description with the alt text, and trains on a mixture of alt text and fused caption.

Neither alone is the method: fused captions lose names, alt texts lose the picture. The mixture is drawn anew at every visit by the loader:
`train.original` is the share of the alt text (0.5 in the paper); a pair whose captions could not be used trains on its alt text alone.

The paper describes with LLaVA-13B and fuses with Vicuna-13B. Here both are a choice: a server, a model on this machine, or rules.

Source: Lai et al., VeCLIP: Improving CLIP Training via Visual-enriched Captions (ECCV 2024), section 3. The wording of the prompts and how
refusals are told are ours: the authors published neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

import polars as pl
from pydantic import Field, model_validator

from diptych.caption.captioners.local import LocalConfig as ImageToText
from diptych.caption.describers import Captioner, ExistingCaptioner, LocalDescriber, ModelCaptioner, RuleCaptioner, Seen
from diptych.caption.laclip import tidy
from diptych.caption.rewriters import Request, Rewriter
from diptych.caption.rewriters.endpoint import EndpointConfig
from diptych.caption.rewriters.lexicon import LexiconConfig
from diptych.caption.rewriters.local import LocalConfig
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Need, PairMethod, Verdict
from diptych.models.tokenizer import Tokenizer
from diptych.pairs.schema import CAPTIONS

FUSED, VISUAL = "rewrite:veclip", "synthetic:veclip"
"""Sources of the caption that is added: the fused one, or the description alone where fusing failed or was not asked for."""

DESCRIPTION, STATUS, USED = "meta.veclip_visual", "meta.veclip_status", "meta.veclip_used"
"""Columns: the usable description (null without), what became of the caption, and which of `vec`, `vet`, `alt` is trained on beside alt."""

Status = Literal["ok", "refused", "too_short", "too_long", "error", "missing"]
"""`missing`: there was no description, or no alt text, to fuse."""
STATUSES: tuple[Status, ...] = get_args(Status)

PROMPT_VERSION = 1
OPENING = "Say both sentences as one short sentence."
PROMPT = OPENING + (
    ' Put attributes before what they belong to, add no meaning of your own, and do not begin with "The image".\n'
    "First: {alt}\nSecond: {visual}\nBoth as one:"
)
REFUSALS = ("i'm sorry", "i am sorry", "i apologize", "as an ai", "cannot", "can't assist", "unable to")
LEAST_WORDS, MOST_TOKENS = 2, 77
ALT_CHARS = 600  # no text encoder sees more, and no prompt needs it


class Config(BaseConfig):
    """Appends one caption a pair: its description fused with its alt text, or the description alone. No pair is rejected."""

    method: Literal["veclip"] = "veclip"
    captioner: Literal["rules", "endpoint", "model", "existing"] = Field(
        "rules",
        description="who describes: a rule for drawings in white on black, a multimodal server, a 🤗 image-to-text model on this machine,"
        " or captions of `existing`",
    )
    existing: str | None = Field(
        None,
        min_length=1,
        description="captioner existing: the source of the captions to take, which the new ones replace, e.g. synthetic:blip",
    )
    vision: EndpointConfig | None = Field(None, description="captioner endpoint: the multimodal server; its api must be chat")
    described_by: ImageToText | None = Field(None, description="captioner model: the image-to-text model on this machine")
    rewriter: Literal["none", "lexicon", "endpoint", "local"] = Field(
        "lexicon", description="who fuses: nobody (the description itself is the caption), a rule and a word table, a server, a local model"
    )
    lexicon: LexiconConfig | None = Field(None, description="rewriter lexicon: rephrases the joined sentence; null: it stays as joined")
    endpoint: EndpointConfig | None = Field(None, description="the server that fuses; required with rewriter endpoint")
    local: LocalConfig | None = Field(None, description="the model on disk that fuses; required with rewriter local")
    refusals: tuple[str, ...] = Field(REFUSALS, description="a text that holds one of these, in any case, is a refusal")

    @model_validator(mode="after")
    def _one_captioner(self) -> Self:
        if (self.captioner == "existing") != (self.existing is not None):
            raise ValueError("captioner: existing and the key existing, a source of captions, belong together")
        if (self.captioner == "endpoint") != (self.vision is not None):
            raise ValueError("captioner: endpoint and the key vision (at least base_url and model) belong together")
        if (self.captioner == "model") != (self.described_by is not None):
            raise ValueError("captioner: model and the key described_by (at least path) belong together")
        if self.vision is not None and self.vision.api != "chat":
            raise ValueError("vision: pictures can be shown to a chat only; set vision.api: chat")
        return self

    @model_validator(mode="after")
    def _one_rewriter(self) -> Self:
        blocks = {"lexicon": self.lexicon, "endpoint": self.endpoint, "local": self.local}
        superfluous = [name for name, block in blocks.items() if block is not None and name != self.rewriter]
        if superfluous:
            raise ValueError(f"the rewriter is {self.rewriter!r}: remove the key {superfluous[0]!r}, or set rewriter: {superfluous[0]}")
        if self.rewriter in ("endpoint", "local") and blocks[self.rewriter] is None:
            needs = "base_url and model" if self.rewriter == "endpoint" else "path"
            raise ValueError(f"the rewriter {self.rewriter!r} needs the key {self.rewriter!r} with at least {needs}")
        return self

    def build(self, seed: int) -> VeClip:
        """The method. Raises ConfigError or DataError for a model folder or a word table that is not there."""
        return VeClip(self, self.build_captioner(seed), self.build_rewriter(seed))

    def build_captioner(self, seed: int) -> Captioner:
        """The chosen captioner alone."""
        if self.vision is not None:
            return ModelCaptioner(self.vision.build(seed))
        if self.described_by is not None:
            return LocalDescriber(self.described_by.build())
        return ExistingCaptioner() if self.captioner == "existing" else RuleCaptioner()

    def build_rewriter(self, seed: int) -> Rewriter | None:
        """The chosen rewriter alone; None where nothing is rephrased."""
        config = self.endpoint or self.local or self.lexicon
        return None if config is None else config.build(seed)


class VeClip(PairMethod):
    """Describes, fuses, judges, and appends what is usable; the alt text stays first. A second pass replaces what the first one added."""

    needs = frozenset[Need]({"captions", "pixels"})

    def __init__(self, config: Config, captioner: Captioner, rewriter: Rewriter | None) -> None:
        self.config, self.captioner, self.rewriter = config, captioner, rewriter

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """Keeps every pair; adds a caption and the columns `meta.veclip_visual`, `_status` and `_used`."""
        del state
        rows = batch.select("key", "pixels", "captions").iter_rows()
        pairs = [_Pair.of(key, picture, captions, self.config.existing) for key, picture, captions in rows]
        for pair, answer in zip(pairs, self.captioner.describe([pair.seen for pair in pairs]), strict=True):
            pair.visual, pair.status = self._judged(answer)
        if self.config.rewriter != "none":
            self._fuse(pairs)
        kept = batch.with_columns(
            pl.Series("captions", [pair.captions for pair in pairs], dtype=CAPTIONS),
            pl.Series(DESCRIPTION, [pair.visual for pair in pairs], dtype=pl.String),
            pl.Series(STATUS, [pair.status for pair in pairs], dtype=pl.String),
            pl.Series(USED, [pair.used for pair in pairs], dtype=pl.String),
        )
        return Verdict(kept, pl.DataFrame(schema={"key": pl.String, "reason": pl.String, "score": pl.Float32}))

    def report(self, state: Any) -> Mapping[str, Any]:
        """Who described and fused, by which prompts. Shares by status and style are `veclip_stats` of the table."""
        del state
        config = self.config
        return {
            "captioner": _name(config.vision or config.described_by) or config.captioner,
            "fuser": _name(config.endpoint or config.local) or config.rewriter,
            "prompts": PROMPT_VERSION,
        }

    def tally(self, kept: pl.LazyFrame) -> Mapping[str, int]:
        """Pairs by what became of their caption: `ok`, or why they have their own or the plain description."""
        return {f"captions_{status}": count for status, count in kept.group_by(STATUS).len().collect().iter_rows()}

    def _fuse(self, pairs: Sequence[_Pair]) -> None:
        """Sets the fused captions of the pairs that have both an alt text and a description."""
        both = [pair for pair in pairs if pair.alt and pair.visual]
        for pair in pairs:
            pair.status = pair.status if pair.status != "ok" or (pair.alt and pair.visual) else "missing"
        by_rule = self.config.rewriter == "lexicon"
        answers: Iterable[str | None] = (joined(pair.alt, pair.visual or "") for pair in both)
        if self.rewriter is not None:
            requests = [pair.request(by_rule) for pair in both]
            answers = self.rewriter.rewrite(requests)
        for pair, answer in zip(both, answers, strict=True):
            pair.fused, pair.status = self._judged(answer)

    def _judged(self, answer: str | None) -> tuple[str | None, Status]:
        """A text that can be trained on, and why there is none."""
        text = tidy(answer or "")
        status = status_of(answer, text, self.config.refusals, self._tokenizer)
        return (text if status == "ok" else None), status

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(MOST_TOKENS + 1)


@dataclass
class _Pair:
    """A pair on its way: what it came with, and what was said of it."""

    seen: Seen
    own: list[dict[str, Any]]
    alt: str
    visual: str | None = None
    fused: str | None = None
    status: Status = "missing"

    @classmethod
    def of(cls, key: str, picture: bytes, captions: list[dict[str, Any]] | None, existing: str | None) -> _Pair:
        own = [caption for caption in captions or [] if caption["source"] not in (FUSED, VISUAL)]
        texts = tuple(caption["text"] for caption in own if caption["source"] == existing and caption["text"])
        alt = next((caption["text"] for caption in own if caption["source"] not in ("tag", existing) and caption["text"]), "")
        return cls(Seen(key, picture, texts), own, tidy(alt)[:ALT_CHARS])

    def request(self, by_rule: bool) -> Request:
        """What the rewriter is asked: to rephrase the joined sentence, or to fuse by the prompt."""
        assert self.visual is not None
        if by_rule:
            return Request(self.seen.key, 0, joined(self.alt, self.visual))
        return Request(self.seen.key, 0, self.alt, prompt=PROMPT.format(alt=self.alt, visual=self.visual))

    @property
    def used(self) -> Literal["vec", "vet", "alt"]:
        """The first of fused caption, description and alt text that there is."""
        return "vec" if self.fused else "vet" if self.visual else "alt"

    @property
    def captions(self) -> list[dict[str, Any]]:
        """The pair's own captions and the new one, which takes the place of those that describe the picture already (`existing`)."""
        text = self.fused or self.visual
        own = [caption for caption in self.own if caption["text"] not in self.seen.texts] if text and self.seen.texts else self.own
        return [*own, {"text": text, "source": FUSED if self.fused else VISUAL, "score": None}] if text else own


def _name(config: EndpointConfig | ImageToText | LocalConfig | None) -> str | None:
    """The model that a server or a folder stands for."""
    return None if config is None else config.model if isinstance(config, EndpointConfig) else config.path


def joined(alt: str, visual: str) -> str:
    """The rule's fusion: the description, which is made of attributes, before the alt text; of either what the other has not said."""
    said = set(visual.casefold().split())
    if all(word in said for word in alt.casefold().split()):
        return visual
    return f"{visual}, {alt}"


def status_of(answer: str | None, text: str, refusals: Sequence[str] = REFUSALS, tokenizer: Tokenizer | None = None) -> Status:
    """What an answer, tidied to `text`, is: usable (`ok`) or why not. An instruction that is echoed counts as refused."""
    if answer is None:
        return "error"
    lowered = text.casefold()
    if any(phrase.casefold() in lowered for phrase in refusals) or OPENING.casefold() in lowered:
        return "refused"
    if len(text.split()) < LEAST_WORDS:
        return "too_short"
    return "too_long" if _tokens(text, tokenizer) > MOST_TOKENS else "ok"


def _tokens(text: str, tokenizer: Tokenizer | None) -> int:
    """CLIP's tokens of a text, start and end among them, counted up to one more than fit; 0 where they must fit."""
    if len(text.encode()) + 2 <= MOST_TOKENS:  # a token has a byte at least, so counting is for long texts
        return 0
    row_L = (tokenizer or Tokenizer(MOST_TOKENS + 1)).encode_cut([text])[0]
    return int(row_L.argmax()) + 1


def veclip_stats(frame: pl.DataFrame) -> dict[str, float]:
    """What describing and fusing gave over a table: failures, and the style that language models slip into.

    Returns:
        `pairs`; `status.<status>` and `used.<vec|vet|alt>` as shares of the pairs; of `alt` (first captions) and `new` (those added)
        each `<which>.words`, the mean length, and `<which>.first_bigram`, the share of the most common opening two words.

    Raises:
        DataError: the table has no `meta.veclip_status`.
    """
    if STATUS not in frame.columns:
        raise DataError.at("The table has not been through VeCLIP", "columns", frame.columns, f"the column {STATUS}")
    captions = frame.select(pl.col("captions").explode(empty_as_null=False)).unnest("captions")
    new = captions.filter(pl.col("source").is_in([FUSED, VISUAL]))["text"].to_list()
    alt = frame.select(pl.col("captions").list.first().struct.field("text")).to_series().drop_nulls().to_list()
    rows = max(1, frame.height)
    stats: dict[str, float] = {"pairs": frame.height}
    stats |= {f"status.{status}": frame.filter(pl.col(STATUS) == status).height / rows for status in STATUSES}
    stats |= {f"used.{which}": frame.filter(pl.col(USED) == which).height / rows for which in ("vec", "vet", "alt")}
    for which, texts in (("alt", alt), ("new", new)):
        openings = Counter(" ".join(text.casefold().split()[:2]) for text in texts)
        stats[f"{which}.words"] = sum(len(text.split()) for text in texts) / max(1, len(texts))
        stats[f"{which}.first_bigram"] = max(openings.values(), default=0) / max(1, len(texts))
    return stats
