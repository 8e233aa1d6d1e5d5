import numpy as np
import pytest

from diptych.core.chance import key_hash, key_hashes
from diptych.core.errors import DataError
from diptych.pairs.captions import choose_caption, draw, draws


@pytest.mark.parametrize(
    ("pick", "chosen"),
    [
        ("two words", "two words"),
        ("word", "original text"),
        ("", "original text"),
        ("word ", "word "),
        ("tab\tword", "original text"),
        ("線 路", "線 路"),
    ],
)
def test_a_pick_of_one_piece_falls_back_to_the_original(pick: str, chosen: str) -> None:
    assert choose_caption(["original text", pick], 1) == chosen


def test_an_original_of_one_word_stays() -> None:
    assert choose_caption(["dog", "a brown dog"], 0) == "dog"


def test_draws_are_named_by_seed_epoch_and_row_alone() -> None:
    rows = key_hashes(f"pair-{index}" for index in range(500))
    counts = np.full(500, 5)
    whole = draws(3, 7, rows, counts)
    order = np.random.default_rng(0).permutation(500)
    np.testing.assert_array_equal(draws(3, 7, rows[order], counts), whole[order])
    assert [draw(3, 7, key_hash(f"pair-{index}"), 5) for index in range(20)] == whole[:20].tolist()
    assert (draws(3, 8, rows, counts) != whole).mean() > 0.6
    assert (draws(4, 7, rows, counts) != whole).mean() > 0.6


def test_draws_are_uniform_over_each_rows_own_captions() -> None:
    rows = key_hashes(str(index) for index in range(30_000))
    counts = np.tile([1, 2, 5], 10_000)
    drawn = draws(0, 0, rows, counts)
    for count in (1, 2, 5):
        shares = np.bincount(drawn[counts == count], minlength=count) / 10_000
        assert shares.shape == (count,)
        np.testing.assert_allclose(shares, 1 / count, atol=0.02)  # four standard deviations


def test_one_row_walks_through_all_its_captions_over_the_epochs() -> None:
    assert {draw(0, epoch, key_hash("a"), 5) for epoch in range(60)} == set(range(5))


def test_a_pair_without_captions_is_refused() -> None:
    with pytest.raises(DataError, match="no caption to train on"):
        draw(0, 0, 1, 0)
    with pytest.raises(DataError, match="row 1"):
        draws(0, 0, np.asarray([1, 2], dtype=np.uint64), np.asarray([1, 0]))


def test_the_original_takes_its_share_and_the_others_split_the_rest() -> None:
    hashes = key_hashes(f"k{i}" for i in range(20_000))
    drawn = draws(0, 3, hashes, np.full(20_000, 5), original=0.6)
    share = np.bincount(drawn, minlength=5) / len(drawn)
    assert abs(share[0] - 0.6) < 0.015
    assert np.abs(share[1:] - 0.1).max() < 0.01
    assert (draws(0, 3, hashes, np.ones(20_000, dtype=np.int64), original=0.0) == 0).all()
    assert (draws(0, 3, hashes, np.full(20_000, 5), original=1.0) == 0).all()
