"""NaN survives to the loss, and infinite errors give what the reference gives."""

import pytest
import torch

from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES, run

IMPLS = ("triton", "reference", None)
REFERENCE_FREE = ("sft", "mapo")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_nan_survives(name, impl, device):
    for where in ("policy", "reference"):
        if where == "reference" and name in REFERENCE_FREE:
            continue
        x = pair_inputs(3, (8,), torch.float32, device, n_annotators=2)
        getattr(x, where)[1, 3] = float("nan")
        out, grad = run(CASES[name], x, impl)
        assert out.loss.isnan(), where
        assert where == "reference" or grad[1, 3].isnan()
