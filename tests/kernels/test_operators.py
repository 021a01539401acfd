"""The default on a CPU where its C++ module was not built: the same tests on torch's operators."""

import pytest

from fastpo_kernels.pair_loss.native import loss as native
from tests.kernels import test_mask, test_reduce, test_sides

# `conftest.py` keeps those whose implementation is the CPU's.
for module in (test_mask, test_reduce, test_sides):
    globals().update({k: v for k, v in vars(module).items() if k.startswith("test_")})


@pytest.fixture(autouse=True)
def by_operators(monkeypatch):
    monkeypatch.setattr(native, "takes", lambda _: False)
