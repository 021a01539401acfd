"""NaN survives to the loss, and infinite errors give what the reference gives."""

import pytest
import torch

from fastpo_kernels.pair_loss import cpu
from fastpo_kernels.pair_loss.native import loss as native
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


# Where the loser's error is infinite the pair is learned, and these say so by a finite loss.
LEARNED = ("dpo", "hinge", "kto", "dmpo", "sdpo", "sft", "mapo")
ROWS = {"winner": [1], "loser": [4], "both": [1, 4], "of two pairs": [1, 5]}


def far_from_the_target(dtype, device, rows):
    """A residual whose square overflows, and which is itself a number."""
    x = pair_inputs(3, (8,), dtype, device, n_annotators=2)
    x.policy[rows] = x.target.repeat(2, 1)[rows] + (1e25 if dtype == torch.float32 else 1e200)
    return x


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_infinite_errors_are_those_of_the_reference(name, rows, device, monkeypatch):
    """Loss and gradient coefficients, which multiply finite residuals here."""
    expected, expected_grad = run(
        CASES[name], far_from_the_target(torch.float32, device, ROWS[rows]), "reference"
    )
    assert expected.policy_error.isinf().sum() == len(ROWS[rows])
    for impl in ("triton", None, "operators", "long"):
        if impl == "operators":
            monkeypatch.setattr(native, "takes", lambda _: False)
        if impl == "long":
            monkeypatch.setattr(cpu, "small_loss", lambda *_: None)
        x = far_from_the_target(torch.float32, device, ROWS[rows])
        out, grad = run(CASES[name], x, "triton" if impl == "triton" else None)
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, expected_grad, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "float64"])
@pytest.mark.parametrize("name", LEARNED)
def test_an_infinite_error_of_the_loser_is_a_finite_loss(name, impl, device):
    dtype = torch.float64 if impl == "float64" else torch.float32
    x = far_from_the_target(dtype, device, ROWS["loser"])
    out, grad = run(CASES[name], x, "reference" if impl == "float64" else impl)
    assert out.policy_error.isinf().sum() == 1
    assert out.loss.isfinite() and grad.isfinite().all()
