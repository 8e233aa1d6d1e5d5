"""Labels pictures by their clusters, and keeps or balances the labels: what an expert says of a few pictures is said of their cluster.

Features are put on their principal axes and clustered; of every cluster a few pictures are looked at, and a label that most of them
have becomes the label of all. Which labels stay is then a choice (concept filtering), or none is more frequent than the median label
(concept balancing).

Source: BIOMEDICA (CVPR 2025), concept labelling and the two data sets of BMC-CLIP. How many pictures of a cluster are looked at, and the
median as the cap, are ours.
Shape legend: N pairs in a batch, K clusters.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.chance import key_hash, key_hashes, mix, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Fold, Need, PairMethod, Verdict
from diptych.curate.clustering import Clusters, cluster_folds, features_of

CLUSTER, CONCEPTS = "meta.cluster", "meta.concepts"
NOT_KEPT, BALANCED = "concept not kept", "balanced away"
MOST_LABELS = 1000


class Config(BaseConfig):
    """Clusters, who labels them, and which labels stay. Without `expert` and `annotations` pairs only learn their cluster."""

    method: Literal["biomedica-concepts"] = "biomedica-concepts"
    clusters: int = Field(2000, ge=1, description="k-means clusters")
    components: int = Field(45, ge=1, description="principal axes that features are put on first")
    sample: int = Field(100_000, ge=1, description="pairs that fit axes and clusters, drawn by key")
    features: str = Field("pixels", min_length=1, description="`pixels`, `scout`, or an open_clip model by name or directory")
    expert: str | None = Field(None, description="a column with a label, or a list of labels, that is looked at for a few pairs a cluster")
    looked_at: int = Field(30, ge=1, description="pairs a cluster whose `expert` column is looked at, drawn by key")
    annotations: str | None = Field(
        None,
        description='a JSON file, cluster number -> list of labels, e.g. `{"0": ["microscopy"]}`: made by people who saw `meta.cluster`',
    )
    keep: tuple[str, ...] | None = Field(None, min_length=1, description="labels that stay; null: all, and clusters without label")
    drop: tuple[str, ...] = Field((), description="labels that leave, unless the pair has one of `keep`")
    balance: bool = Field(
        False, description="no label stays more often than the median of the labels that stay; a pair counts for its rarest"
    )

    @model_validator(mode="after")
    def _one_labeller(self) -> Self:
        if self.expert is not None and self.annotations is not None:
            raise ValueError("expert or annotations, not both")
        if self.expert is None and self.annotations is None and (self.keep or self.drop or self.balance):
            raise ValueError("keep, drop and balance need labels: give expert or annotations")
        if max(self.clusters, self.components) > self.sample:
            raise ValueError("clusters and components at most sample")
        return self

    def build(self, seed: int) -> BiomedicaConcepts:
        """The method; `seed` names the sample, the first centres, the pairs that are looked at and the draws of `balance`."""
        return BiomedicaConcepts(self, seed)


@dataclass(frozen=True)
class Looks:
    """What was seen of the clusters: pairs `[K]` of each, and of each the `(rank, labels)` of smallest rank, at most `looked_at`.

    `truth` counts the expert's labels a cluster over all pairs: it is reported, and decides nothing.
    """

    size_K: NDArray[np.int64]
    seen: Mapping[int, tuple[tuple[int, tuple[str, ...]], ...]]
    truth: Mapping[tuple[int, str], int]


@dataclass(frozen=True)
class Labelled:
    """Clusters with their sizes `[K]` and labels, the share of each that balancing keeps, and how often labels are right by the expert.

    `agreement`: label -> (pairs in clusters of the label, of them with the label, pairs with the label); of the expert's own column, for
    the report alone.
    """

    clusters: Clusters
    size_K: NDArray[np.int64]
    labels: tuple[tuple[str, ...], ...]
    stays_K: NDArray[np.bool_]
    share_K: NDArray[np.float64]
    agreement: Mapping[str, tuple[int, int, int]]


class LookFold(Fold):
    """Counts the clusters and looks at a few pairs of each. A partial holds K counts and at most `looked_at K` looks."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed

    def map(self, batch: pl.DataFrame, state: Clusters) -> Looks:
        """The looks of a batch. Raises DataError if the expert's column is missing."""
        label_N = state.label(features_of(batch))
        size_K = np.bincount(label_N, minlength=len(state.center_KC)).astype(np.int64)
        if self.config.expert is None:
            return Looks(size_K, {}, {})
        said = labels_of(batch, self.config.expert)
        rank_N = mix(self.seed, key_hash("curate.look"), key_hashes(batch["key"]))
        seen: dict[int, list[tuple[int, tuple[str, ...]]]] = {}
        for row in np.lexsort((rank_N, label_N)).tolist():
            own = seen.setdefault(int(label_N[row]), [])
            if len(own) < self.config.looked_at:
                own.append((int(rank_N[row]), said[row]))
        truth = Counter((cluster, label) for cluster, own in zip(label_N.tolist(), said, strict=True) for label in own)
        return _few(Looks(size_K, {cluster: tuple(own) for cluster, own in seen.items()}, truth))

    def merge(self, left: Looks, right: Looks) -> Looks:
        """Counts add up; the smallest ranks of both are looked at."""
        seen = {
            cluster: tuple(sorted((*left.seen.get(cluster, ()), *right.seen.get(cluster, ())))[: self.config.looked_at])
            for cluster in left.seen.keys() | right.seen.keys()
        }
        return _few(Looks(left.size_K + right.size_K, seen, Counter(left.truth) + Counter(right.truth)))

    def finish(self, partial: Looks, state: Clusters) -> Labelled:
        """Labels of the clusters, and which of them stay."""
        config, count = self.config, len(partial.size_K)
        if config.annotations is not None:
            labels = annotated(Path(config.annotations), count)
        else:
            labels = tuple(majority([said for _, said in partial.seen.get(cluster, ())]) for cluster in range(count))
        stays_K = np.array([stays(own, config.keep, config.drop) for own in labels])
        share_K = balanced(partial.size_K * stays_K, labels) if config.balance else np.ones(count)
        return Labelled(state, partial.size_K, labels, stays_K, share_K, agreement(labels, partial))


