from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.core import chance
from diptych.core.errors import ConfigError
from diptych.core.points import Verdict
from diptych.curate import metaclip
from diptych.curate.metaclip import Config, Matches, MetaClip
from diptych.pairs import schema

WORDS = ("dog", "cat", "bird", "zebra", "hot dog")


def pairs(captions: list[Any], first: int = 0) -> pl.DataFrame:
    """A pair table; a caption is a text, a list of texts, a list of (text, source), or None."""
    rows = []
    for given in captions:
        listed = [given] if isinstance(given, str) else given
        rows.append(
            listed
            and [
                {"text": text, "source": source, "score": None}
                for text, source in (c if isinstance(c, tuple) else (c, "alt") for c in listed)
            ]
        )
    keys = [f"pair-{first + index:05d}" for index in range(len(captions))]
    images = [{"shard": "a", "offset": 0, "size": 1, "width": 1, "height": 1}] * len(captions)
    columns = {"key": keys, "image": images, "captions": rows, "split": ["train"] * len(captions)}
    return pl.DataFrame(columns, schema=schema.PAIRS)


def run(method: MetaClip, batches: list[pl.DataFrame]) -> tuple[Any, Verdict]:
    """What the engine does: folds over the batches in turn, then the verdict on each."""
    state: Any = None
    for fold in method.folds():
        partial = fold.map(batches[0], state)
        for batch in batches[1:]:
            partial = fold.merge(partial, fold.map(batch, state))
        state = fold.finish(partial, state)
    verdicts = [method.apply(batch, state) for batch in batches]
    return state, Verdict(pl.concat([v.kept for v in verdicts]), pl.concat([v.rejected for v in verdicts]))


def zipf_pool(size: int, seed: int = 0) -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    weight = np.array([200, 100, 20, 2, 5, 60]) / 387
    choices = np.array([*WORDS, "IMG_0001.jpg"])
    texts = [" ".join(generator.choice(choices, generator.integers(1, 3), p=weight)) for _ in range(size)]
    return pairs(texts)


def make(seed: int = 7, **values: Any) -> MetaClip:
    return Config.parse({"metadata": list(WORDS), **values}).build(seed)


# ---------------------------------------------------------------- the paper's quantities


def test_probabilities_and_draws_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    rows = [sorted(generator.choice(8, generator.integers(0, 5), replace=False).tolist()) for _ in range(200)]
    matches = Matches(np.cumsum([0, *map(len, rows)]), np.array([e for row in rows for e in row]))
    count = metaclip.count(matches, 9)
    assert count.tolist() == [sum(entry in row for row in rows) for entry in range(9)]
    prob = metaclip.entry_prob(count, 10)
    assert prob == pytest.approx([10 / max(c, 10) for c in count.tolist()])
    uniform = generator.random(len(matches.ids))
    keep = metaclip.keep_prob(prob, matches)
    kept = metaclip.balance(prob, matches, uniform)
    index = metaclip.inverted_index(matches)
    for text, row in enumerate(rows):
        assert keep[text] == pytest.approx(1 - np.prod([1 - prob[entry] for entry in row]))
        drawn = uniform[matches.indptr[text] : matches.indptr[text + 1]]
        assert kept[text] == any(u < prob[entry] for u, entry in zip(drawn, row, strict=True))
        assert index[index[:, 1] == text, 0].tolist() == row


def test_infinite_threshold_keeps_every_text_with_an_entry() -> None:
    matches = Matches(np.array([0, 1, 1, 2]), np.array([0, 0]))
    prob = metaclip.entry_prob(np.array([2, 0]), float("inf"))
    assert prob.tolist() == [1, 1]
    assert metaclip.balance(prob, matches, np.array([0.0, 0.999999])).tolist() == [True, False, True]


def test_counts_are_not_changed_by_the_clip() -> None:
    count = np.array([5, 0, 100], dtype=np.uint64)
    metaclip.entry_prob(count, 10)
    assert count.tolist() == [5, 0, 100]


def test_tail_share_and_back() -> None:
    count = np.array([1000, 100, 10, 5, 5, 0])
    assert metaclip.threshold_to_tail_share(count, 100) == pytest.approx(20 / 1120)
    assert metaclip.threshold_to_tail_share(count, 101) == pytest.approx(120 / 1120)
    assert metaclip.tail_share_to_threshold(count, 0.02) == 10
    assert metaclip.tail_share_to_threshold(count, 0.1) == 100
    assert metaclip.threshold_to_tail_share(np.zeros(3, dtype=np.int64), 5) == 0


# ---------------------------------------------------------------- the method


def test_every_pair_is_kept_or_rejected_with_a_reason() -> None:
    pool = zipf_pool(2000)
    method = make(threshold=50)
    state, verdict = run(method, [pool])
    assert sorted([*verdict.kept["key"], *verdict.rejected["key"]]) == pool["key"].to_list()
    assert verdict.kept.schema == {**pool.schema, "keep_prob": pl.Float32}
    assert verdict.rejected.schema == {"key": pl.String, "reason": pl.String, "score": pl.Float32}
    reasons = dict(verdict.rejected.group_by("reason").len().iter_rows())
    assert set(reasons) == {"no concept matched", "balanced away"}
    unmatched = [row["key"] for row in pool.iter_rows(named=True) if not any(w in row["captions"][0]["text"] for w in WORDS)]
    assert set(unmatched) == set(verdict.rejected.filter(reason="no concept matched")["key"])
    assert verdict.rejected.filter(reason="no concept matched")["score"].unique().to_list() == [0.0]
    assert verdict.rejected.filter(reason="balanced away")["score"].is_between(0, 1, closed="none").all()
    assert state.dtype == np.int64


