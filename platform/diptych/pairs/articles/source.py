"""What the sources of article packages share: a part a package, a pair a picture of a figure, and the columns that say where it is from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from diptych.core.points import RawPair, Source
from diptych.pairs.articles import article as jats
from diptych.pairs.articles import licences, listing, panels
from diptych.pairs.articles.listing import Entry
from diptych.pairs.articles.package import ARCHIVES, ARTICLES, MEBIBYTE, Package, PackageLimits, open_package
from diptych.pairs.image import Fault

SOURCE = "alt"
"""Captions of articles stand beside their pictures and were written for readers of the text, as alternative texts are."""


class ArticlesConfig(PackageLimits):
    """Where the packages lie; the keys of their limits stand beside."""

    path: str = Field(
        min_length=1, description="the folder of the packages, in any depth: archives with XML and figures, or XML beside its figures"
    )
    table: str | None = Field(
        default=None,
        description="a file list, relative to the folder: only the packages that it names are read; it fills in what articles do not say",
    )
    split: str = Field(default="train", min_length=1, description="split of all pairs")


@dataclass(frozen=True)
class Found:
    """A picture of a figure of an article.

    Attributes:
        article, figure: where it stands.
        entry: what the file list says of the package.
        stem: the package's own name, for articles without a number.
        index: which of the article's figures, from 0.
        picture: which of the figure's pictures, from 0.
        file: the name of its file in the package; empty if there is none.
    """

    article: jats.Article
    figure: jats.Figure
    entry: Entry
    stem: str
    index: int
    picture: int
    file: str

    @property
    def accession(self) -> str:
        """The number in PubMed Central, as `PMC<number>`, by the article or the list; empty if neither says."""
        number = self.article.pmc or self.entry.pmc
        return f"PMC{number.upper().removeprefix('PMC')}" if number else ""

    @property
    def pmid(self) -> str:
        """The number in PubMed, by the article or the list."""
        return self.article.pmid or self.entry.pmid

    @property
    def licence(self) -> str:
        """The licence, by the article or the list."""
        return self.article.licence or self.entry.licence

    @property
    def figure_name(self) -> str:
        """The figure's id, or its place; with the picture's place where the figure has several."""
        name = self.figure.id or f"figure-{self.index + 1}"
        return name if len(self.figure.graphics) < 2 else f"{name}.{self.picture + 1}"


class ArticleFigures(Source):
    """Pairs of article packages. A subclass says what a pair is called and what is kept of it.

    A figure without caption, without graphic, or whose file is missing leaves with that reason; so does a package that cannot be read and
    an article without figures, under the package's name.
    """

    elements: Sequence[str] = jats.FIGURES
    mentions: jats.Mentions = "none"

    def __init__(self, config: ArticlesConfig) -> None:
        self.articles = config
        self.root = Path(config.path).absolute()
        self.table = None if config.table is None else self.root / config.table

    def key(self, found: Found) -> str:
        """What the pair is called."""
        raise NotImplementedError

    def captions(self, found: Found) -> list[tuple[object, str]]:
        """The captions of the pair; by default the figure's, whole."""
        caption = found.figure.caption
        return [(caption, SOURCE)] if caption else []

    def columns(self, found: Found, image: bytes | None) -> dict[str, Any]:
        """The columns of the pair; null where the article does not say."""
        del image
        article, entry = found.article, found.entry
        date = article.date or entry.date
        return {
            "language": found.figure.language,
            "meta.article": found.accession or found.stem,
            "meta.pmid": found.pmid or None,
            "meta.doi": article.doi or entry.doi or None,
            "meta.journal": article.journal or entry.journal or None,
            "meta.year": int(date[:4]) if date else None,
            "meta.licence": found.licence or None,
            "meta.licence_class": licences.class_of(found.licence),
            "meta.figure": found.figure.id or None,
            "meta.label": found.figure.label or None,
            "meta.panels": panels.count(found.figure.caption),
        }

    def split(self, found: Found) -> str:
        """The pair's split."""
        del found
        return self.articles.split

    def parts(self) -> Sequence[str]:
        """The packages, sorted. Raises DataError if there are none."""
        return listing.packages(self.root) if self.table is None else sorted(listing.read(self.table))

    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one package, in the order of its articles and their figures."""
        entry = Entry() if self.table is None else listing.read(self.table)[part]
        try:
            if Path(part).is_absolute() or ".." in Path(part).parts:  # a list is not to be trusted; a link that lies here is the user's
                raise Fault("path leaves the folder")
            package = open_package(self.root / part, self.articles)
        except Fault as fault:
            yield RawPair(part, None, [], fault=fault.reason)
            return
        for name in package.articles:
            yield from self._article(part, package, name, entry)

    def _article(self, part: str, package: Package, name: str, entry: Entry) -> Iterator[RawPair]:
        try:
            if (package.size(name) or 0) > self.articles.max_xml_mebibytes * MEBIBYTE:
                raise Fault("XML too large")
            article = jats.parse(package.load(name), self.elements, self.mentions)
            if not article.figures:
                raise Fault("article without figures")
        except Fault as fault:
            yield RawPair(part if part.endswith(name) else f"{part}:{name}", None, [], fault=fault.reason)
            return
        alone = len(package.articles) == 1
        stem = stem_of(part) if alone else f"{stem_of(part)}/{stem_of(name)}"
        taken: Counter[str] = Counter()
        for index, figure in enumerate(article.figures):
            for picture, hrefs in enumerate(figure.graphics or ((),)):
                file = next((file for href in hrefs if (file := package.find(href, name))), "")
                raw = self._pair(Found(article, figure, entry, stem, index, picture, file), package)
                taken[raw.key] += 1  # ids and files may occur twice, for instance in an article and its translation
                yield raw if taken[raw.key] == 1 else replace(raw, key=f"{raw.key}~{taken[raw.key]}")

    def _pair(self, found: Found, package: Package) -> RawPair:
        figure, image, fault = found.figure, None, None
        try:
            if not figure.graphics:
                raise Fault("figure without graphic")
            if not figure.caption:
                raise Fault("figure without caption")
            if not found.file:
                raise Fault("missing image file")
            image = package.read(found.file, self.articles.max_file_mebibytes * MEBIBYTE)
        except Fault as raised:
            fault = raised.reason
        return RawPair(self.key(found), image, self.captions(found), self.columns(found, image), self.split(found), fault)


def stem_of(name: str) -> str:
    """The name of a package or of an article's file without folders and endings."""
    last = name.rpartition("/")[2]
    return next((last[: -len(ending)] for ending in (*ARCHIVES, *ARTICLES) if last.lower().endswith(ending)), last)
