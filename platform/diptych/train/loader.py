"""Batches of a pair table: read, decode, augment, tokenise. The same bytes for any number of ranks and threads.

Shape legend: N pairs of one rank's batch, C channels, H W height and width, L tokens of the longest caption of the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from diptych.core import chance
from diptych.core.errors import ConfigError, DataError, Problem
from diptych.core.points import Wants
from diptych.pairs import captions
from diptych.pairs.decode import Pixels, crop, decode, decode_train, flatten
from diptych.pairs.reinforced import COLUMN, Reinforced
from diptych.train import curriculum
from diptych.train.augment import turn
from diptych.train.config import TrainConfig
from diptych.train.order import BatchOrder, MixedOrder
from diptych.train.views import Look, Recipe, recipe, view_seed

CHECKED_BATCHES = 2
SHOWN_PROBLEMS = 10
PLAIN = Wants()
"""One picture and one caption a pair, and nothing else."""


class Reader(Protocol):
    """Gives the bytes at a place in a shard."""

    def read(self, shard: str, offset: int, size: int) -> bytes:  # noqa: D102
        ...


class Tokenizer(Protocol):
    """Gives ids int64 `[N, L]`, cut to the longest caption."""

    def encode_cut(self, texts: list[str]) -> NDArray[np.int64]:  # noqa: D102
        ...


@dataclass
class Batch:
    """One rank's share of a global batch.

    Attributes:
        tensors: `image_NCHW` uint8, `text_NL` int64, `row_N` int64 (row in the frame), and what the objective wants beside.
        read_s: seconds spent on getting bytes, in whichever thread did it.
        decode_s: seconds spent on making pixels and ids of them.
    """

    tensors: dict[str, torch.Tensor]
    read_s: float
    decode_s: float


@dataclass
class _Visit:
    """What is drawn for one batch: the keys that name its draws, how its pictures look, the pairs' own and then the views, and their side in pixels.
    `stored_N`: which of its stored augmentations each pair shows, in place of the first look."""

    epoch: int
    key_N: NDArray[np.uint64]
    looks: list[Look]
    size: int
    stored_N: NDArray[np.int64] | None = None
    read_s: float = 0.0


class PairLoader:
    """Iterates one rank's batches from any step on.

    Pictures stay in memory, decoded whole, if those of the whole frame fit in `config.cache_bytes`; else they are read and decoded
    on every visit, JPEGs at reduced size where that suffices. The choice follows from the table alone, so every rank makes
    the same.

    Args:
        frame: the training pairs (`pairs/schema.py`), with the column `config.avoid` if that is set.
        reader: gives encoded pictures.
        tokenizer: the model's.
        image_size: side of the model's pictures in pixels.
        config: batch size, augmentation, captions, threads, cache.
        seed: names every draw.
        rank, world: this process's share of each global batch.
        wants: views, columns and captions that the objective wants beside; by default none.
        cores: that this process has to itself, for `loader_workers: auto`.

    Raises ConfigError if the batch does not divide by the ranks, is larger than the data, `avoid` or `labelled` cannot be kept, or
    something wanted is not there.
    """

    def __init__(
        self,
        frame: pl.DataFrame,
        reader: Reader,
        tokenizer: Tokenizer,
        image_size: int,
        config: TrainConfig,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        wants: Wants = PLAIN,
        cores: int = 1,
    ) -> None:
        if config.batch_size % world:
            raise ConfigError.at("The batch does not divide by the workers", "batch_size", config.batch_size, f"a multiple of {world}")
        if config.avoid is not None and config.avoid not in frame.columns:
            raise ConfigError.at("There is no such column", "avoid", config.avoid, f"one of {', '.join(frame.columns)}")
        if wants.boxes and config.augment.rotate_deg:
            fix = "set train.augment.rotate_deg: 0"
            raise ConfigError.at("The objective asks where pictures were cut out", "rotate_deg", config.augment.rotate_deg, "0", fix)
        self.config, self.seed, self.rank, self.world, self.wants = config, seed, rank, world, wants
        self.reader, self.tokenizer, self.image_size = reader, tokenizer, image_size
        self.recipes = [Recipe(config.augment), *(recipe(name, config.augment) for name in wants.views)]
        self.table = _Table(frame, wants)
        self.stored = _stored(frame, config) if wants.reinforced else None
        self.order = _order(frame, config, seed)
        if config.text_lengths and not hasattr(tokenizer, "shorten"):
            got = type(tokenizer).__name__
            raise ConfigError.at("Captions cannot be cut for this model", "text_lengths", got, "a model with CLIP's own tokenizer")
        self.threads = config.loader_threads(cores)
        self._total_steps = config.total_steps(self.order.steps_per_epoch)
        self._cache: dict[int, Pixels] | None = {} if self.table.pixels * 4 <= config.cache_bytes else None

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""
        return self.order.steps_per_epoch

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches of the steps in [start, stop), counted over all epochs; read ahead by the loader's threads."""
        workers = self.threads
        if workers == 0:
            yield from map(self.batch, range(start, stop))
            return
        ahead: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        try:
            for step in range(start, stop):
                ahead.append(pool.submit(self.batch, step))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def check(self, start: int = 0) -> None:
        """Decodes the first batches from `start` on, so that what is broken shows before training does.

        Raises DataError with every broken picture among them, at most ten.
        """
        problems: list[Problem] = []
        for step in range(start, start + min(CHECKED_BATCHES, self.steps_per_epoch)):
            rows_N = self.order.batch(step, self.rank, self.world)
            visit = self._visit(rows_N, step)
            for place, row in enumerate(rows_N.tolist()):
                try:
                    self._shown(self._source(row, visit), place, row, visit, visit.looks[0])
                except DataError as error:
                    problems += error.problems
        if problems:
            raise DataError(f"{len(problems)} of the first pictures cannot be used; training was not started", problems[:SHOWN_PROBLEMS])

    def batch(self, step: int) -> Batch:
        """The batch of one step, made in the calling thread. Raises DataError naming the pair whose picture broke."""
        started = time.perf_counter()
        rows_N = self.order.batch(step, self.rank, self.world)
        visit = self._visit(rows_N, step)
        image_NCHW, *views = self._images(rows_N, visit)
        drawn, others = self._texts(rows_N, visit), {name: self._texts_of(name, rows_N, visit) for name in self.wants.sources}
        text_NL, *texts = (self._ids(texts, step) for texts in drawn)
        kinds = {name: self._ids(texts, step) for name, texts in others.items()}
        arrays: dict[str, NDArray[Any]] = {"image_NCHW": image_NCHW, "text_NL": text_NL, "row_N": rows_N}
        arrays |= {f"view{index}_NCHW": view for index, view in enumerate(views)}
        if self.wants.boxes:
            names = ["image", *(f"view{index}" for index in range(len(views)))]
            arrays |= {f"{name}_box_N5": look.draws.box_and_flip_N5 for name, look in zip(names, visit.looks, strict=True)}
        arrays |= {f"text{index}_NL": text for index, text in enumerate(texts, start=1)}
        arrays |= {f"{name}_NL": kind_NL for name, kind_NL in kinds.items()}
        arrays |= {f"{name}_N": value_N[rows_N] for name, value_N in self.table.columns.items()}
        if self.stored is not None and visit.stored_N is not None:
            arrays["teacher_image_NKD"] = self.stored.image_features(rows_N, visit.stored_N)
            asked = {"text": drawn[0], **others}
            arrays |= {f"teacher_{name}_NKD": self.stored.text_features(rows_N, texts) for name, texts in asked.items()}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(tensors, visit.read_s, time.perf_counter() - started - visit.read_s)

    def _visit(self, rows_N: NDArray[np.int64], step: int) -> _Visit:
        table, epoch = self.table, self.order.epoch(step)
        key_N = self.order.visit_keys(table.hash_N[rows_N], step, self.world)
        seeds = [self.seed, *(view_seed(self.seed, view) for view in range(len(self.wants.views)))]
        looks = [
            Look(each, seed, epoch, key_N=key_N, width_N=table.width_N[rows_N], height_N=table.height_N[rows_N])
            for each, seed in zip(self.recipes, seeds, strict=True)
        ]
        for look in looks:
            if look.recipe.around:
                others = [other.draws.box_N4 for other in looks if not other.recipe.around]
                look.enclose(others, table.width_N[rows_N], table.height_N[rows_N])
        stage = curriculum.stage(self.config.image_sizes, step, self._total_steps)
        stored_N = None if self.stored is None else self.stored.draw(self.seed, epoch, key_N, rows_N)
        return _Visit(epoch, key_N, looks, self.image_size if stage is None else self.config.image_sizes[stage].size, stored_N)

    def _ids(self, texts: list[str], step: int) -> NDArray[np.int64]:
        text_NL, stage = self.tokenizer.encode_cut(texts), curriculum.stage(self.config.text_lengths, step, self._total_steps)
        if stage is None:
            return text_NL
        tokenizer: Any = self.tokenizer
        return cast(NDArray[np.int64], tokenizer.shorten(text_NL, self.config.text_lengths[stage].tokens))

    def _images(self, rows_N: NDArray[np.int64], visit: _Visit) -> list[Pixels]:
        """The pictures of each look `[N, 3, H, W]`; bytes are read once for all of them."""
        images = [np.empty((len(rows_N), 3, visit.size, visit.size), dtype=np.uint8) for _ in visit.looks]
        for place, row in enumerate(rows_N.tolist()):
            source = self._source(row, visit)
            for image_NCHW, look in zip(images, visit.looks, strict=True):
                image_NCHW[place] = self._shown(source, place, row, visit, look).transpose(2, 0, 1)
        return [look.finish(image_NCHW) for image_NCHW, look in zip(images, visit.looks, strict=True)]

    def _shown(self, source: bytes | Pixels, place: int, row: int, visit: _Visit, look: Look) -> Pixels:
        """One picture `[H, W, 3]`: the pair's own as the teachers saw it, if the objective wants that, or as the look draws it."""
        if self.stored is None or visit.stored_N is None or look is not visit.looks[0]:
            return self._picture(source, place, row, look, visit.size)
        whole = decode(source, self.table.where(row), size=self.table.picture_size(row)) if isinstance(source, bytes) else source
        return self.stored.picture(flatten(whole), row, int(visit.stored_N[place]), visit.size)

    def _source(self, row: int, visit: _Visit) -> bytes | Pixels:
        """What a picture is made from: its whole pixels, if those are kept in memory, or its bytes."""
        return self._bytes(row, visit) if self._cache is None else self._whole(row, visit)

    def _picture(self, source: bytes | Pixels, place: int, row: int, look: Look, size: int) -> Pixels:
        """One picture `[H, W, 3]`, cropped, mirrored and turned."""
        draws, table = look.draws, self.table
        box, background = draws.box(place), draws.background(place)
        if isinstance(source, bytes):
            picture = decode_train(source, size, box, table.picture_size(row), table.where(row), background)
        else:
            picture = crop(flatten(source, background), size, box)
        if draws.flip_N[place]:
            picture = picture[:, ::-1]
        angle_deg = float(draws.angle_N[place])
        return turn(picture, angle_deg, background) if angle_deg else picture

    def _whole(self, row: int, visit: _Visit) -> Pixels:
        """A picture from memory, where it stays after its first visit."""
        assert self._cache is not None
        whole = self._cache.get(row)
        if whole is None:
            whole = decode(self._bytes(row, visit), self.table.where(row), size=self.table.picture_size(row))
            self._cache[row] = whole
        return whole

    def _bytes(self, row: int, visit: _Visit) -> bytes:
        started = time.perf_counter()
        shard, offset, size = self.table.place(row)
        try:
            return self.reader.read(shard, offset, size)
        except DataError as error:
            cannot = Problem(self.table.where(row), "no bytes", f"{size} bytes of a picture")
            raise DataError(error.headline, [cannot, *error.problems]) from error
        finally:
            visit.read_s += time.perf_counter() - started

    def _texts(self, rows_N: NDArray[np.int64], visit: _Visit) -> list[list[str]]:
        """The caption of each pair that this visit trains on, and then the further ones."""
        own, choice_N = self.table.own, np.zeros(len(rows_N), dtype=np.int64)
        count_N = own.count_N[rows_N]
        first = own.of(rows_N, choice_N)
        if self.config.caption == "uniform":
            choice_N = captions.draws(self.seed, visit.epoch, visit.key_N, count_N, self.config.original)
        choices = [choice_N, *captions.others(self.seed, visit.epoch, visit.key_N, count_N, choice_N, self.wants.captions)]
        chosen = [own.of(rows_N, choice_N) for choice_N in choices]
        return [[captions.choose_caption(pair, 1) for pair in zip(first, texts, strict=True)] for texts in chosen]

    def _texts_of(self, source: str, rows_N: NDArray[np.int64], visit: _Visit) -> list[str]:
        """A caption of each pair from one source, drawn anew each visit."""
        kind = self.table.kinds[source]
        draw = int(chance.mix(self.seed, chance.key_hash(source)))
        return kind.of(rows_N, captions.draws(draw, visit.epoch, visit.key_N, kind.count_N[rows_N]))


