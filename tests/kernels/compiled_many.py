"""As many pairs as a call takes, on the PTX machine; by test_compiled.py.

The last program holds vectors of all pairs. 2,048 fill theirs; of 1,030, half of them are masked.
Rows are short, so that the calls end; `compiled_cases.py` has long ones.
"""

import pytest
import torch

from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES, check
from tests.kernels.on_machine import orders

SCHEDULES = orders(1, 2)
CALLS = [("dpo", 1030), ("adaptive_dpo-annotators", 1030), ("sdpo", 2048), ("kto", 2048)]
PROBES = 32  # of the errors' rounding: one by one they are some thousands


@pytest.mark.parametrize(("name", "n_pairs"), CALLS)
def test_within_budget(name, n_pairs):
    check(CASES[name], pair_inputs(n_pairs, (3, 7), torch.bfloat16, n_annotators=2), probes=PROBES)


def test_over_processes():
    """The launch that only finishes, on sums of all processes."""
    x = pair_inputs(1030, (3, 7), torch.float32)
    check(CASES["kto"], x, probes=PROBES, reduce=lambda sums: 2 * sums)
