"""The verbs on pair datasets: `data ls | show | card | diff | browse | export | ingest`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from diptych.core.errors import ConfigError, nearest
from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import NAME

MOST_NAMED = 8
"""Datasets that an error names."""


def _datasets(root: Path) -> dict[str, Path]:
    folders = [
        path.parent
        for path in sorted(root.glob(f"**/{NAME}"))
        if not any(part.startswith(".") or ".partial" in part for part in path.parts)
    ]
    return {folder.relative_to(root).as_posix(): folder for folder in folders}


def _find(name: str) -> PairDataset:
    """A dataset by folder, or by `RUN/PHASE` in this project."""
    folder = Path(name)
    if (folder / NAME).exists():
        return PairDataset.open(folder)
    inside = _in_project()
    known = _datasets(_runs()) if inside else {}
    short = name.removeprefix("runs/").rstrip("/")
    if short in known:
        return PairDataset.open(known[short])
    if variation := _newest_variation(short, known):
        sys.stderr.write(f"{short}: taken from {variation}, the newest run of that workflow\n")
        return PairDataset.open(known[variation])
    shown = ", ".join(list(known)[:MOST_NAMED]) + (
        f" and {len(known) - MOST_NAMED:,} more, see `diptych data ls`" if len(known) > MOST_NAMED else ""
    )
    expected = f"a folder with {NAME}" + (f", or one of {shown}" if known else "; this project has none yet" if inside else "")
    raise ConfigError.at("There is no such pair dataset", "dataset", name, expected, nearest(short, known))


def _newest_variation(name: str, known: dict[str, Path]) -> str | None:
    """The newest `RUN+VARIATION/PHASE` for `RUN/PHASE`: a workflow that dvc.yaml does not list runs as a variation of itself."""
    run, _, phase = name.partition("/")
    found = [other for other in known if other.startswith(f"{run}+") and other.partition("/")[2] == phase]
    return max(found, key=lambda other: (known[other] / NAME).stat().st_mtime_ns, default=None)


def _in_project() -> bool:
    from diptych.workflow.project import Project

    try:
        Project.find(Path.cwd())
    except ConfigError:
        return False
    return True


def _runs() -> Path:
    from diptych.workflow.project import Project

    return Project.find(Path.cwd()).runs


def ls(options: argparse.Namespace) -> int:
    """`diptych data ls`."""
    del options
    found = _datasets(_runs())
    if not found:
        sys.stdout.write("  no pair datasets yet: diptych run WORKFLOW, or diptych data ingest SOURCE NAME\n")
    for name, folder in found.items():
        manifest = PairDataset.open(folder).manifest
        methods = ", ".join(str(method.get("method")) for method in manifest.phase.methods)
        sys.stdout.write(f"  {name:<32} {manifest.rows:>10,} pairs   {methods or 'handed on'}\n")
    return 0


def show(options: argparse.Namespace) -> int:
    """`diptych data show D`."""
    dataset = _find(options.dataset)
    if options.verify:
        dataset = PairDataset.open(dataset.root, verify=True)
        dataset.verify_shards()
    manifest, ledger = dataset.manifest, dataset.manifest.ledger
    out = sys.stdout
    out.write(f"{dataset.root}\n  {dataset.digest}\n  made by {manifest.phase.phase}, seed {manifest.phase.seed}\n")
    out.write(f"  {ledger.pairs_in:,} in, {ledger.kept:,} kept\n")
    for entry in ledger.left:
        out.write(f"    {entry.count:>9,} left: {entry.reason} ({entry.method})\n")
    size = sum(shard.size_bytes for shard in manifest.shards.values())
    out.write(f"  {len(manifest.tables)} tables, {len(manifest.shards)} shards, {size / 2**20:.1f} MiB of pictures\n")
    for name, kind in manifest.columns.items():
        out.write(f"    {name:<20} {kind[:90]}\n")
    for row in dataset.scan().head(3).collect().iter_rows(named=True):
        captions = "; ".join(f"{caption['text'][:60]} ({caption['source']})" for caption in row["captions"][:4])
        out.write(f"  {row['key']}: {captions}\n")
    if options.verify:
        out.write("  all checksums are right\n")
    return 0


def diff(options: argparse.Namespace) -> int:
    """`diptych data diff A B`."""
    from diptych.pairs import algebra, browse
    from diptych.workflow import chain

    a, b = _find(options.a), _find(options.b)
    steps = chain.of(b)
    place = next((index for index, step in enumerate(steps) if step.digest == a.digest), len(steps))
    between = steps[place + 1 : -1]
    found = algebra.diff(a, b, between)
    counts = found.group_by("change", "reason", "method").len().sort("len", "change", "reason", descending=[True, False, False])
    sys.stdout.write(f"{len(a):,} pairs -> {len(b):,} pairs\n")
    for change, reason, method, count in counts.iter_rows():
        sys.stdout.write(f"  {count:>9,} {change}{f': {reason} ({method})' if reason else ''}\n")
    if options.html:
        sys.stdout.write(f"  {browse.difference_page(a, b, Path(options.html), options.limit, options.seed, None, between)}\n")
    return 0


def browse(options: argparse.Namespace) -> int:
    """`diptych data browse D`."""
    from diptych.pairs import browse as pages
    from diptych.workflow import chain, evidence

    dataset = _find(options.dataset)
    before = chain.of(dataset)[-2:-1]
    out = Path(options.out) if options.out else dataset.root.with_name(f"{dataset.root.name}.html")
    written = pages.contact_sheet(dataset, out, options.limit, options.seed, evidence.of_phase(dataset), *before)
    sys.stdout.write(f"{written}\n")
    return 0


def card(options: argparse.Namespace) -> int:
    """`diptych data card D`."""
    from diptych.workflow import data_card

    dataset = _find(options.dataset)
    out = Path(options.out) if options.out else dataset.root.with_name(f"{dataset.root.name}.card.html")
    found = data_card.measure(dataset, sample=options.sample, seed=options.seed)
    sys.stdout.write(f"{data_card.text(found)}\n\n{data_card.write(found, out)}\n")
    return 0


def export(options: argparse.Namespace) -> int:
    """`diptych data export D OUT --to FORMAT`."""
    from diptych.pairs import export as exports
    from diptych.pairs.ranges import is_remote

    dataset = _find(options.dataset)
    if is_remote(options.out):
        written: list[Any] = list(exports.export_to_store(dataset, options.out, options.to))
    else:
        written = list(exports.export(dataset, Path(options.out), options.to))
    sys.stdout.write(f"{len(written)} files in {options.out}\n")
    return 0


def ingest(options: argparse.Namespace) -> int:
    """`diptych data ingest SOURCE OUT key=value…`."""
    from diptych import __version__
    from diptych.core import catalogue
    from diptych.pairs.ingest import IngestConfig, ingest_all
    from diptych.pairs.ranges import is_remote
    from diptych.workflow import yaml

    if is_remote(options.out):
        raise ConfigError.at(
            "A pair dataset lies on a disk", "OUT", options.out, "a local folder", "pictures may lie in a store: name them in `path`"
        )
    row = catalogue.find(options.source, "ingest", "source")
    values: dict[str, Any] = {}
    for item in options.parameters:
        key, _, text = item.partition("=")
        values[key] = yaml.parse(text, key)
    config = catalogue.config_class(row).parse(
        {"method": row.name} | {k: v for k, v in values.items() if k not in IngestConfig.model_fields}
    )
    out = Path(options.out)
    configs = [config, *getattr(config, "members", {}).values()]
    _insist_replaceable(out, [path for one in configs for path in _local(getattr(one, "path", None))])
    how = IngestConfig.parse({key: value for key, value in values.items() if key in IngestConfig.model_fields})
    dataset = ingest_all(config.build(), out, config=how, version=__version__, methods=(config.plain(),))  # type: ignore[attr-defined]
    ledger = dataset.manifest.ledger
    sys.stdout.write(f"{dataset.root}: {ledger.kept:,} of {ledger.pairs_in:,} pairs kept\n")
    for entry in ledger.left:
        sys.stdout.write(f"  {entry.count:>9,} left: {entry.reason}\n")
    return 0


def _local(value: object) -> list[Path]:
    """The local files and folders that a parameter of a source names."""
    from diptych.pairs.sources.paths import local_files

    named = [value] if isinstance(value, str) else value if isinstance(value, tuple) else []
    return [path for name in named for path in (Path(name), *local_files(name))]


def _insist_replaceable(out: Path, sources: list[Path]) -> None:
    """A dataset may be written anew; anything else that lies there, and what the source itself reads, is never replaced. Raises ConfigError."""
    from diptych.core.errors import DiptychError
    from diptych.pairs import files
    from diptych.pairs.manifest import Manifest

    place = out.resolve()
    inside = next((path for path in sources if path.resolve().is_relative_to(place)), None)
    if inside is not None and place.exists():
        raise ConfigError.at("The output would replace what the source reads", "OUT", str(out), "another folder", f"{inside} lies in it")
    try:
        Manifest.load(place)
    except DiptychError:
        files.insist_free(place)
