"""Numbers in messages."""

import pytest

from fastpo.system.words import counted


@pytest.mark.parametrize(
    ("number", "noun", "of", "told"),
    [
        (1, "pair", None, "1 pair"),
        (0, "pair", None, "0 pairs"),
        (12_345, "pair", None, "12,345 pairs"),
        (1, "process", None, "1 process"),
        (2, "process", None, "2 processes"),
        (3, "micro-batch", None, "3 micro-batches"),
        (2, "entry", None, "2 entries"),
        (2, "key", None, "2 keys"),
        (1, "pair", 3, "1 of 3 pairs"),
        (1, "pair", 1, "1 of 1 pair"),
    ],
)
def test_the_noun_follows_its_number(number, noun, of, told):
    assert counted(number, noun, of=of) == told
