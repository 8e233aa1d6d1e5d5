"""`diptych trace X`: from a number back to its pairs, or from a pair forward to what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diptych.core import digest
from diptych.core.errors import ConfigError
from diptych.pairs.dataset import PairDataset
from diptych.workflow import identity
from diptych.workflow.project import Project
from diptych.workflow.results import evaluated
from diptych.workflow.spec import PAIR_PHASES


@dataclass(frozen=True)
class Step:
    """One link of the chain: what it is, and what is known of it."""

    what: str
    facts: tuple[str, ...]


def trace(project: Project, target: str, run: str | None = None) -> list[Step]:
    """Walks the digests from `target`: a figure `<set>/<task>/<metric>` (with or without `eval/`), a model directory, or a pair's key.

    Raises ConfigError when the target is none of these in any run.
    """
    folder = Path(target)
    if (folder / "lineage.json").exists():
        return list(_model(project, folder))
    homes = [run] if run else _homes(project)
    for home in homes:
        steps = list(_figure(project, home, target.removeprefix("eval/"))) or list(_pair(project, home, target))
        if steps:
            return steps
    raise ConfigError.at("Nothing of that name was found", "trace", target, "a figure like emoji/retrieval/text_to_image_r1, a model directory, or a pair's key",
                         f"figures: {', '.join(_figures(project)[:6]) or 'none yet'}")  # fmt: skip


def _homes(project: Project) -> list[str]:
    return sorted({path.parent.parent.relative_to(project.runs).as_posix() for path in project.runs.glob("**/.records/*.json")}, key=len)


def _figures(project: Project) -> list[str]:
    return sorted(
        {f"{s}/{t}/{m}" for result in evaluated(project).values() for s, t, m in result.rows.select("set", "task", "metric").rows()}
    )


def _figure(project: Project, home: str, name: str) -> Iterator[Step]:
    result = evaluated(project).get(home)
    if result is None:
        return
    rows = [row for row in result.rows.iter_rows(named=True) if f"{row['set']}/{row['task']}/{row['metric']}" == name]
    if not rows:
        return
    row = rows[0]
    settings = ", ".join(f"{key} {value}" for key, value in json.loads(row["settings"]).items() if not isinstance(value, dict))
    facts = (f"{row['value']:.4f}, 95 % interval {row['low']:.4f} to {row['high']:.4f}, n = {row['n']:,}", f"run {home}", settings)
    yield Step(f"figure {name}", facts)
    yield Step(f"evaluated pairs {row['dataset']}", (f"runs/{home}/ingest", f"evaluation code {row['code']}"))
    for phase in ("compress", "train"):
        model = result.home / phase
        if model.exists():
            yield from _model(project, model)
            return


def _model(project: Project, folder: Path) -> Iterator[Step]:
    lineage = json.loads((folder / "lineage.json").read_text())
    facts = [f"{key} {_plain(value)}" for key, value in lineage.items() if key not in ("config", "dataset")]
    yield Step(f"model {digest.short(identity.of_output(folder))}", (str(folder), *facts))
    wanted = lineage.get("dataset")
    manifests = {
        PairDataset.open(path.parent).digest: path.parent
        for path in sorted(project.runs.glob("**/manifest.json"))
        if ".scratch" not in str(path)
    }
    while wanted:
        place = manifests.get(wanted)
        if place is None:
            yield Step(f"pairs {digest.short(wanted)}", ("no longer in this project's runs",))
            return
        manifest = PairDataset.open(place).manifest
        left = [f"left: {entry.count:,} {entry.reason} ({entry.method})" for entry in manifest.ledger.left]
        methods = ", ".join(str(method.get("method")) for method in manifest.phase.methods) or "no method"
        facts = [f"{place}", f"{manifest.phase.phase}: {methods}", f"{manifest.ledger.pairs_in:,} in, {manifest.ledger.kept:,} kept", *left]
        yield Step(f"pairs {digest.short(wanted)}", (*facts, f"code {digest.short(manifest.phase.code)}, seed {manifest.phase.seed}"))
        wanted = manifest.parents[0] if manifest.parents else None


def _plain(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) < 120 else text[:117] + "…"


def _pair(project: Project, home: str, key: str) -> Iterator[Step]:
    for phase in ("ingest", *PAIR_PHASES):
        folder = project.runs / home / phase
        if not (folder / "manifest.json").exists():
            continue
        dataset = PairDataset.open(folder)
        rejects = dataset.rejects().filter(pl.col("key") == key)
        if rejects.height:
            row = rejects.row(0, named=True)
            yield Step(f"{phase}: left", (f"method {row['method']}", f"reason {row['reason']}", f"score {row['score']}"))
            return
        rows = dataset.scan().filter(pl.col("key") == key).collect()
        if not rows.height:
            return
        row = rows.row(0, named=True)
        captions = [f"{caption['source']}: {caption['text'][:100]}" for caption in row["captions"]]
        image = row["image"]
        yield Step(
            f"{phase}: kept",
            (f"picture {image['shard']} at {image['offset']}, {image['size']:,} bytes", f"split {row['split']}", *captions),
        )
    examples = project.runs / home / "evaluate" / "examples.parquet"
    if examples.exists():
        found = pl.scan_parquet(examples).filter((pl.col("key") == key) | pl.col("key").str.starts_with(key + "#")).collect()
        if found.height:
            yield Step("evaluate", tuple(f"{s}/{t}/{m}: {v:.3f}" for s, t, m, _, v in found.rows()))


def text(steps: list[Step]) -> str:
    """The chain as indented lines."""
    lines = []
    for depth, step in enumerate(steps):
        lines.append(f"{'  ' * depth}{step.what}")
        lines += [f"{'  ' * depth}    {fact}" for fact in step.facts]
    return "\n".join(lines)