@dataclass(frozen=True)
class BiomedicaConcepts(PairMethod):
    """Kept pairs gain `meta.cluster` (int) and, where clusters are labelled, `meta.concepts` (labels joined by `; `, null for none).

    Rejects with `concept not kept`, and `balanced away` (score: the probability it had to stay).
    """

    config: Config
    seed: int
    needs = frozenset[Need]({"captions", "features"})

    def folds(self) -> Sequence[Fold]:
        """Axes and clusters, fitted to a keyed sample; then sizes and labels of the clusters, from all pairs."""
        config = self.config
        return [*cluster_folds(config.sample, config.components, config.clusters, self.seed), LookFold(config, self.seed)]

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state, for `rows` pairs with features of `width` floats: a sample being put in order."""
        return 2 * min(self.config.sample, rows) * (4 * width + 8) + self.config.clusters * (8 * self.config.components + 64)

    def apply(self, batch: pl.DataFrame, state: Labelled) -> Verdict:
        """The verdict on a batch."""
        label_N = state.clusters.label(features_of(batch))
        drawn_N = uniform(self.seed, key_hash("curate.balance"), key_hashes(batch["key"]))
        stays_N, share_N = state.stays_K[label_N], state.share_K[label_N]
        kept_N = stays_N & (drawn_N < share_N)
        judged = batch.with_columns(pl.Series(CLUSTER, label_N))
        if self.config.expert is not None or self.config.annotations is not None:
            words = ["; ".join(own) or None for own in state.labels]
            judged = judged.with_columns(pl.Series(CONCEPTS, [words[label] for label in label_N.tolist()], dtype=pl.String))
        rejected = batch.select(
            "key", reason=pl.Series(np.where(stays_N, BALANCED, NOT_KEPT), dtype=pl.String), score=pl.Series(share_N, dtype=pl.Float32)
        )
        return Verdict(kept=judged.filter(kept_N), rejected=rejected.filter(~kept_N))

    def report(self, state: Labelled) -> Mapping[str, Any]:
        """Pairs and clusters of every label, and how far the labels agree with the expert's column: `purity` and `recall` a label."""
        clusters = Counter(label for own in state.labels for label in own)
        pairs = _pairs(state.labels, state.size_K)
        found = {
            label: {"clusters": clusters[label], "pairs": pairs[label]}
            | ({"purity": right / max(inside, 1), "recall": right / max(total, 1)} if total else {})
            for label, (inside, right, total) in state.agreement.items()
        }
        return {
            "pairs": int(state.size_K.sum()),
            "clusters": len(state.size_K),
            "clusters_without_label": sum(not own for own in state.labels),
            "pairs_that_stay": int((state.size_K * state.stays_K).sum()),
            "labels": found,
        }


