"""What a loss costs the host, without a GPU: Python, autograd, binding and launching.

    OMP_NUM_THREADS=1 python benchmarks/bench_host.py [--out benchmarks/results/cpu/host.csv]

Ours goes through Triton's own C launcher with a libcuda that does nothing (`fake_gpu.py`), on CPU
tensors: everything but the driver's part of two launches, a few microseconds on a GPU's host.
Eager's operators run on the CPU, on 16 pairs of 16 elements, where their work is nothing beside
their cost; on a GPU each would launch instead. One thread, its own time, turn by turn.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fake_gpu import install
from torch import Tensor

from fastpo import loss as fl
from fastpo.bench.losses import trainer_loss
from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.system.files import write_text
from fastpo_kernels.testing import PairInputs, pair_inputs

PAIRS, DIMS = 16, (4, 2, 2)
COLUMNS = ("objective", "direction", "provider", "us_p20", "us_p50", "us_p80", "runs")


def calls(x: PairInputs) -> dict[str, Callable[[], Tensor]]:
    """Our calls, by objective; the first four have an eager twin."""
    minority = torch.zeros(PAIRS)
    return {
        "dpo": lambda: fl.dpo(x.policy, x.reference, x.target, beta=2500.0, impl="triton").loss,
        "mapo": lambda: fl.mapo(x.policy, x.target, impl="triton").loss,
        "sdpo": lambda: (
            fl.sdpo(x.policy, x.reference, x.target, beta=2500.0, mu=0.9, impl="triton").loss
        ),
        "adaptive_dpo": lambda: (
            fl.adaptive_dpo(
                x.policy, x.reference, x.target, beta=1000.0, annotators=x.annotators, impl="triton"
            ).loss
        ),
        "adaptive_dpo, ledger": lambda: (
            fl.adaptive_dpo(
                x.policy, x.reference, x.target, beta=1000.0, minority=minority, impl="triton"
            ).loss
        ),
    }


def measure(steps: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Microseconds of every run, the providers in another order each time."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    rng = random.Random(0)
    for turn in range(runs + 20):
        for name in rng.sample(list(steps), len(steps)):
            start = time.thread_time_ns()
            steps[name]()
            if turn >= 20:
                found[name].append((time.thread_time_ns() - start) / 1e3)
    return found


def rows(runs: int) -> list[dict[str, object]]:
    """One row an objective, direction and provider."""
    x = pair_inputs(PAIRS, DIMS, torch.bfloat16, n_annotators=2)
    x.policy.requires_grad_()
    about, found = environment(), []
    for name, ours in calls(x).items():
        losses = {"ours": ours}
        if "," not in name:
            losses["eager"] = trainer_loss(name, x)
        for direction in ("fwd", "both"):
            steps: dict[str, Callable[[], object]] = dict(losses)
            if direction == "both":
                steps = {
                    provider: lambda loss=loss: torch.autograd.grad(loss(), x.policy)
                    for provider, loss in losses.items()
                }
            for provider, us in measure(steps, runs).items():
                low, *_, high = statistics.quantiles(us, n=5, method="inclusive")
                numbers = (low, statistics.median(us), high)
                row = (name, direction, provider, *(round(n, 1) for n in numbers), len(us))
                found.append(dict(zip(COLUMNS, row, strict=True)) | about)
    return found


def table(found: list[dict[str, object]]) -> str:
    """Medians and quintiles by objective and direction, in Markdown."""
    first = found[0]
    lines = [
        "# Host time of a loss",
        "",
        "Microseconds of one CPU thread, median (20th to 80th percentile); ours without the "
        f"driver's part of a launch, eager on the CPU. {first['device']}, torch {first['torch']}, "
        f"Triton {first['triton']}, commit {first['commit']}, {first['date']}.",
        "",
        "| objective | direction | ours | eager |",
        "|---|---|---|---|",
    ]
    cells: dict[tuple[object, object], dict[object, str]] = {}
    for row in found:
        text = f"{row['us_p50']} ({row['us_p20']} to {row['us_p80']})"
        cells.setdefault((row["objective"], row["direction"]), {})[row["provider"]] = text
    for (objective, direction), by in cells.items():
        lines.append(f"| {objective} | {direction} | {by['ours']} | {by.get('eager', '')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="CSV file; default: results/<device>/host.csv")
    args = parser.parse_args()
    if torch.get_num_threads() != 1:
        print("error: set OMP_NUM_THREADS=1; the thread's own clock is read", file=sys.stderr)
        return 2
    install()
    found = rows(args.runs)
    path = args.out or results_path("host")
    write_records(found, list(found[0]), path)
    write_text(path.with_suffix(".md"), table(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
