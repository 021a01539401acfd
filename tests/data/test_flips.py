"""Synthetic minority labels."""

import csv

from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.data.cache.flips import is_flipped, write_flip_mask

RATE = st.floats(0, 1)


@settings(deadline=None)
@given(name=st.text(), seed=st.integers(0, 2**40), one=RATE, two=RATE)
def test_flipped_at_a_rate_means_flipped_at_every_higher_one(name, seed, one, two):
    low, high = sorted((one, two))
    assert is_flipped(name, rate=high, seed=seed) >= is_flipped(name, rate=low, seed=seed)
    assert not is_flipped(name, rate=0.0, seed=seed)
    assert is_flipped(name, rate=1.0, seed=seed)


def test_share_is_the_rate_and_seeds_differ():
    names = [f"pair {i}" for i in range(20_000)]
    one, two = ([is_flipped(n, rate=0.2, seed=seed) for n in names] for seed in (0, 1))
    assert abs(sum(one) / len(names) - 0.2) < 0.01
    both = sum(a and b for a, b in zip(one, two, strict=True))
    assert abs(both / len(names) - 0.04) < 0.01


def test_flips_are_pinned():
    """A change would silently flip other pairs than published runs did."""
    flipped = [i for i in range(20) if is_flipped(str(i), rate=0.2, seed=0)]
    assert flipped == [3, 7, 9, 11, 18]


def test_mask_is_written_beside_the_cache(tmp_path):
    names = ["plain", 'with "quotes", commas\nand lines', "ünïcode"]
    path = write_flip_mask(tmp_path, names, rate=0.5, seed=3)
    assert path == tmp_path / "flips-rate0.5-seed3.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["pair_id"] for row in rows] == names
    expected = [str(int(is_flipped(n, rate=0.5, seed=3))) for n in names]
    assert [row["flipped"] for row in rows] == expected
    assert list(tmp_path.iterdir()) == [path]