def labels_of(batch: pl.DataFrame, column: str) -> list[tuple[str, ...]]:
    """The labels of every pair: of a text one, of a list all, of null none. Raises DataError for another column."""
    kind = batch.schema.get(column)
    if kind == pl.Null:
        return [()] * batch.height
    if kind == pl.String:
        return [() if value is None else (value,) for value in batch[column]]
    if kind == pl.List(pl.String):
        return [() if value is None else tuple(sorted(set(value.drop_nulls()))) for value in batch[column]]
    raise DataError.at("The expert's column holds no labels", "expert", f"{column}: {kind}", "a column of texts, or of lists of texts")


def majority(seen: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The labels that more than half of what was looked at has, sorted."""
    votes = Counter(label for said in seen for label in said)
    return tuple(sorted(label for label, count in votes.items() if 2 * count > len(seen)))


def annotated(path: Path, clusters: int) -> tuple[tuple[str, ...], ...]:
    """The labels of every cluster by a file; a cluster that it leaves out has none. Raises DataError if it is not of that form."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        labels = {int(cluster): tuple(sorted(set(own))) for cluster, own in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError.at("The annotations cannot be read", str(path), error, 'JSON of the form {"0": ["microscopy"], …}') from None
    if outside := sorted(set(labels) - set(range(clusters))):
        raise DataError.at("The annotations are of other clusters", str(path), outside[:5], f"clusters from 0 to {clusters - 1}")
    return tuple(labels.get(cluster, ()) for cluster in range(clusters))


def stays(labels: Sequence[str], keep: Sequence[str] | None, drop: Sequence[str]) -> bool:
    """Whether pairs of these labels stay: one of `keep` decides, then one of `drop`; without `keep` all others stay."""
    if keep is not None and any(label in keep for label in labels):
        return True
    return keep is None and not any(label in drop for label in labels)


def balanced(size_K: NDArray[np.int64], labels: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """The share `[K]` of every cluster that stays. A cluster counts for the rarest of its labels; a label stays at most as often as the
    median of all labels. Clusters without label stay whole.
    """
    total = _pairs(labels, size_K)
    rarest = [min((label for label in own if total[label]), key=lambda label: (total[label], label), default=None) for own in labels]
    counted: Counter[str] = Counter()
    for label, size in zip(rarest, size_K.tolist(), strict=True):
        if label is not None and size:
            counted[label] += size
    cap = float(np.median(list(counted.values()))) if counted else 0.0
    return np.array([min(1.0, cap / counted[label]) if label is not None and counted[label] else 1.0 for label in rarest])


def agreement(labels: Sequence[Sequence[str]], looks: Looks) -> dict[str, tuple[int, int, int]]:
    """Label -> pairs in its clusters, those of them that have it, and all pairs that have it, by the expert's column."""
    inside = _pairs(labels, looks.size_K)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (cluster, label), count in looks.truth.items():
        total[label] += count
        right[label] += count if label in labels[cluster] else 0
    return {label: (inside[label], right[label], total[label]) for label in sorted(inside.keys() | total.keys())}


def _few(looks: Looks) -> Looks:
    """The looks themselves. Raises DataError if the expert's column has as many labels as if it told pairs apart."""
    if (found := len({label for _, label in looks.truth})) > MOST_LABELS:
        fix = "name a column of concepts"
        raise DataError.at("The expert's labels are too many", "expert", f"<{found:,} and more>", f"at most {MOST_LABELS:,} labels", fix)
    return looks


def _pairs(labels: Sequence[Sequence[str]], size_K: NDArray[np.int64]) -> Counter[str]:
    """How many pairs every label has, by the sizes of its clusters."""
    counts: Counter[str] = Counter()
    for own, size in zip(labels, size_K.tolist(), strict=True):
        for label in own:
            counts[label] += size
    return counts
