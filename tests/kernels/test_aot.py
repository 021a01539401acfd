"""Every kernel compiles for every supported GPU, without spills and with 16-byte loads."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_all(folder, *options):
    """Runs the report where Triton compiles: in a process without the interpreter's variable."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, str(ROOT / "benchmarks" / "aot_report.py")]
    command += ["--out", str(folder / "aot.csv"), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(csv.DictReader((folder / "aot.csv").open()))


OTHERS = ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "options"),
    [(["sm_90"], []), (OTHERS, ["--heaviest"])],
    ids=["every case on sm_90", "the heaviest on the others"],
)
def test_no_spills_and_wide_loads(targets, options, tmp_path):
    rows = compile_all(tmp_path, "--targets", *targets, *options)
    assert {row["target"] for row in rows} == set(targets)
    kernels = {"pair_loss_fwd", "pair_loss_finish", "pair_loss_bwd", "noised_pair"}
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert int(row["spill_bytes"]) == 0, row
        assert int(row["wide_loads"]) >= int(row["streams"]), row