def test_head_concepts_are_capped_and_the_tail_stays() -> None:
    pool = zipf_pool(4000)
    method = make(threshold=100)
    state, verdict = run(method, [pool])
    report = method.report(state)
    by_entry = {row["entry"]: row for row in report["top_entries"]}
    assert by_entry["dog"]["before"] > 1500
    # t from its own draws, and more from texts that a rarer concept keeps
    assert 100 <= by_entry["dog"]["after"] < by_entry["dog"]["before"] / 4
    assert by_entry["zebra"]["before"] == by_entry["zebra"]["after"] < 100
    expected = verdict.kept["keep_prob"].len()
    chances = pl.concat([verdict.kept["keep_prob"], verdict.rejected["score"]]).sum()
    assert expected == pytest.approx(chances, abs=4 * np.sqrt(chances))
    assert report["pairs"] == 4000
    assert report["pairs_kept"] == verdict.kept.height
    assert report["pairs_matched"] == 4000 - verdict.rejected.filter(reason="no concept matched").height
    assert report["entries_head"] + report["entries_tail"] == report["entries_matched"] == 5


def test_the_report_counts_what_the_verdict_keeps() -> None:
    pool = zipf_pool(1500)
    method = make(threshold=30)
    state, verdict = run(method, [pool[:700], pool[700:]])
    again = method.folds()[0].map(verdict.kept.drop("keep_prob"), None)
    assert state[1, 1:].tolist() == again[1:].tolist()
    assert state[1, 1] == verdict.kept.height < state[0, 1]


@pytest.mark.parametrize("cuts", [[500], [1, 2, 1999], list(range(100, 2000, 100))])
def test_decisions_depend_on_neither_order_nor_shards(cuts: list[int]) -> None:
    pool = zipf_pool(2000)
    _, whole = run(make(threshold=40), [pool])
    shuffled = pool.sample(fraction=1, shuffle=True, seed=3)
    edges = [0, *cuts, pool.height]
    _, sharded = run(make(threshold=40), [shuffled[a:b] for a, b in itertools.pairwise(edges)])
    assert whole.kept.sort("key").equals(sharded.kept.sort("key"))
    assert whole.rejected.sort("key").equals(sharded.rejected.sort("key"))
    _, other = run(make(seed=8, threshold=40), [pool])
    assert set(other.kept["key"]) != set(whole.kept["key"]), "another seed draws otherwise"


def test_the_draw_is_a_function_of_seed_key_and_entry() -> None:
    pool = zipf_pool(800)
    method = make(threshold=40)
    state, verdict = run(method, [pool])
    count = state[0, 2:]
    kept = set(verdict.kept["key"])
    for key, captions in pool.select("key", "captions").iter_rows():
        ids = method.metadata.matcher.match([captions[0]["text"]]).ids.tolist()
        draws = [float(chance.uniform(7, chance.key_hash(key), entry)) for entry in ids]
        assert (key in kept) == any(u < 40 / max(count[entry], 40) for u, entry in zip(draws, ids, strict=True))


def test_captions_of_a_pair_are_matched_together() -> None:
    pool = pairs([["a dog", "a dog and a cat"], "a dog", [], None, "", "   ", [("hot", "alt"), ("dog", "human")], "nothing"])
    state, verdict = run(make(threshold=None), [pool])
    assert verdict.kept["key"].to_list() == ["pair-00000", "pair-00001", "pair-00006"]
    assert dict(zip(WORDS, state[0, 2:].tolist(), strict=True)) == {"dog": 3, "cat": 1, "bird": 0, "zebra": 0, "hot dog": 0}
    assert verdict.kept["keep_prob"].to_list() == [1, 1, 1]
    assert set(verdict.rejected["reason"]) == {"no concept matched"}


def test_only_captions_of_the_chosen_sources_count() -> None:
    pool = pairs([[("a dog", "alt")], [("a cat", "rewrite:laclip")], [("x", "alt"), ("a bird", "human")]])
    _, verdict = run(make(threshold=None, sources=["alt", "rewrite:"]), [pool])
    assert verdict.kept["key"].to_list() == ["pair-00000", "pair-00001"]


def test_nothing_in_nothing_out() -> None:
    method = make(threshold=5)
    state, verdict = run(method, [pairs([])])
    assert verdict.kept.height == verdict.rejected.height == 0
    assert method.report(state)["pairs"] == 0
    assert method.report(None) == {}
    _, verdict = run(make(tail_share=0.5), [pairs(["nothing", "at all"])])
    assert verdict.rejected.height == 2


def test_tail_share_sets_the_threshold() -> None:
    pool = zipf_pool(3000)
    method = make(tail_share=0.1)
    state, _ = run(method, [pool])
    threshold = metaclip.tail_share_to_threshold(state[0, 2:], 0.1)
    assert method.report(state)["threshold"] == threshold
    _, by_share = run(method, [pool])
    _, by_number = run(make(threshold=threshold), [pool])
    assert by_share.kept.equals(by_number.kept)


def test_parameters() -> None:
    assert Config.parse({}).threshold == 20_000
    assert Config.parse({"tail_share": 0.06}).threshold is None
    for given in ({"tail_share": 0.06}, {"threshold": None}, {"threshold": 5, "metadata": ["a"]}, {}):
        config = Config.parse(given)
        assert Config.parse(config.plain()) == config, "the full parameters read back"
    with pytest.raises(ConfigError, match="not both"):
        Config.parse({"tail_share": 0.06, "threshold": 20})
    with pytest.raises(ConfigError, match="ends with"):
        Config.parse({"metadata": "words.csv"})
    with pytest.raises(ConfigError, match="not there"):
        Config.parse({"metadata": "no/such/file.txt"}).build(0)
    for wrong in ({"threshold": 0}, {"threshold": "20"}, {"tail_share": 1.0}, {"treshold": 3}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)