def _stored(frame: pl.DataFrame, config: TrainConfig) -> Reinforced:
    """What the teachers said. Raises ConfigError if nobody asked them, or if pictures would be changed after what they saw."""
    if COLUMN not in frame.columns:
        fix = "put {method: reinforce, teachers: [...]} last in the caption phase"
        raise ConfigError.at("The pairs were not shown to teachers", "objective", COLUMN, f"one of {', '.join(frame.columns)}", fix)
    augment = config.augment
    if augment.flip or augment.rotate_deg or augment.recolors:
        got, expected = augment.plain(), "no mirror, turn or colours: stored augmentations take the place of the run's own"
        raise ConfigError.at("What the teachers saw must not be changed again", "augment", got, expected)
    return Reinforced(frame[COLUMN], frame["key"])


def _order(frame: pl.DataFrame, config: TrainConfig, seed: int) -> BatchOrder | MixedOrder:
    if config.labelled is None:
        return BatchOrder(frame.height, config.batch_size, seed, frame[config.avoid] if config.avoid else None)
    if "label" not in frame.columns:
        raise ConfigError.at("There are no labels to draw by", "labelled", config.labelled, "a column label")
    return MixedOrder(frame["label"].is_not_null().to_numpy(), config.batch_size, config.labelled, seed)


