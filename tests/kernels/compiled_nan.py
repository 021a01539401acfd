"""A NaN in what the kernels read reaches the loss, on the PTX machine; run by test_compiled.py.

The interpreter keeps NaN through minima and maxima; compiled code only where it is told to.
"""

import pytest
import torch

from fastpo_kernels.testing import pair_inputs
from tests.kernels.test_pair_loss import CASES, run

WITHOUT_REFERENCE = ("sft", "mapo")
# `max.f32` and `min.f32` return the other operand.
DROPPED = pytest.mark.xfail(reason="the kernel's maximum or minimum drops NaN")
LOST = {("hinge", "policy"), ("hinge", "reference"), ("linear_dpo", "reference")}
PLACES = [
    pytest.param(name, source, row, marks=DROPPED if (name, source) in LOST else ())
    for name in CASES
    for source in ("policy", "reference")
    for row in (0, 6)  # a winner, a loser
    if source == "policy" or name not in WITHOUT_REFERENCE
]


@pytest.mark.parametrize(("name", "source", "row"), PLACES)
def test_nan_reaches_the_loss(name, source, row, small_tiles):
    x = pair_inputs(5, (4, 7, 11), torch.bfloat16, n_annotators=2)  # kernels of other tests
    with torch.no_grad():
        getattr(x, source)[row, 1, 2, 7] = float("nan")
    expected, _ = run(CASES[name], x, "reference")
    found, grad = run(CASES[name], x, "triton")
    if expected.loss.isnan():
        assert found.loss.isnan() and grad[row].isnan().any()
    else:  # a weight of zero, or an objective that does not read the loser
        torch.testing.assert_close(found.loss, expected.loss)
