"""Figures and captions of open-access articles, as PMC-15M has them: whole captions, compound figures in one piece.

    FOLDER/**/PMC123.tar.gz            a package: PMC123/article.nxml and the files of its figures
    FOLDER/**/article.nxml             or the XML beside the files of its figures

A pair is called `<PubMed id>_<figure id>`; an article without PubMed id is called by its number in PubMed Central, or by its file.

Source: Zhang et al., Large-Scale Domain-Specific Pretraining for Biomedical Vision-Language Processing (2023), the data set PMC-15M.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from diptych.core.chance import key_hash, uniform
from diptych.pairs.articles.source import ArticleFigures, ArticlesConfig, Found


class Config(ArticlesConfig):
    """Which packages, and how articles are shared out. PMC-15M itself: `val: 0.00093`, `test: 0.0496`."""

    method: Literal["biomedclip"] = "biomedclip"
    val: float = Field(default=0.0, ge=0, lt=1, description="share of the articles whose pairs get the split `val`")
    test: float = Field(default=0.0, ge=0, lt=1, description="share of the articles whose pairs get the split `test`")
    seed: int = Field(default=0, ge=0, lt=2**63, description="names the draw of the articles of `val` and `test`")

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError("val and test leave no articles for training")
        return self

    def build(self) -> BiomedClip:
        """The source."""
        return BiomedClip(self)


class BiomedClip(ArticleFigures):
    """Pairs with `language` and, under `meta.`, article, pmid, doi, journal, year, licence, licence_class, figure, label, panels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def key(self, found: Found) -> str:
        """`<pmid>_<figure>`: never without an article's name, or figures of different articles would share theirs."""
        return f"{found.pmid or found.accession or found.stem}_{found.figure_name}"

    def split(self, found: Found) -> str:
        """Drawn by article, so that no article has figures on both sides."""
        config, article = self.config, found.pmid or found.accession or found.stem
        drawn = float(uniform(config.seed, key_hash("biomedclip.split"), key_hash(article)))
        return "test" if drawn < config.test else "val" if drawn < config.test + config.val else config.split
