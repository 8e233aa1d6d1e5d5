"""BIOMEDICA: captions, figure references and citing paragraphs, fields of citations, image sizes, labels by clusters, the loader's rule."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.curate import clustering
from diptych.pairs.articles.article import Figure, image_name, normal, parse
from diptych.pairs.articles.citations import date_of, journal_of, title_of
from diptych.pairs.articles.pixels import shrunk
from diptych.pairs.articles.xml import tree
from diptych.pairs.sources.webdataset import Config as WebDatasetConfig

Array = NDArray[np.generic]

INPUTS = (
    "xml", "caption_query", "context_xml", "citation", "title_in_json", "img_a", "img_g", "img_big", "lab_features", "lab_query", "lab_kmeans_centers",
)  # fmt: skip

TOLERANCE = {"lab_pca_*": (1e-9, 1e-11)}

SAMPLES = (("txt", "jpg"), ("txt", "jpg"), ("jpg",), ("txt",), ("txt", "png"), ("txt", "webp"), ("txt", "json"))
"""The sample dictionaries of the card: the second text is empty, which the key-presence rule does not see."""


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    articles = [parse(str(xml).encode()).figures for xml in vectors["xml"]]
    pictures = [np.asarray(vectors[name]) for name in ("img_a", "img_g", "img_big")]
    titles = [title_of(json.loads(str(text))) for text in vectors["title_in_json"]]
    return {
        "caption": np.array([caption(articles[int(file)], str(id)) for file, id in vectors["caption_query"]]),
        "rid_to_image_json": np.array([json.dumps({normal(f.id): image_name(f.graphics) for f in figures}) for figures in articles]),
        "context_json": np.array([json.dumps(context(str(xml).encode())) for xml in vectors["context_xml"]]),
        "citation_journal": np.array([journal_of(str(text)) for text in vectors["citation"]]),
        "citation_date": np.array(["{:04d} {:02d} {:02d}".format(*(date_of(str(text)) or ())) for text in vectors["citation"]]),
        "title_out": np.array([str(title) for title in titles]),
        "img_thumb_sizes": np.array([shrunk(Image.fromarray(picture)).size for picture in pictures]),
        "filter_keep": np.array([keeps(sample) for sample in SAMPLES]),
        **labels(vectors),
    }


def caption(figures: tuple[Figure, ...], id: str) -> str:
    """The official caption of an image: title and paragraphs run together, and a marker where there is none."""
    own = [figure for figure in figures if any(id in hrefs for hrefs in figure.graphics)]
    return (own[0].content.strip() if own[0].parts else "No caption found") if own else ""


def context(xml: bytes) -> dict[str, list[str]]:
    """The citing paragraphs by picture, in the order in which the text first cites the figures."""
    figures = {normal(figure.id): figure for figure in parse(xml, mentions="marked").figures}
    cited = dict.fromkeys(normal(reference.get("rid", "")) for reference in tree(xml).iter("xref"))
    return {image_name(figures[id].graphics): list(figures[id].mentions) for id in cited if id in figures and figures[id].mentions}


def keeps(endings: tuple[str, ...]) -> bool:
    """Whether a sample of a tar is a pair before texts and pictures are looked at."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        with tarfile.open(path, "w") as tar:
            for ending in endings:
                tar.addfile(tarfile.TarInfo(f"a.{ending}"), io.BytesIO())
        (raw,) = WebDatasetConfig(path=str(path)).build().read("0")
    return raw.fault is None and bool(raw.captions)


def labels(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """The axes of PCA, and the clusters of features by given centres."""
    feature_ND, query_QD, center_KC = (np.asarray(vectors[name]) for name in ("lab_features", "lab_query", "lab_kmeans_centers"))
    axes = clustering.principal_axes(feature_ND, center_KC.shape[1])
    clusters = clustering.Clusters(axes, center_KC)
    return {
        "lab_pca_mean": axes.mean_D,
        "lab_pca_components": axes.component_CD,
        "lab_pca_explained_variance": axes.variance_C,
        "lab_assign": clusters.label(feature_ND).astype(np.int32),
        "lab_query_assign": clusters.label(query_QD).astype(np.int32),
    }
