"""JSON from files: bounded, and noticed where a bit is wrong."""

import json

import pytest

from fastpo.system.json_text import parse_json, read_json, seal, unseal

VALUE = {"pairs": 12, "shapes": [[8, 8], [8, 12]], "name": "a [ {", "none": None}


def test_a_sealed_object_comes_back():
    assert unseal(parse_json(seal(VALUE))) == VALUE
    assert unseal(dict(VALUE)) == VALUE, "objects of before they were sealed"


def test_every_flipped_bit_and_every_truncation_of_a_sealed_object_is_noticed():
    whole = seal(VALUE).encode()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            assert not _passes(bytes(damaged)), (place, bit)
        with pytest.raises(ValueError):
            unseal(parse_json(whole[:place]))


def _passes(text):
    """Whether a record of known keys would be made of it."""
    try:
        return unseal(parse_json(text)).keys() == VALUE.keys()
    except ValueError:
        return False


def test_depth_is_counted_outside_of_text():
    assert parse_json(json.dumps(["[" * 200])) == ["[" * 200]
    assert parse_json("[" * 64 + "]" * 64, depth=64)
    with pytest.raises(ValueError, match="nested more than 64 levels"):
        parse_json("[" * 65 + "]" * 65)


def test_the_size_is_looked_at_before_reading(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, most_bytes=8) == {"a": 1}
    with pytest.raises(ValueError, match="it has 8 bytes, at most 7 are read"):
        read_json(path, most_bytes=7)
