from __future__ import annotations

import polars as pl
import pytest
from PIL import Image
from tests.prune.pictures import encoded, picture, table

from diptych.core.errors import ConfigError
from diptych.prune.perceptual_duplicates import Config


def run(config: Config, batches: list[pl.DataFrame], run_pass) -> tuple[list[str], dict[str, str], pl.DataFrame]:
    """The whole chain: kept keys, twins, and the rejects."""
    mark, *bands = (step.build(0) for step in config.steps())
    batches = [mark.apply(batch, None).kept.drop("pixels") for batch in batches]
    rejects = []
    for band in bands:
        outcome = run_pass(band, batches)
        rejects.append(outcome.rejected)
        batches = [batch.filter(pl.col("key").is_in(outcome.kept)) for batch in batches]
    left = pl.concat(rejects)
    return outcome.kept, dict(zip(left["key"], left["twin"], strict=True)), left


@pytest.fixture(scope="module")
def pool() -> pl.DataFrame:
    """Eight pictures; of the first four a small JPEG, of the first a second copy; and three flat ones."""
    files = {f"o{seed}": encoded(picture(seed)) for seed in range(8)}
    files |= {f"a{seed}": encoded(picture(seed).resize((48, 48)), "JPEG", quality=80) for seed in range(4)}
    files |= {"z0": encoded(picture(0))} | {f"flat{number}": encoded(Image.new("RGB", (20, 20), "white")) for number in range(3)}
    return table(files)


def test_the_largest_of_alike_pictures_stays(pool: pl.DataFrame, run_pass, cut) -> None:
    kept, twins, left = run(Config(radius=4), [pool], run_pass)
    assert kept == sorted([*(f"o{seed}" for seed in range(8)), "flat0", "flat1", "flat2"])
    assert twins == {"a0": "o0", "a1": "o1", "a2": "o2", "a3": "o3", "z0": "o0"}
    assert left["score"].min() >= 1 - 4 / 64
    assert left.filter(pl.col("key") == "z0")["score"].item() == 1
    for sizes, seed in [([3, 5], 1), ([1] * 14, 2)]:
        again = run(Config(radius=4), cut(pool, sizes, seed), run_pass)
        assert again[:2] == (kept, twins)


def test_the_first_may_stay_instead(pool: pl.DataFrame, run_pass) -> None:
    kept, twins, _ = run(Config(radius=4, keep="first"), [pool], run_pass)
    assert {"a0", "a1", "a2", "a3"} <= set(kept)
    assert twins["z0"] in ("a0", "o0")
    assert twins["o1"] == "a1"


def test_radius_zero_finds_equal_hashes_only(pool: pl.DataFrame, run_pass) -> None:
    hashes = Config(radius=0).steps()[0].build(0).apply(pool, None).kept["meta.phash"].drop_nulls()
    kept, _, _ = run(Config(radius=0), [pool], run_pass)
    assert len(kept) == hashes.n_unique() + 3


def test_a_chain_of_bands_misses_nothing(run_pass) -> None:
    """Random hashes with planted neighbours at every distance up to the radius, in random bits."""
    import numpy as np

    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 300, dtype=np.uint64)
    near = [int(value) ^ sum(1 << int(bit) for bit in rng.choice(64, 1 + row % 3, replace=False)) for row, value in enumerate(base)]
    keys = [f"a{row:03d}" for row in range(300)] + [f"b{row:03d}" for row in range(300)]
    frame = pl.DataFrame(
        {"key": keys, "image": [{"width": 1, "height": 1}] * 600, "meta.phash": pl.Series([*base.tolist(), *near], dtype=pl.UInt64)}
    )
    kept = set(keys)
    for step in Config(radius=3).steps()[1:]:
        kept = set(run_pass(step.build(0), [frame.filter(pl.col("key").is_in(list(kept)))]).kept)
    assert kept == set(keys[:300])


def test_configuration() -> None:
    assert len(Config(radius=3).steps()) == 5
    for wrong in ({"radius": 8}, {"radius": -1}, {"hash": "ahash"}, {"keep": "smallest"}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)
