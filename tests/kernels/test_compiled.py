"""Compiled kernels, executed on the PTX machine: see docs/ptx-machine.md.

The interpreter, in which the other tests of kernels run without a GPU, takes none of the compiler's
steps. Here the same tests run on what Triton compiles, each launch in three orders of its programs
and warps, with every access to memory watched.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "tests" / "kernels"


def on_machine(target, choice, *files, schedules=3, seed=0):
    """Runs the chosen tests of some files on the machine; returns how many passed."""
    env = os.environ | {
        "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PTX_MACHINE_TARGET": target,
        "PTX_MACHINE_SCHEDULES": str(schedules), "PTX_MACHINE_SEED": str(seed),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.on_machine"]
    command += ["-p", "no:cacheprovider", "-k", choice, *(str(KERNELS / file) for file in files)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and "failed" not in done.stdout, done.stdout[-8000:]
    return int(found[1])


@pytest.mark.slow
def test_every_objective_and_nan():
    """Within the float64 budget; NaN and infinite errors as the reference has them."""
    choice = "(test_objective_within_budget and bfloat16) or (nan_survives and triton)"
    choice += " or (infinite_errors and loser)"
    assert on_machine("sm_90", choice, "test_pair_loss.py", "test_not_finite.py") > 45


@pytest.mark.slow
def test_layouts_counts_and_noise():
    """Tensors that lie otherwise, one and many pairs, separate targets, and the noise kernel."""
    choice = "(strided and not cpu) or (batch_sizes and sdpo) or (separate_targets and sdpo)"
    choice += " or (equals_the_reference and float32) or half_precision or sides_share"
    choice += " or whose_product or test_words or test_normals or test_a_draw"
    files = ("test_pair_loss.py", "test_pair_noise_kernel.py", "test_large.py", "test_draws.py")
    assert on_machine("sm_90", choice, *files, seed=1) >= 27


@pytest.mark.slow
def test_terms_and_sides():
    """What options add to a loss, and pairs that do not lie as halves."""
    choice = "triton and (own_beta or (every_objective and kto) or (own_loss and sdpo)"
    choice += " or known_errors or (halves_give and sdpo))"
    assert on_machine("sm_90", choice, "test_terms.py", "test_sides.py", seed=4) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120"])
def test_other_targets(target):
    """A few objectives; these targets' instructions differ in how they convert bfloat16."""
    choice = "test_objective_within_budget and bfloat16 and (sdpo or kto or annotators)"
    choice += " or (equals_the_reference and flow and drawn and float32)"
    files = ("test_pair_loss.py", "test_pair_noise_kernel.py")
    assert on_machine(target, choice, *files, seed=2) >= 4


@pytest.mark.slow
def test_every_kernel_of_the_ahead_of_time_table():
    """The code of each call's own size and launch configuration, on a few pairs."""
    assert on_machine("sm_90", "", "compiled_cases.py") >= 70


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120"])
def test_draws_on_other_targets(target):
    """Integers to the bit, normals within their rounding and the same in every kernel."""
    assert on_machine(target, "", "test_draws.py", seed=3) >= 7


@pytest.mark.slow
def test_a_hundred_orders_leave_the_same_bits():
    assert on_machine("sm_90", "", "compiled_orders.py", schedules=100) >= 3


@pytest.mark.slow
def test_as_many_pairs_as_a_call_takes():
    assert on_machine("sm_90", "", "compiled_many.py", schedules=2) >= 5


@pytest.mark.slow
def test_faults_put_into_the_code_are_found():
    assert on_machine("sm_90", "", "compiled_mutations.py", schedules=2) >= 12
