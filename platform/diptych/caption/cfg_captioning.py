"""Guided captioning: says of every picture what it shows, the more specifically the larger the guidance scale.

Kornblith, Li, Wang and Nguyen, "Guiding Image Captioning Models Toward More Specific Captions" (ICCV 2023). The captioner is a choice: a checkpoint
of ours that was trained with hidden pictures (`objective: {method: coca, drop: 0.5}`), which alone can be guided, or a 🤗 model on this machine, or
a server. Captions are candidates for training (`pairs/captions.py`); what they are worth, the benchmark `captioning` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from diptych.caption.captioners import Picture, PictureCaptioner
from diptych.caption.captioners.checkpoint import CheckpointConfig
from diptych.caption.captioners.endpoint import VisionEndpointConfig
from diptych.caption.captioners.local import LocalConfig
from diptych.caption.laclip import fault_of, tidy
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Need, PairMethod, Verdict
from diptych.pairs.schema import CAPTIONS

SOURCE = "synthetic:cfg-captioning"
DEFAULT_GUIDANCE = 1.5
DROPPED = "meta.captioning_dropped"
"""Why a pair has no caption of the captioner: `empty`, `identical` (to one that it has, but for capitals), `long`, `failed`; null: it has one."""


class Config(BaseConfig):
    """Adds a caption of its picture to every pair. No pair is rejected; one that gets no caption keeps those that it has."""

    directories: ClassVar[tuple[str, ...]] = ("model",)

    method: Literal["cfg-captioning"] = "cfg-captioning"
    captioner: Literal["checkpoint", "local", "endpoint"] = Field(
        "checkpoint", description="who captions: a model directory of ours, a 🤗 model on disk, a server"
    )
    model: str | None = Field(None, min_length=1, description="the model directory; required with captioner checkpoint")
    guidance: float | None = Field(
        None,
        ge=0,
        le=100,
        description="scale of classifier-free guidance; 1: none; 1.5 with captioner checkpoint, which alone can be guided",
    )
    place: Literal["append", "first", "replace"] = Field(
        "append", description="behind the pair's captions, before them, or in place of all but its tags"
    )
    max_chars: int = Field(616, ge=16, description="longest caption in characters; CLIP sees 77 tokens, of some 8 characters at most")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="how the model directory decodes")
    local: LocalConfig | None = Field(None, description="the 🤗 model; required with captioner local")
    endpoint: VisionEndpointConfig | None = Field(None, description="the server; required with captioner endpoint")

    @model_validator(mode="before")
    @classmethod
    def _guided_by_default(cls, data: Any) -> Any:
        """Records the scale that is used, and none where none can be."""
        if isinstance(data, dict) and data.get("captioner", "checkpoint") == "checkpoint" and data.get("guidance") is None:
            return {**data, "guidance": DEFAULT_GUIDANCE}
        return data

    @model_validator(mode="after")
    def _one_captioner(self) -> Self:
        blocks = {"checkpoint": self.model, "local": self.local, "endpoint": self.endpoint}
        superfluous = [name for name, block in blocks.items() if block is not None and name != self.captioner]
        if superfluous:
            key = "model" if superfluous[0] == "checkpoint" else superfluous[0]
            raise ValueError(f"the captioner is {self.captioner!r}: remove the key {key!r}, or set captioner: {superfluous[0]}")
        if blocks[self.captioner] is None:
            raise ValueError(
                f"the captioner {self.captioner!r} needs the key {'model' if self.captioner == 'checkpoint' else self.captioner!r}"
            )
        if self.captioner != "checkpoint" and self.guidance not in (None, 1):
            raise ValueError("only a model directory can be guided, for its picture can be hidden: remove guidance, or set it to 1")
        return self

    def build(self, seed: int) -> CfgCaptioning:
        """The method. Raises ConfigError for a model folder that is not there."""
        if self.endpoint is not None:
            return CfgCaptioning(self, self.endpoint.caption_with(seed))
        if self.local is not None:
            return CfgCaptioning(self, self.local.build())
        assert self.model is not None
        assert self.guidance is not None
        return CfgCaptioning(self, self.checkpoint.build(self.model, self.guidance, seed))


class CfgCaptioning(PairMethod):
    """Captions every picture once, source `synthetic:cfg-captioning`."""

    needs: frozenset[Need] = frozenset({"captions", "pixels"})

    def __init__(self, config: Config, captioner: PictureCaptioner) -> None:
        self.config = config
        self.captioner = captioner

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """Keeps every pair; says in `meta.captioning_dropped` why one got no caption."""
        del state
        answers = self.captioner.caption([Picture(key, data) for key, data in batch.select("key", "pixels").iter_rows()])
        held = [list(captions or []) for captions in batch["captions"].to_list()]
        reasons = [self._add(captions, answer) for captions, answer in zip(held, answers, strict=True)]
        kept = batch.with_columns(pl.Series("captions", held, dtype=CAPTIONS), pl.Series(DROPPED, reasons, dtype=pl.String))
        return Verdict(kept, pl.DataFrame(schema={"key": pl.String, "reason": pl.String, "score": pl.Float32}))

    def tally(self, kept: pl.LazyFrame) -> Mapping[str, int]:
        """Pairs that got a caption, and by reason those that did not and have their own still."""
        counts = kept.group_by(DROPPED).len().collect()
        return {"captioned" if reason is None else f"captions_{reason}": count for reason, count in counts.iter_rows()}

    def _add(self, captions: list[dict[str, Any]], answer: str | None) -> str | None:
        """Puts a usable answer among a pair's captions; the reason where it is not usable."""
        text = tidy(answer or "")
        reason = fault_of(answer, text, {tidy(held["text"] or "").casefold() for held in captions}, self.config.max_chars)
        if reason is None or (reason == "identical" and self.config.place == "replace"):
            entry = {"text": text, "source": SOURCE, "score": None}
            if self.config.place == "replace":
                captions[:] = [held for held in captions if held["source"] == "tag"]
            captions.insert(len(captions) if self.config.place == "append" else 0, entry)
            return None
        return reason


def caption_stats(frame: pl.DataFrame) -> dict[str, float]:
    """What captioning gave over a table that went through the method.

    Returns:
        `pairs`, `captioned` (counts); `empty`, `identical`, `long`, `failed` (shares of pairs, in [0, 1]); `distinct`: different captions, case
        folded, as a share of those added; `mean_words` of them. 0 where nothing is.
    """
    captions = frame.select(pl.col("captions").explode(empty_as_null=False)).unnest("captions")
    texts: list[str] = captions.filter(pl.col("source") == SOURCE)["text"].to_list()
    reasons = frame[DROPPED].value_counts()
    count = dict(zip(reasons[DROPPED].to_list(), reasons["count"].to_list(), strict=True))
    return {
        "pairs": frame.height,
        "captioned": len(texts),
        **{reason: count.get(reason, 0) / max(1, frame.height) for reason in ("empty", "identical", "long", "failed")},
        "distinct": len({text.casefold() for text in texts}) / max(1, len(texts)),
        "mean_words": sum(len(text.split()) for text in texts) / max(1, len(texts)),
    }
