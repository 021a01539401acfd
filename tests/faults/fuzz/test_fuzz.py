"""Changed input of every kind is read or refused, and no other exception comes out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
