"""Changed input of every kind is read or refused, and no other exception comes out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.data.cache.manifest import FileRecord, damage_of, load_manifest
from fastpo.errors import CacheError
from tests.faults.fuzz.cases import KINDS, case

# A page takes a second to draw, a look at a whole cache or model tens of milliseconds.
EXAMPLES = {"report": 5, "manifest": 100, "model json": 60, "run folder": 120, "cache bytes": 120}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_input_is_read_or_refused(kind):
    outcomes = set()

    @settings(max_examples=EXAMPLES.get(kind, 200), derandomize=True, deadline=None, database=None)
    @given(st.integers(0, 2**32 - 1))
    def run(seed):
        outcomes.add(case(kind, seed))

    run()
    assert "refused" in outcomes


def test_a_version_of_two_lines_is_told_in_one(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "a\nb"}))
    with pytest.raises(CacheError, match="layout version") as refused:
        load_manifest(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_recorded_checksum_of_two_lines_is_told_in_one(tmp_path):
    (tmp_path / "table").write_bytes(b"abc")
    record = FileRecord(bytes=3, sha256="", xxh3="a\nb")
    assert "\n" not in damage_of(tmp_path / "table", record, content=True)
    assert "no name" in damage_of(tmp_path / "a\0b", record, content=True)
