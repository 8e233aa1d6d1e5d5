"""Image-text retrieval: find the image by its text and the text by its image, by cosine.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.1.4 and appendix E.1
(zero-shot transfer to Flickr30k and MSCOCO).

Shape legend: N images, M texts (M >= N, at least one an image), D feature width, Q queries, K retrieved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from diptych.core.chance import key_hashes, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.intervals import quantile_interval
from diptych.evaluate.ranks import chunks, target_rank
from diptych.evaluate.rows import Rows, of_split, preprocessing

Index = NDArray[np.int64]
Features = NDArray[np.float32]
Direction = Literal["text_to_image", "image_to_text"]

TASK = "retrieval"
DIRECTIONS: tuple[Direction, Direction] = ("text_to_image", "image_to_text")
POOL_DRAW = 0x706F6F6C
"""Names the draw of `pool`, apart from the run's seed: every checkpoint and every seed search the same pool."""


class Config(BaseConfig):
    """Retrieval within the pairs of a split."""

    method: Literal["retrieval"] = "retrieval"
    split: str = Field("test", min_length=1, description="the split to search")
    prefix: str = Field("", description='put before every caption; the paper uses "a photo of "')
    captions: Literal["first", "all"] = Field("all", description="which captions of a pair are searched for and found")
    ks: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="k of the recalls")
    column: str | None = Field(
        None,
        min_length=1,
        description="search by the text in this column instead of captions; every picture with an equal text is as good a find",
    )
    task: str = Field(
        TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric, where one set is searched twice"
    )
    pool: int | None = Field(None, ge=2, description="search among this many pairs, drawn by key, instead of the whole split")

    @field_validator("ks")
    @classmethod
    def _increasing(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if list(ks) != sorted(set(ks)) or ks[0] < 1:
            raise ValueError("increasing numbers >= 1")
        return ks

    def build(self) -> Retrieval:
        """The benchmark."""
        return Retrieval(self)


# ---------------------------------------------------------------- the mathematics


def text_to_image_ranks(text_MD: Features, image_ND: Features, image_of_M: Index, order_N: Index | None = None) -> Index:
    """How many images score above each text's own, int64 `[M]`. Equal scores are decided by `order_N` (column by default).

    Features are L2-normalised (the score is their product); `image_of_M` is the row of the text's image.
    """
    image_DN = np.ascontiguousarray(image_ND.T)
    parts = [target_rank(text_MD[part] @ image_DN, image_of_M[part], order_N) for part in chunks(len(text_MD), len(image_ND))]
    return np.concatenate(parts)


def image_to_text_ranks(image_ND: Features, text_MD: Features, image_of_M: Index, order_M: Index | None = None) -> Index:
    """How many texts score above the best of each image's own, int64 `[N]`: any caption of the image is a hit.

    Raises DataError if an image has no text.
    """
    owned = np.bincount(image_of_M, minlength=len(image_ND))
    if not owned.all():
        raise DataError.at("An image has no text to find", "captions", int(np.argmin(owned)), "at least one text an image")
    order = np.arange(len(text_MD)) if order_M is None else order_M
    by_image = np.lexsort((order, image_of_M))
    start = np.concatenate([[0], np.cumsum(owned)])
    text_DM = np.ascontiguousarray(text_MD.T)
    ranks = []
    for part in chunks(len(image_ND), len(text_MD)):
        score = image_ND[part] @ text_DM
        ranks.append(target_rank(score, _best_own(score, by_image, start[part.start : part.stop + 1]), order))
    return np.concatenate(ranks)


def _best_own(score: Features, by_image: Index, start: Index) -> Index:
    """The column of each row's best own text; of equals the first in `by_image`, which holds each image's texts one after another."""
    own = by_image[start[0] : start[-1]]
    length = np.diff(start)
    row = np.repeat(np.arange(len(score)), length)
    value = score[row, own]
    best = np.maximum.reduceat(value, start[:-1] - start[0])
    first = np.flatnonzero((value == best[row]) | np.isnan(best[row]))
    _, keep = np.unique(row[first], return_index=True)
    return np.asarray(own[first[keep]])


def recall(rank: Index, k: int) -> float:
    """The share of queries with a hit among the first k."""
    return float((rank < k).mean())


def top(query_QD: Features, found_XD: Features, k: int, order_X: Index | None = None) -> tuple[Index, Features]:
    """The k best candidates of each query, best first: their rows and their scores, `[Q, K]` each. Ties as in the ranks."""
    k = min(k, len(found_XD))
    order = np.arange(len(found_XD)) if order_X is None else order_X
    rows, scores = [], []
    for part in chunks(len(query_QD), len(found_XD)):
        score = query_QD[part] @ found_XD.T
        # One partition, then an exact sort of all that reach the k-th score, so that ties at the edge are not cut at random.
        edge = np.partition(score, -k, axis=1)[:, -k]
        for line, least in zip(score, edge, strict=True):
            reach = np.flatnonzero(line >= least)
            best = reach[np.lexsort((order[reach], -line[reach]))[:k]]
            rows.append(best)
            scores.append(line[best])
    return np.stack(rows), np.stack(scores)


# ---------------------------------------------------------------- the texts and images of a set


class Gallery(NamedTuple):
    """What is searched: `pairs` (a row an image), their texts, the image row of each text, and the order that decides ties."""

    pairs: pl.DataFrame
    texts: list[str]
    image_of_M: Index
    order_N: Index
    order_M: Index

    @property
    def duplicate_texts(self) -> int:
        """Texts that equal an earlier one. Only the query's own image counts as a hit, so they lower the
        ceiling of text-to-image recall."""
        return len(self.texts) - len(set(self.texts))


def gallery(pairs: pl.DataFrame, config: Config) -> Gallery:
    """The searched images and texts. Raises DataError for an unknown split or pairs without caption, ConfigError for too large a pool."""
    rows = _pool(of_split(pairs, config.split), config.pool)
    captions = pl.col("captions").list.eval(pl.element().struct.field("text"))
    bare = rows.filter(pl.col("captions").list.len().fill_null(0) == 0)
    if len(bare):
        raise DataError.at("A pair has no caption to search by", "captions", bare["key"].head(5).to_list(), "at least one caption a pair")
    chosen = rows.select(captions if config.captions == "all" else captions.list.head(1)).with_row_index("image").explode("captions")
    image_of_M = chosen["image"].to_numpy().astype(np.int64)
    # Ties are decided by the hash of the key, which is spread evenly and the same in whatever order the rows come.
    order_N = _places(key_hashes(rows["key"].to_list()))
    order_M = _places(order_N[image_of_M])
    return Gallery(rows, [config.prefix + text for text in chosen["captions"]], image_of_M, order_N, order_M)


def _pool(rows: pl.DataFrame, size: int | None) -> pl.DataFrame:
    if size is None:
        return rows
    if size > len(rows):
        raise ConfigError.at("The pool is larger than the split", "pool", size, f"at most {len(rows)}")
    draw = uniform(POOL_DRAW, key_hashes(rows["key"].to_list()))
    return rows[np.sort(np.argsort(draw, kind="stable")[:size])]


def _places(value: NDArray[Any]) -> Index:
    """The place of every element in the stable ascending order."""
    place = np.empty(len(value), np.int64)
    place[np.argsort(value, kind="stable")] = np.arange(len(value))
    return place


def shared_gallery(pairs: pl.DataFrame, config: Config) -> Gallery:
    """The searched images and the distinct texts of `column`; `image_of_M` is, the other way round, the text of each image, int64 `[N]`.

    Raises DataError for an unknown split, and for a column that is not there, holds no texts, or lacks some.
    """
    rows = _pool(of_split(pairs, config.split), config.pool)
    name = config.column
    if name not in rows.columns or rows[name].dtype != pl.String or rows[name].null_count():
        got = "no such column" if name not in rows.columns else f"{rows[name].dtype}, {rows[name].null_count()} nulls"
        raise DataError.at("The pairs cannot be searched by that column", name, got, "a column of texts, one a pair")
    found, text_of_N = np.unique(rows[name].to_numpy(), return_inverse=True)
    order_N, order_M = _places(key_hashes(rows["key"].to_list())), _places(key_hashes(found.tolist()))
    return Gallery(rows, [config.prefix + text for text in found], text_of_N.astype(np.int64), order_N, order_M)


# ---------------------------------------------------------------- the benchmark


class Retrieval:
    """The benchmark.

    Metrics a direction: `<direction>_r<k>`, `<direction>_mrr` (mean of 1 / rank) and `<direction>_median_rank` (from 1; a median has no
    summands, so it comes without `per_example`).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises as `gallery` does."""
        shared = self.config.column is not None
        found = shared_gallery(pairs, self.config) if shared else gallery(pairs, self.config)
        settings, task = self.settings(encoder, found), self.config.task
        keys = found.pairs["key"].to_list()
        query_keys = {"image_to_text": keys, "text_to_image": found.texts if shared else text_keys(keys, found.image_of_M)}
        ranks = _shared_ranks(encoder, found) if shared else _ranks(encoder, found)
        return [row for way in DIRECTIONS for row in self._metrics(way, ranks[way], Rows(name, task, query_keys[way], seed, settings))]

    def settings(self, encoder: Encoder, found: Gallery) -> dict[str, Any]:
        """What must be equal for two rows to be comparable."""
        return {
            **self.config.model_dump(include={"split", "prefix", "captions"}),
            **({"column": self.config.column} if self.config.column else {}),
            "images": len(found.pairs),
            "texts": len(found.texts),
            "duplicate_texts": found.duplicate_texts,
            **preprocessing(encoder),
        }

    def _metrics(self, way: Direction, rank: Index, rows: Rows) -> list[Metric]:
        low, high = quantile_interval(rank + 1)
        return [
            *(rows.mean(f"{way}_r{k}", (rank < k).astype(np.float32)) for k in self.config.ks),
            rows.mean(f"{way}_mrr", 1 / (rank + 1)),
            Metric(rows.set, rows.task, f"{way}_median_rank", float(np.median(rank + 1)), len(rank), low, high, rows.settings),
        ]


def text_keys(keys: Sequence[str], image_of_M: Index) -> list[str]:
    """Keys of the texts: `<key of the pair>#<number of the text within the pair>`."""
    start = np.searchsorted(image_of_M, image_of_M)
    return [f"{keys[image]}#{row - first}" for row, (image, first) in enumerate(zip(image_of_M, start, strict=True))]


def _ranks(encoder: Encoder, found: Gallery) -> dict[Direction, Index]:
    image_ND, text_MD = encoder.images(found.pairs), encoder.texts(found.texts)
    return {
        "text_to_image": text_to_image_ranks(text_MD, image_ND, found.image_of_M, found.order_N),
        "image_to_text": image_to_text_ranks(image_ND, text_MD, found.image_of_M, found.order_M),
    }


def _shared_ranks(encoder: Encoder, found: Gallery) -> dict[Direction, Index]:
    """Texts that several images share: a text's best image stands to it as an image's best caption stands to the image, and vice versa."""
    image_ND, text_MD = encoder.images(found.pairs), encoder.texts(found.texts)
    return {
        "text_to_image": image_to_text_ranks(text_MD, image_ND, found.image_of_M, found.order_N),
        "image_to_text": text_to_image_ranks(image_ND, text_MD, found.image_of_M, found.order_M),
    }


# ---------------------------------------------------------------- for people to look at


def ranking(encoder: Encoder, pairs: pl.DataFrame, k: int = 5, config: Config | None = None) -> pl.DataFrame:
    """What each text finds among the images, a row a text in the order of the pairs.

    Columns: `query_key` (the pair's key), `text`, `rank_of_target` (int, from 1), `top_keys` (list of k keys, best first), `scores`
    (list of k cosines). Raises as `gallery` does.
    """
    found = gallery(pairs, config or Config())
    image_ND, text_MD = encoder.images(found.pairs), encoder.texts(found.texts)
    rank = text_to_image_ranks(text_MD, image_ND, found.image_of_M, found.order_N)
    row, score = top(text_MD, image_ND, k, found.order_N)
    keys = np.asarray(found.pairs["key"].to_list(), dtype=object)
    return pl.DataFrame(
        {
            "query_key": keys[found.image_of_M].tolist(),
            "text": found.texts,
            "rank_of_target": rank + 1,
            "top_keys": keys[row].tolist(),
            "scores": score.tolist(),
        },
        schema_overrides={"scores": pl.List(pl.Float32), "top_keys": pl.List(pl.String)},
    )


def examples(encoder: Encoder, pairs: pl.DataFrame, seed: int, *, count: int = 4, k: int = 5, config: Config | None = None) -> pl.DataFrame:
    """A handful of queries for the report: up to `count` that found their image first and `count` that did not, drawn by key.

    The columns of `ranking`, and `right` (bool); right ones first.
    """
    table = ranking(encoder, pairs, k, config).with_columns(right=pl.col("rank_of_target") == 1)
    draw = uniform(seed, key_hashes(f"{key}\n{text}" for key, text in table.select("query_key", "text").rows()))
    shuffled = table.with_columns(draw=pl.Series(draw)).sort("draw")
    halves = [shuffled.filter(pl.col("right") == right).head(count) for right in (True, False)]
    return pl.concat(halves).drop("draw")
