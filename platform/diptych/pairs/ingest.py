"""From what a source yields to a pair dataset: every picture and caption is checked, and what cannot be used leaves with a reason.

The rules for captions: one that is null, not text, not valid UTF-8, blank, or longer than 10,000 characters is taken off its pair and
counted in the phase's report (`captions_removed`); a pair without any caption left leaves with the reason of its first one.
"""

from __future__ import annotations

import builtins
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl
from PIL import Image
from pydantic import Field

from diptych.core.config import Config
from diptych.core.errors import DataError, Problem
from diptych.core.points import RawPair, Source
from diptych.pairs.dataset import PairDataset
from diptych.pairs.image import EXTENSIONS, Fault, ImageInfo, ImageLimits, probe, to_eight_bits, verify
from diptych.pairs.manifest import PhaseRecord, ShardEntry
from diptych.pairs.schema import MAX_CAPTION_CHARS, MAX_KEY_BYTES, PAIRS, REJECTS
from diptych.pairs.shards import ShardWriter
from diptych.pairs.sources.placed import HEAD_BYTES, PlacedPair
from diptych.pairs.write import DatasetWriter

METHOD = "ingest"
MEBIBYTE = 1 << 20
EXAMPLES = 3
FEW_PAIRS = 10_000  # below, the share of bad pairs is judged only at the end

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


class StoreConfig(Config):
    """How pictures are packed. Pictures that already lie in tars are not copied and stay as they are."""

    short_side: int | None = Field(
        default=None, gt=0, description="pictures with a longer short side are resized to it, pixels; null: never"
    )
    format: Literal["keep", "jpeg", "webp"] = Field(
        default="keep", description="`keep`: own format; `jpeg`: quality 90, opaque pictures only; `webp`: lossless"
    )


class IngestConfig(Config):
    """How raw pairs become a dataset; these keys stand beside the source's own in a workflow."""

    store: StoreConfig = Field(default_factory=StoreConfig)
    limits: ImageLimits = Field(default_factory=ImageLimits)
    check: Literal["decode", "header"] = Field(
        default="decode", description="`decode` finds pictures that are cut off or corrupt; `header` reads their size only and is faster"
    )
    max_bad_share: float = Field(default=0.5, ge=0, le=1, description="share of pairs that may leave at ingest before the run stops")
    shard_mebibytes: int = Field(default=256, gt=0, description="size at which a tar is closed, MiB")


@dataclass
class PartResult:
    """What became of one part of a source."""

    kept: pl.DataFrame
    rejected: pl.DataFrame
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    captions_removed: Counter[str] = field(default_factory=Counter)


def ingest(source: Source, part: str, shards: ShardWriter, config: IngestConfig | None = None) -> PartResult:
    """Checks the pairs of one part and packs their pictures into `shards`. Keys are unique within the part afterwards.

    Raises DataError if an extra column mixes types, ResourceError if the disk is full.
    """
    packer = _Packer(shards, config or IngestConfig())
    for raw in source.read(part):
        packer.take(raw)
    return packer.result(part)


def ingest_all(
    source: Source,
    out: Path,
    *,
    config: IngestConfig | None = None,
    seed: int = 0,
    map: Map = builtins.map,
    code: str = "",
    version: str = "",
    methods: tuple[dict[str, Any], ...] = (),
) -> PairDataset:
    """Ingests all parts of a source into the dataset `out`.

    Args:
        map: applies a picklable function to every part, in order; may do so elsewhere, where `out` is the same folder.
        code, version, methods: what the manifest says about the producer.

    Raises DataError if there are no pairs, or if more than `max_bad_share` of them leave (with the table of reasons).
    """
    config = config or IngestConfig()
    parts = list(source.parts())
    record = PhaseRecord(phase=METHOD, methods=methods, seed=seed, code=code, version=version)
    with DatasetWriter(out, record, pairs_in=None) as writer:
        writer.shards_folder.mkdir()
        removed: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        for result in map(_PartTask(source, writer.shards_folder, config), list(enumerate(parts))):
            writer.add_shards(result.shards)
            kept, rejected = _first_come(writer, result)
            writer.add(kept, rejected)
            _note(examples, rejected)
            removed += result.captions_removed
            _check_share(writer, config.max_bad_share, FEW_PAIRS, examples)
        if not writer.kept + writer.left.total():
            found = f"<{len(parts)} parts, all empty>" if parts else "<nothing to read>"
            raise DataError.at("The source holds no pairs", "data.source", found, "one pair or more", "look at what its path names")
        _check_share(writer, config.max_bad_share, 0, examples)
        report = {"parts": len(parts), "captions_removed": dict(sorted(removed.items())), **source.report()}
        writer.phase = record.model_copy(update={"report": report})
        return writer.finish()


