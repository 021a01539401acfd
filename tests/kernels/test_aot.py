"""What launches compile, for every supported GPU: nothing spills, all loads are 16 bytes wide."""

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
        assert row["wide_bytes"] == "" or float(row["wide_bytes"]) == float(row["least_bytes"]), row
    asked = {row["kernel"] for row in rows if row["wide_bytes"]}
    assert asked == kernels - {"pair_loss_finish"}


def test_a_stream_that_is_read_in_pieces_is_found(tmp_path):
    """A target that begins off a 16-byte border loses its wide loads, and the report its peace."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, "-c", UNALIGNED], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


UNALIGNED = """
import aot_cases, aot_report, torch
batch = aot_cases.Batch(16, aot_cases.SDXL, torch.bfloat16)
whole = torch.empty(16 * 65536 + 1, dtype=torch.bfloat16)
aot_cases.cases = lambda: [
    aot_cases.loss_case("dpo", "bf16", aot_cases.OBJECTIVES["dpo"], batch, sources=[batch.rows()],
                        target=whole[first:first + 16 * 65536].view(16, *aot_cases.SDXL))
    for first in (0, 1)
]
rows = list(aot_report.rows_of("sm_90", heaviest=False))
assert [row.good for row in rows] == [True, True, False, False], rows
"""