class _Captions:
    """Captions of every row, laid end to end: `count_N` of each, int64."""

    def __init__(self, lists: pl.Series) -> None:
        self.count_N = lists.list.len().cast(pl.Int64).to_numpy()
        self._first_N = np.cumsum(self.count_N) - self.count_N
        self._texts = lists.filter(lists.list.len() > 0).explode().struct.field("text")

    def of(self, rows_N: NDArray[np.int64], choice_N: NDArray[np.int64]) -> list[str]:
        """The chosen caption of some rows."""
        texts: list[str] = self._texts.gather(self._first_N[rows_N] + choice_N).to_list()
        return texts


class _Table:
    """The columns of the pair table in the form that batches are made from; keys and captions stay in polars."""

    def __init__(self, frame: pl.DataFrame, wants: Wants) -> None:
        image = frame["image"].struct.unnest()
        _refuse_nulls(frame["key"], image, frame["captions"])
        self.keys, self.shards = frame["key"], image["shard"].cast(pl.Categorical)
        self.offset_N, self.size_N = image["offset"].to_numpy(), image["size"].to_numpy()
        self.width_N, self.height_N = image["width"].cast(pl.Int64).to_numpy(), image["height"].cast(pl.Int64).to_numpy()
        self.hash_N = chance.key_hashes(frame["key"])
        self.kinds = {name: _Captions(_of_sources(frame, (name,))) for name in wants.sources}
        self.own = _Captions(_of_sources(frame, wants.sources, others=True) if wants.sources else frame["captions"])
        self.columns = {name: _numbers(frame, name) for name in wants.columns}

    @property
    def pixels(self) -> int:
        """Pixels of all pictures together."""
        return int((self.width_N * self.height_N).sum())

    def place(self, row: int) -> tuple[str, int, int]:
        """(shard, offset, size in bytes) of a pair's picture."""
        return self.shards[row], int(self.offset_N[row]), int(self.size_N[row])

    def picture_size(self, row: int) -> tuple[int, int]:
        """(width, height) of a pair's picture."""
        return int(self.width_N[row]), int(self.height_N[row])

    def where(self, row: int) -> str:
        """How an error names a pair's picture."""
        return f"{self.keys[row]} ({self.shards[row]} at {self.offset_N[row]})"


