"""What a launch does before a kernel runs, which the interpreter leaves out."""

import json
from pathlib import Path

import pytest

ALL_PROCESSES = 3  # errors and sums, the finish, the gradient


@pytest.fixture(scope="module")
def printed(run_compiling):
    """The lines of `launches.py`."""
    text = run_compiling(Path(__file__).with_name("launches.py"))
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def calls(printed):
    """Its calls by name."""
    return {found["name"]: found for found in printed if "name" in found}


@pytest.mark.slow
def test_a_repeated_launch_hands_over_what_the_first_did(printed):
    """In the same order; the few arguments that moved are the addresses of outputs."""
    found = [line for line in printed if "repeats" in line]
    assert len(found) == 2
    for line in found:
        assert line["same"] and line["moved"] <= 6, line


@pytest.mark.slow
def test_every_call_compiles_and_is_one_launch_each_way(calls):
    assert len(calls) > 45
    for name, found in calls.items():
        wanted = ALL_PROCESSES if "all processes" in name else 2
        wanted = 1 if name.startswith(("pair_errors", "noised_pair")) else wanted
        assert found["first"][0] == found["again"][0] == wanted, name


@pytest.mark.slow
def test_a_call_that_comes_again_compiles_nothing(calls):
    assert sum(found["first"][1] for found in calls.values()) > 40
    for name, found in calls.items():
        assert found["again"][1] == 0, name


@pytest.mark.slow
def test_the_number_of_pairs_is_no_reason_to_compile_the_gradient_again(calls):
    for name in calls:
        if name.endswith(", 5 pairs"):
            assert calls[name]["first"][1] <= 1, name  # the forward, whose vectors are longer
