"""What launches compile, for every supported GPU: nothing spills, all loads are 16 bytes wide."""

import csv
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_all(run, folder, *options):
    run(ROOT / "benchmarks" / "aot_report.py", "--out", folder / "aot.csv", *options)
    return list(csv.DictReader((folder / "aot.csv").open()))


# The heaviest kernels elsewhere: for the oldest GPU and the other compiler; in the long form of
# `test_compiled.py` for all.
OTHERS = ["sm_80", "gfx942"]
if os.environ.get("PTX_MACHINE_SCHEDULES"):
    OTHERS += ["sm_86", "sm_89", "sm_100", "sm_120"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "options"),
    [(["sm_90"], []), (OTHERS, ["--heaviest"])],
    ids=["every case on sm_90", "the heaviest on the others"],
)
def test_no_spills_and_wide_loads(run_compiling, targets, options, tmp_path):
    rows = compile_all(run_compiling, tmp_path, "--targets", *targets, *options)
    assert {row["target"] for row in rows} == set(targets)
    kernels = {"pair_loss_fwd", "pair_loss_finish", "pair_loss_bwd", "noised_pair"}
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert int(row["spill_bytes"]) == 0, row
        assert row["wide_bytes"] == "" or float(row["wide_bytes"]) == float(row["least_bytes"]), row
    asked = {row["kernel"] for row in rows if row["wide_bytes"]}
    assert asked == kernels - {"pair_loss_finish"}


def test_a_stream_that_is_read_in_pieces_is_found(run_compiling):
    """A target that begins off a 16-byte border loses its wide loads, and the report its peace."""
    run_compiling("-c", UNALIGNED)


UNALIGNED = """
import aot_cases, aot_report, dataclasses, torch
batch = aot_cases.Batch(16, aot_cases.SDXL, torch.bfloat16)
call = aot_cases.LossCall("dpo", "bf16", aot_cases.OBJECTIVES["dpo"], batch, 1)
whole = torch.empty(16 * 65536 + 1, dtype=torch.bfloat16)
targets = [whole[first:first + 16 * 65536].view(16, *aot_cases.SDXL) for first in (0, 1)]
aot_cases.cases = lambda: [
    call.case(dataclasses.replace(call.empty(batch), target=target)) for target in targets
]
rows = list(aot_report.rows_of("sm_90", heaviest=False))
assert [row.good for row in rows] == [True, True, False, False], rows
"""


def test_host_time_is_measured_of_every_objective(run_compiling, tmp_path):
    run_compiling(
        ROOT / "benchmarks" / "bench_host.py", "--runs", 3, "--out", tmp_path / "host.csv"
    )
    rows = list(csv.DictReader((tmp_path / "host.csv").open()))
    timed = {(r["objective"], r["direction"], r["provider"]): float(r["us_p50"]) for r in rows}
    for objective in ("dpo", "mapo", "sdpo", "adaptive_dpo"):
        for provider in ("ours", "eager"):
            assert 0 < timed[objective, "fwd", provider]
            assert 0 < timed[objective, "both", provider]
    assert (tmp_path / "host.md").read_text().count("| dpo |") == 2


def test_no_minimum_or_maximum_drops_nan(run_compiling):
    """The plain instructions return the other operand; the interpreter's do not show it."""
    assert "kernels without" in run_compiling("-c", KEEPS_NAN)


KEEPS_NAN = """
import re
import aot_cases, fake_gpu
gpu = fake_gpu.install("sm_90")
names = [*aot_cases.OBJECTIVES, *aot_cases.ALONE, "pair_errors", "two annotators, 16 pairs"]
chosen = [c for c in aot_cases.calls() if c.variant in names and c.dtype == "bf16"]
assert len(chosen) == len(names)
for call in chosen:
    call.case().run()
for made in gpu.compiled:
    found = re.findall(r"(?:max|min)[.\\w]*[.]f32", made.kernel.asm["ptx"])
    assert all(".NaN" in name for name in found), (made.name, found)
print(len(gpu.compiled), "kernels without")
"""


def test_counts_are_those_of_the_full_size(run_compiling):
    """Counts come from two small launches; of one pair, the full one can be executed beside them.

    What the code says of wide accesses is what is executed.
    """
    assert "as executed" in run_compiling("-c", COUNTED)


COUNTED = """
import aot_counts
hook = aot_counts.counting()
import aot_cases
names = ["dpo, 1 pair", "two annotators, all processes, 1 pair", "epsilon, posterior drawn"]
calls = [c for c in aot_cases.calls() if c.variant in names and c.dtype == "bf16"]
rows = list(aot_counts.rows_of(hook, calls))
kernels = [aot_counts.NAMES[k] for k in ("pair_loss_fwd_kernel", "pair_loss_bwd_kernel")]
assert [r.kernel for r in rows] == [*kernels, kernels[0], "pair_loss_finish", "noised_pair"], rows
for row in rows:
    (call,) = [c for c in calls if c.variant == row.variant]
    case = call.case()
    if row.kernel != "pair_loss_finish":
        wide = case.backward if row.kernel == "pair_loss_bwd" else case.forward
        assert row.bytes["ld_16"] + row.bytes["st_16"] == wide, row
        assert row.bytes["st_2"] == row.bytes["ld_2"] == 0, row
for call in calls[:2]:
    for name, counts in aot_counts.executed(hook, call).items():
        (row,) = [r for r in rows if (r.kernel, r.variant) == (aot_counts.NAMES[name], call.variant)
                  or r.kernel == aot_counts.NAMES[name] == "pair_loss_bwd"]
        elements = call.batch.rows()[0].numel()
        of = {k: elements * n for k, n in row.instructions.items()}
        assert sum(of.values()) + row.finish_instructions == counts.executed.total(), row
        assert elements * row.bytes["ld_16"] == counts.moved["global", "ld", 16], row
        assert (row.shared_requests, row.bank_conflicts) == (counts.requests, counts.conflicts)
print("as executed")
"""