def _refuse_nulls(keys: pl.Series, image: pl.DataFrame, caption_lists: pl.Series) -> None:
    """Every training pair needs a picture of known place and size, and a caption."""
    checks: list[tuple[str, Callable[[], Any]]] = [(f"image.{name}", image[name].is_null) for name in image.columns]
    checks.append(("captions", lambda: caption_lists.list.len().fill_null(0) == 0))
    problems = [
        Problem(str(keys[int(bad.arg_max() or 0)]), f"nothing in {name} ({bad.sum()} such pairs)", "a value")
        for name, find in checks
        if (bad := find()).any()
    ]
    if problems:
        raise DataError("Pairs without a picture or a caption cannot be trained on", problems)


def _of_sources(frame: pl.DataFrame, sources: Sequence[str], others: bool = False) -> pl.Series:
    """The captions of these sources, or all but those. Raises DataError for a pair that has none."""
    source = pl.element().struct.field("source")
    of_these = pl.any_horizontal(*((source == name) | source.str.starts_with(f"{name}:") for name in sources))
    found = frame.select(pl.col("captions").list.filter(~of_these if others else of_these)).to_series()
    if (bare := found.list.len() == 0).any():
        names = ", ".join(sources)
        expected = f"a caption that is not of the source {names}" if others else f"a caption of the source {names}"
        where = f"{frame['key'][int(bare.arg_max() or 0)]} and {int(bare.sum()) - 1} more"
        fix = "let the caption phase write them, or reject the pairs without"
        raise DataError.at("Pairs lack a kind of caption that the objective wants", where, "none", expected, fix)
    return found


def _numbers(frame: pl.DataFrame, name: str) -> NDArray[Any]:
    """A column as an objective gets it: int64 with -1 for null, or float32 with NaN."""
    if name not in frame.columns:
        raise ConfigError.at("The objective wants a column that is not there", "objective", name, f"one of {', '.join(frame.columns)}")
    values = frame[name]
    if values.dtype.is_float():
        return values.cast(pl.Float32).fill_null(float("nan")).to_numpy()
    if not (values.dtype.is_integer() or values.dtype == pl.Boolean):
        raise ConfigError.at("The objective wants a column that holds no numbers", name, str(values.dtype), "integers or floats")
    return values.cast(pl.Int64).fill_null(-1).to_numpy()
