"""Calls whose launches are executed in many orders of programs and warps; by test_compiled.py.

The machine compares the bits that each order leaves, and looks whether counters are back at zero.
"""

import pytest
import torch

from fastpo_kernels.pair_noise import noised_pair
from fastpo_kernels.testing import pair_inputs
from tests.kernels.objectives import CASES, check
from tests.kernels.on_machine import orders

SCHEDULES = orders(25, 100)
NAMES = ["dpo", "sdpo"]


@pytest.mark.parametrize("name", NAMES)
def test_losses(name, hook, small_tiles):
    """Three pairs by three programs each, several tiles a program."""
    launches = hook.machine.launches
    check(CASES[name], pair_inputs(3, (7, 31), torch.bfloat16, n_annotators=2))
    assert hook.machine.launches >= launches + 2


def test_noise(hook):
    latents, keys = torch.zeros(4, 300), torch.tensor([5, 2**62 + 3])
    tables = torch.linspace(0.9, 0.1, 50), torch.linspace(0.1, 0.9, 50)
    found = noised_pair(
        latents, keys, keys % 7, *tables, seed=3, low=0, high=50, prediction="flow",
        logvar=latents, impl="triton",
    )  # fmt: skip
    assert all(t.isfinite().all() for t in found) and hook.machine.launches > 0
