"""Whether to write a target, its noise, or nothing: noising, DPO forward and backward, three ways.

    python benchmarks/bench_redraw.py [--out benchmarks/results/<device>/redraw.csv]

Every row is one way of `noised_pair(target=...)`, timed turn by turn with the others: the median of
the whole step, the ratio of `ready`'s time to it (above 1: faster than writing the target), and the
step's peak memory. `redraw_estimate.py` predicts the same without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastpo import loss as fl
from fastpo.bench.cases import LATENTS
from fastpo.bench.measure import device, environment, make_clock, measure
from fastpo.bench.table import write_records
from fastpo_kernels.pair_noise import Prediction, noised_pair
from fastpo_kernels.pair_noise.api import TargetForm

WAYS: tuple[TargetForm, ...] = ("ready", "stored", "redrawn")
CASES: tuple[tuple[Prediction, bool], ...] = (
    ("epsilon", False),
    ("v_prediction", False),
    ("v_prediction", True),
)
SHAPES = (("sdxl", 256), ("sdxl", 16), ("video", 16))


def steps(latents: str, pairs: int, prediction: Prediction, posterior: bool) -> dict[str, Callable]:
    """One training step's share of noise and loss, by the way in which the target gets there."""
    torch.manual_seed(0)
    shape, where = (2 * pairs, *LATENTS[latents]), device()
    mean, logvar, policy, reference = (
        torch.randn(shape, device=where, dtype=torch.bfloat16) for _ in range(4)
    )
    policy.requires_grad_()
    keys = torch.arange(pairs, device=where)
    power = torch.linspace(0.999, 0.005, 1000, device=where)
    tables = (power.sqrt(), (1 - power).sqrt())
    drawn = logvar if posterior else None

    def step(way: TargetForm) -> object:
        pair = noised_pair(
            mean, keys, keys, *tables, seed=0, low=0, high=1000, prediction=prediction,
            target=way, logvar=drawn, scale=0.13, dtype=torch.bfloat16,
        )  # fmt: skip
        loss = fl.dpo(policy, reference, pair.target, beta=2500.0).loss
        return torch.autograd.grad(loss, policy)

    return {way: (lambda way=way: step(way)) for way in WAYS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=0.3, help="per case")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--commit")
    args = parser.parse_args()
    clock, where, rows = make_clock(), environment(args.commit), []
    stop = time.monotonic() + args.budget_seconds
    # On a CPU the draws are slow and the case says nothing: one small one, that the script runs.
    shapes = SHAPES if device() == "cuda" else (("sd15", 1),)
    for latents, pairs in shapes:
        for prediction, posterior in CASES:
            if time.monotonic() > stop:
                break
            timings = measure(steps(latents, pairs, prediction, posterior), args.seconds, clock)
            ready = timings["ready"].ms
            for way, timing in timings.items():
                ms = timing.ms
                rows.append({
                    "prediction": prediction, "posterior": posterior, "latents": latents,
                    "pairs": pairs, "target": way, "ms": round(ms, 5),
                    "ratio_to_ready": round(ready / ms, 3), "peak_mib": timing.peak_mib, **where,
                })  # fmt: skip
                print(latents, pairs, prediction, posterior, way, rows[-1]["ratio_to_ready"])
    if args.out and rows:
        write_records(rows, list(rows[0]), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
