"""Figures of open-access articles with all that is known of them: the paragraphs that cite them, licence, article, panels, pixels.

Packages lie as for `biomedclip`. A pair is a picture, called `<article>/<file without ending>`.

Source: Lozano, Sun et al., BIOMEDICA: An Open Biomedical Image-Caption Archive (CVPR 2025), extraction and serialisation.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field

from diptych.pairs.articles import panels
from diptych.pairs.articles.pixels import pixel_hash
from diptych.pairs.articles.source import SOURCE, ArticleFigures, ArticlesConfig, Found
from diptych.pairs.image import Fault


class Config(ArticlesConfig):
    """Which packages, what counts as a figure, and how much is kept of the article."""

    method: Literal["biomedica"] = "biomedica"
    elements: tuple[Literal["fig", "table-wrap", "chem-struct-wrap", "boxed-text"], ...] = Field(
        default=("fig", "table-wrap"), min_length=1, description="elements with a graphic and a caption that are read"
    )
    compound: Literal["whole", "panels"] = Field(
        default="whole",
        description="captions of figures of several pictures: `whole`, or `panels`: each picture its own panel's, where the numbers agree",
    )
    mentions: Literal["plain", "marked", "none"] = Field(
        default="plain", description='citing paragraphs as text, with the figure references as `<xref rid="file">` tags, or not at all'
    )
    abstract: bool = Field(default=False, description="keep the abstract, once a picture")
    hash: bool = Field(default=True, description="keep SHA-256 over the pixels, by which equal pictures are found; decodes every picture")

    def build(self) -> Biomedica:
        """The source."""
        return Biomedica(self)


class Biomedica(ArticleFigures):
    """Pairs with the columns of `biomedclip` and, under `meta.`, title, kind, date, subjects, keywords, mentions, picture, pictures,
    image_hash, abstract.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.elements = config.elements
        self.mentions = config.mentions

    def key(self, found: Found) -> str:
        """`<article>/<picture>`, or the figure's id where there is no picture."""
        return f"{found.accession or found.stem}/{PurePosixPath(found.file).stem if found.file else found.figure_name}"

    def captions(self, found: Found) -> list[tuple[object, str]]:
        """The figure's caption, or the panel's."""
        pictures = len(found.figure.graphics)
        if self.config.compound == "panels" and pictures > 1:
            own = panels.split(found.figure.caption)
            if len(own) == pictures:
                return [(own[found.picture], SOURCE)]
        return super().captions(found)

    def columns(self, found: Found, image: bytes | None) -> dict[str, Any]:
        """The columns of the pair; null where the article does not say."""
        article, figure = found.article, found.figure
        columns = super().columns(found, image) | {
            "meta.title": article.title or found.entry.title or None,
            "meta.kind": article.kind or None,
            "meta.date": article.date or found.entry.date or None,
            "meta.subjects": list(article.subjects) or None,
            "meta.keywords": list(article.keywords) or None,
            "meta.picture": found.picture + 1,
            "meta.pictures": max(1, len(figure.graphics)),
        }
        if self.config.mentions != "none":
            columns["meta.mentions"] = list(figure.mentions) or None
        if self.config.abstract:
            columns["meta.abstract"] = article.abstract or None
        if self.config.hash:
            columns["meta.image_hash"] = _hash(image)
        return columns


def _hash(image: bytes | None) -> str | None:
    try:
        return None if image is None else pixel_hash(image)
    except Fault:  # ingest looks at the picture next, and says what is wrong with it
        return None
