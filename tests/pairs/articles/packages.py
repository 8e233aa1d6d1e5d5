"""Article packages made up for tests and benchmarks: what is in them is known to the letter."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

HEAD = '<!DOCTYPE article PUBLIC "-//NLM//DTD JATS (Z39.96) Journal Archiving and Interchange DTD v1.2 20190208//EN" "JATS-archivearticle1.dtd">'
LICENCE = '<license xlink:href="http://creativecommons.org/licenses/by/4.0/"><license-p>Open.</license-p></license>'


def article(
    body: str,
    *,
    pmid: str = "111",
    pmc: str = "1001",
    licence: str = LICENCE,
    head: str = HEAD,
    attributes: str = 'article-type="research-article"',
    after: str = "",
) -> bytes:
    """The XML of an article; `body` is XML, and so is `after`, which follows the body."""
    ids = "".join(f'<article-id pub-id-type="{kind}">{id}</article-id>' for kind, id in (("pmid", pmid), ("pmc", pmc)) if id)
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n{head}<article xmlns:xlink="http://www.w3.org/1999/xlink" {attributes}>'
        "<front><journal-meta><journal-title-group><journal-title>J Test</journal-title></journal-title-group></journal-meta>"
        f"<article-meta>{ids}<article-categories><subj-group><subject>Cell Biology</subject></subj-group></article-categories>"
        '<title-group><article-title>On <italic>cells</italic></article-title></title-group><pub-date pub-type="epub"><day>7</day>'
        f"<month>3</month><year>2019</year></pub-date><permissions>{licence}</permissions><kwd-group><kwd>microscopy</kwd></kwd-group>"
        f"</article-meta></front><body>{body}</body>{after}</article>"
    ).encode()


def figure(id: str, caption: str | None, *hrefs: str, label: str = "Figure") -> str:
    """A `fig`; the caption is XML, None leaves it out."""
    shown = "" if caption is None else f"<caption><p>{caption}</p></caption>"
    return f'<fig id="{id}"><label>{label}</label>{shown}{"".join(map(graphic, hrefs))}</fig>'


def graphic(href: str) -> str:
    """A `graphic`."""
    return f'<graphic xlink:href="{href}"/>'


def packed(path: Path, files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Path:
    """A gzipped tar, always of the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    return path


def photo(seed: int, format: str = "JPEG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    """A picture of blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).convert(mode).resize(size, Image.Resampling.NEAREST).save(buffer, format)
    return buffer.getvalue()


WORDS = [
    "axial",
    "image",
    "of",
    "a",
    "cell",
    "nodule",
    "with",
    "contrast",
    "shown",
    "after",
    "staining",
    "in",
    "mice",
    "control",
    "group",
    "bar",
    "lane",
    "protein",
    "tissue",
    "slice",
]


def corpus(folder: Path, articles: int, paragraphs: int = 0) -> dict[str, tuple[str, bytes]]:
    """Packages of every sort, good and bad; gives caption and picture of every pair that is in them, by PMC-15M's key.

    Figures without caption (also the first), nested markup, entities, alternatives with a thumbnail, references with and without ending
    or in a folder, graphics or files that are missing, inline formulas, files that are no XML. `paragraphs` of text fill each article.
    """
    known: dict[str, tuple[str, bytes]] = {}
    for number in range(articles):
        draw = np.random.default_rng(number)
        name, pmid = f"PMC{9000 + number}", "" if number % 7 == 3 else str(500 + number)
        files: dict[str, bytes] = {}
        body = [
            "".join(
                f'<p>{" ".join(draw.choice(WORDS, 90))} as <xref ref-type="bibr" rid="b1">1</xref> says.</p>' for _ in range(paragraphs)
            )
        ]
        for index in range(1, int(draw.integers(2, 6))):
            text, picture, id = " ".join(draw.choice(WORDS, 8)), photo(100 * number + index), f"F{index}"
            key = f"{pmid or name}_{id}"
            shown, said = f"{text} <italic>in <bold>vivo</bold></italic> &lt; 5 &#181;m", f"{text} in vivo < 5 µm"
            case = int(draw.integers(0, 9)) if index > 1 or number % 5 else 0
            match case:
                case 0:  # none of its own, and not the one before it
                    body.append(figure(id, None, f"g{index}"))
                    files[f"{name}/g{index}.jpg"] = picture
                    continue
                case 1:
                    body.append(figure(id, shown))
                    continue
                case 2:
                    body.append(figure(id, shown, f"gone{index}"))
                    continue
                case 3:
                    body.append(f'<fig id="{id}"><caption><title>{shown}</title><p>More of\n it.</p></caption><alternatives>'
                                f'{graphic(f"g{index}-thumbnail.jpg")}{graphic(f"g{index}.jpg")}</alternatives></fig>')  # fmt: skip
                    said += " More of it."
                    files[f"{name}/g{index}-thumbnail.jpg"] = photo(9)
                case 4:
                    body.append(figure(id, f"{shown} <inline-formula>{graphic('formula')}x</inline-formula>", f"g{index}.jpg"))
                    said += " x"
                    files[f"{name}/formula.jpg"] = photo(8)
                case 5:
                    body.append(figure(id, shown, f"figures/g{index}"))
                case _:
                    body.append(figure(id, shown, f"g{index}"))
            body.append(f'<p>See <xref ref-type="fig" rid="{id}">Figure {index}</xref> and {escape("a < b")}.</p>')
            files[f"{name}/g{index}.jpg"] = picture
            known[key] = (said, picture)
        xml = article("".join(body), pmid=pmid, pmc=str(9000 + number))
        if number % 11 == 5:
            xml = xml[: len(xml) // 2]
            known = {key: pair for key, pair in known.items() if not key.startswith(f"{pmid or name}_")}
        packed(folder / f"{number % 3:02x}" / f"{name}.tar.gz", {f"{name}/a.nxml": xml, **files})
    return known
