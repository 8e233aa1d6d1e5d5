"""What a source of pairs says about itself: it travels in the manifest, under `sources`, to the data card."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from diptych.core.config import Config as BaseConfig


class SourceCard(BaseConfig):
    """What a source says about itself; it travels in the dataset's manifest."""

    about: str = Field("", description="one sentence: what the pairs are and where they came from")
    licence: str = Field("", description="the licence, by its SPDX name where it has one")
    url: str = Field("", description="where it can be had")
    languages: tuple[str, ...] = Field((), description="languages of the captions, as ISO 639-1 codes")
    filters: str = Field("", description="what was left out before, e.g. rows that a safety tag marks")

    def report(self, name: str) -> dict[str, Any]:
        """What `Source.report` gives of a source called `name`."""
        return {"sources": {name: {"card": self.plain()}}}
