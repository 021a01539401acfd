"""Compiled kernels, executed on the PTX machine: see docs/ptx-machine.md.

The interpreter, in which the other tests of kernels run without a GPU, takes none of the compiler's
steps. Here the same tests run on what Triton compiles, each launch in several orders of its
programs and warps, with every access to memory watched. The tests of one target share a process,
and what it compiles.

Every kernel of the ahead-of-time table runs on sm_90 in two orders, a few in 25. Of the kernel
tests those run that add to the table, in one order, in which missing barriers are seen too. With
`-m long`, and everywhere with PTX_MACHINE_SCHEDULES=3, they run for every objective and in three
orders, the table in three as well, and the few in a hundred.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "tests" / "kernels"
ORDERS = int(os.environ.get("PTX_MACHINE_SCHEDULES", "1"))

# Of each file the tests that run, and how many there are at least.
OBJECTIVES = "bfloat16 and (smoothed or annotators or l2 or exponential)"
PAIR_LOSS = (
    "(test_objective_within_budget and {}) or (strided and not cpu)"
    " or (batch_sizes and sdpo) or (separate_targets and sdpo)"
)
ON_SM_90 = {
    "test_pair_loss.py": (PAIR_LOSS.format("bfloat16" if ORDERS > 1 else OBJECTIVES), 12),
    "test_not_finite.py": ("(nan_survives and triton) or (infinite_errors and loser)", 28),
    "test_pair_noise_kernel.py": (
        "(equals_the_reference and float32) or half_precision or sides_share", 8,
    ),
    "test_large.py": ("whose_product", 1),
    "test_draws.py": ("test_words or test_normals or test_a_draw", 7),
    "test_terms.py": (
        "triton and (own_beta or (every_objective and kto) or (own_loss and sdpo)"
        " or known_errors)",
        10,
    ),
    "test_sides.py": ("triton and halves_give and sdpo", 2),
    "compiled_cases.py": ("", 78),
    "compiled_orders.py": ("", 3),
    "compiled_many.py": ("", 5),
    "compiled_mutations.py": ("", 14),
}  # fmt: skip
ELSEWHERE = {
    "test_pair_loss.py": (
        "test_objective_within_budget and bfloat16 and (sdpo or kto or annotators)", 3,
    ),
    "test_pair_noise_kernel.py": ("equals_the_reference and flow and drawn and float32", 1),
    "test_draws.py": ("", 7),
}  # fmt: skip


def on_machine(target, chosen, *, schedules, seed):
    """Runs the chosen tests on the machine in one process; returns how many of each file passed."""
    env = os.environ | {
        "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PTX_MACHINE_TARGET": target,
        "PTX_MACHINE_SCHEDULES": str(schedules), "PTX_MACHINE_SEED": str(seed),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
    }  # fmt: skip
    parts = [f"({file} and ({choice}))" if choice else file for file, (choice, _) in chosen.items()]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.kernels.on_machine"]
    command += ["-p", "no:cacheprovider", "-k", " or ".join(parts)]
    command += [str(KERNELS / file) for file in chosen]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return Counter(re.findall(r"kernels/(\w+\.py)::.* PASSED", done.stdout))


@pytest.fixture(scope="module")
def passed_on_sm_90():
    return on_machine("sm_90", ON_SM_90, schedules=ORDERS, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("file", ON_SM_90)
def test_sm_90(file, passed_on_sm_90):
    """Objectives, layouts, terms and noise; the table; many orders; faults that are found."""
    assert passed_on_sm_90[file] >= ON_SM_90[file][1]


@pytest.mark.long
@pytest.mark.slow
def test_sm_90_for_every_objective_in_more_orders():
    chosen = {**ON_SM_90, "test_pair_loss.py": (PAIR_LOSS.format("bfloat16"), 26)}
    passed = on_machine("sm_90", chosen, schedules=3, seed=3)
    assert all(passed[file] >= least for file, (_, least) in chosen.items()), passed


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120"])
def test_other_targets(target):
    """A few objectives, whose conversions of bfloat16 differ, and draws, to the bit."""
    passed = on_machine(target, ELSEWHERE, schedules=ORDERS, seed=2)
    assert all(passed[file] >= least for file, (_, least) in ELSEWHERE.items()), passed