@dataclass(frozen=True)
class _PartTask:
    """`ingest` of one `(index, part)`; shards carry the index, so that no two parts share a name."""

    source: Source
    folder: Path
    config: IngestConfig

    def __call__(self, item: tuple[int, str]) -> PartResult:
        index, part = item
        with ShardWriter(self.folder, f"images-{index:05d}", self.config.shard_mebibytes * MEBIBYTE) as shards:
            return ingest(self.source, part, shards, self.config)


class _Packer:
    """Takes raw pairs one by one; keeps rows, not pictures."""

    def __init__(self, shards: ShardWriter, config: IngestConfig) -> None:
        self.shards, self.config = shards, config
        self.kept: list[dict[str, Any]] = []
        self.extras: list[Mapping[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self.removed: Counter[str] = Counter()
        self.placed: dict[str, ShardEntry] = {}
        self.seen: set[str] = set()

    def take(self, raw: RawPair) -> None:
        captions, faults = check_captions(raw.captions)
        key, fault = check_key(raw.key)
        image = None
        try:
            if reason := raw.fault or fault:
                raise Fault(reason)
            if not captions:
                raise Fault(faults[0] if faults else "no caption")
            if not raw.split:
                raise Fault("no split")
            if key in self.seen:
                raise Fault("duplicate key")
            image = self._stored(key, raw)
        except Fault as error:
            self.rejected.append(
                {"key": key, "phase": METHOD, "method": METHOD, "reason": error.reason, "image": image, "captions": captions or None}
            )
            return
        self.seen.add(key)
        self.removed.update(faults)
        self.kept.append({"key": key, "image": image, "captions": captions, "split": raw.split})
        self.extras.append(raw.extra)

    def result(self, part: str) -> PartResult:
        kept = pl.DataFrame(self.kept, schema=PAIRS, strict=True)
        names = sorted({name for extra in self.extras for name in extra})
        kept = kept.with_columns([_column(name, [extra.get(name) for extra in self.extras], part) for name in names])
        rejected = pl.DataFrame([{"twin": None, **row} for row in self.rejected], schema=REJECTS, strict=True)
        return PartResult(kept, rejected, {**self.shards.done(), **self.placed}, self.removed)

    def _stored(self, key: str, raw: RawPair) -> dict[str, Any]:
        if isinstance(raw, PlacedPair):
            return self._placed(raw)
        if raw.image is None:
            raise Fault("no image")
        info = (verify if self.config.check == "decode" else probe)(raw.image, self.config.limits)
        data, info = stored(raw.image, info, self.config.store, self.config.limits)
        return {**self.shards.add(key, EXTENSIONS[info.format], data), "width": info.width, "height": info.height}

    def _placed(self, raw: PlacedPair) -> dict[str, Any]:
        """The place of a picture that already lies in a tar."""
        if raw.size > self.config.limits.max_bytes:
            raise Fault("too many bytes")
        whole = self.config.check == "decode"
        info = verify(raw.load(raw.size), self.config.limits) if whole else _probe_head(raw, self.config.limits)
        if info.format not in EXTENSIONS:
            raise Fault(f"{info.format} cannot be used in place")
        self.placed.setdefault(raw.shard, raw.entry)
        return {"shard": raw.shard, "offset": raw.offset, "size": raw.size, "width": info.width, "height": info.height}


def _probe_head(raw: PlacedPair, limits: ImageLimits) -> ImageInfo:
    try:
        return probe(raw.load(HEAD_BYTES), limits)
    except Fault as fault:
        if raw.size <= HEAD_BYTES or "bomb" in fault.reason:
            raise
        return probe(raw.load(raw.size), limits)  # a thumbnail or a colour profile may stand before the size


def check_captions(captions: Iterable[tuple[object, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The usable captions as rows of the schema, and a reason for each of the others."""
    good, faults = [], []
    for text, source in captions:
        fault, checked = _checked(text)
        if fault is None:
            good.append({"text": checked, "source": source, "score": None})
        else:
            faults.append(fault)
    return good, faults


def _checked(text: object) -> tuple[str | None, str]:
    if text is None:
        return "null caption", ""
    if not isinstance(text, str | bytes):
        return "caption is not text", ""
    try:
        checked = text.decode() if isinstance(text, bytes) else text.encode().decode()
    except UnicodeError:
        return "caption is not valid UTF-8", ""
    if not checked.strip():
        return "empty caption", ""
    return ("caption too long", "") if len(checked) > MAX_CAPTION_CHARS else (None, checked)


def check_key(key: str) -> tuple[str, str | None]:
    """The key as it can be written, and what is wrong with it."""
    clean = key.encode(errors="replace").decode()
    if not clean:
        return clean, "empty key"
    if clean != key:
        return clean, "key is not valid UTF-8"
    return (clean[:100], "key too long") if len(clean.encode()) > MAX_KEY_BYTES else (clean, None)


def stored(data: bytes, info: ImageInfo, store: StoreConfig, limits: ImageLimits) -> tuple[bytes, ImageInfo]:
    """The picture as it is packed, and what it then is. Bytes that need no change are not touched.

    Animations, CMYK, 16 bits, BMP and TIFF are decoded and packed as PNG (CMYK JPEGs as JPEG). Raises Fault.
    """
    shrink = store.short_side is not None and min(info.width, info.height) > store.short_side
    wanted = {"jpeg": "JPEG", "webp": "WEBP"}.get(store.format, info.format)
    if info.plain and not shrink and wanted == info.format:
        return data, info
    picture = to_eight_bits(data, limits)
    if shrink:
        assert store.short_side is not None
        factor = store.short_side / min(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    if wanted not in ("JPEG", "WEBP") or (wanted == "JPEG" and picture.mode == "RGBA"):
        wanted = "PNG"
    return _encoded(picture, wanted), ImageInfo(*picture.size, wanted, picture.mode, 1)


def _encoded(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    match format:
        case "JPEG":
            picture.save(buffer, "JPEG", quality=90)
        case "WEBP":
            picture.save(buffer, "WEBP", lossless=True)
        case _:
            picture.save(buffer, "PNG")
    return buffer.getvalue()


def _column(name: str, values: list[Any], part: str) -> pl.Series:
    try:
        return pl.Series(name, values, strict=True)
    except (TypeError, pl.exceptions.PolarsError, OverflowError) as error:
        raise DataError.at("An extra column mixes types", f"{part}: column {name!r}", f"<{error}>", "one type in all rows") from None


def _first_come(writer: DatasetWriter, result: PartResult) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The result without the pairs whose key an earlier part has; they leave."""
    taken = writer.known(result.kept["key"])
    if not taken.any():
        return result.kept, result.rejected
    late = result.kept.filter(taken).select("key", "image", "captions")
    late = late.with_columns(
        phase=pl.lit(METHOD), method=pl.lit(METHOD), reason=pl.lit("duplicate key"), score=pl.lit(None, pl.Float32), twin=pl.col("key")
    ).select(list(REJECTS))
    return result.kept.filter(~taken), pl.concat([result.rejected, late])


def _note(examples: dict[str, list[str]], rejected: pl.DataFrame) -> None:
    """Adds the keys of the first few pairs that left for each reason, for the table of reasons."""
    for key, reason in rejected.group_by("reason", maintain_order=True).head(EXAMPLES).select("key", "reason").iter_rows():
        if len(named := examples.setdefault(reason, [])) < EXAMPLES:
            named.append(key)


def _check_share(writer: DatasetWriter, limit: float, least_pairs: int, examples: Mapping[str, Sequence[str]]) -> None:
    left, total = writer.left.total(), writer.kept + writer.left.total()
    if total <= least_pairs or left <= limit * total:
        return
    table = [
        Problem(reason, f"{count:,} pair{'s' if count > 1 else ''}, e.g. {', '.join(examples.get(reason, ()))}", "a usable pair")
        for (_, reason), count in writer.left.most_common()
    ]
    raise DataError(f"{left:,} of {total:,} pairs cannot be used, more than max_bad_share = {limit:g}; nothing was kept", table)
