"""A plugin for pytest under which `impl="triton"` compiles and runs on the PTX machine.

    TRITON_INTERPRET=0 python -m pytest -p tests.kernels.on_machine tests/kernels/test_pair_loss.py

Every launch is executed in several orders, which must leave the same bits, and every counter that
atomics changed must be back where it was. PTX_MACHINE_TARGET names the GPU, PTX_MACHINE_SEED the
device and the orders, PTX_MACHINE_SCHEDULES their number, unless a file of tests has a number
`SCHEDULES` of its own, which may be another where one order was asked for, the shortest run.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pytest
from fake_gpu import install

from tests.ptx_machine.launch import LaunchHook
from tests.ptx_machine.machine import Machine

GPU = install(os.environ.get("PTX_MACHINE_TARGET", "sm_90"))
assert GPU.library is not None


class _Machine(Machine):
    """Whose kernels leave their counters as they found them."""

    def launch(self, *given, **named):
        super().launch(*given, **named)
        changed = {a: v for a, v in self.counters.items() if v[0] != v[1]}
        if changed:
            raise AssertionError(f"counters not back where they were: {changed}")


SCHEDULES = int(os.environ.get("PTX_MACHINE_SCHEDULES", "3"))
MACHINE = _Machine(int(os.environ.get("PTX_MACHINE_SEED", "0")), schedules=SCHEDULES)
HOOK = LaunchHook(GPU.library, MACHINE)


def orders(shortly: int, otherwise: int) -> int:
    """A file's own number of orders: `shortly` where one order was asked for."""
    return shortly if SCHEDULES == 1 else otherwise


class _Nothing(Machine):
    """Executes nothing: launches compile, and outputs hold what their memory held."""

    def launch(self, *given, **named):
        pass


@pytest.fixture(autouse=True)
def _schedules(request):
    MACHINE.schedules = getattr(request.module, "SCHEDULES", SCHEDULES)


@pytest.fixture
def without_executing():
    """A context in which launches only compile."""

    @contextmanager
    def only_compiling():
        HOOK.machine = _Nothing()
        try:
            yield
        finally:
            HOOK.machine = MACHINE

    return only_compiling


@pytest.fixture
def hook():
    """The launch hook; what a test changes of it is put back."""
    before = HOOK.edit
    yield HOOK
    HOOK.edit = before


def pytest_terminal_summary(terminalreporter):
    opcodes = {opcode for counts in MACHINE.counts.values() for opcode in counts.executed}
    terminalreporter.write_line(
        f"{MACHINE.launches} launches of {len(MACHINE.counts)} kernels, {len(opcodes)} opcodes"
    )
