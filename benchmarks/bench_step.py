"""Whole training steps: FastPO's options, the released trainers' recipes, the bare policy.

    python benchmarks/bench_step.py                               # a CPU, or a first look
    python benchmarks/bench_step.py --size sdxl --method lora --pairs 1 4
    python benchmarks/plot_step.py benchmarks/results/<device>/step.csv

Every step is an optimiser step on one micro-batch. Ours is `fastpo.train.optimizer_step` itself;
recipes are those of `step_recipes.py`; the floor is plain fine-tuning on cached latents: noise,
policy forward, mean squared error, backward, clipping, update. All share one model and one
optimiser and take turns; a ratio is formed within a round, so that a change of load meets both of
its sides. On a CPU with one thread the clock is the process's own, which leaves out waits for other
processes. Parts are timed in rounds of their own, with a synchronisation at every border. Peak
memory is that of a process that runs one kind of step alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from step_models import SIZES
from step_providers import CLOCK, DEVICE, FLOOR, PROVIDERS, Bench, Case, Parts

from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.models import DTYPES

PARTS = (
    "VAE",
    "text",
    "noise",
    "reference",
    "annotators",
    "policy forward",
    "loss",
    "backward",
    "optimizer",
    "ledger",
)


def measure(bench: Bench, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round, and the parts of a step, by provider."""
    found: dict[str, dict[str, Any]] = {n: {"seconds": [], "parts": {}} for n in bench.steps}
    for step in bench.steps.values():  # first calls allocate and compile
        step()
    for _ in track(range(rounds), "rounds", console=Console(stderr=True)):
        for name, step in bench.steps.items():
            start = Parts.now()
            step()
            found[name]["seconds"].append(Parts.now() - start)
    bench.parts.on = True
    for name, step in bench.steps.items():
        runs = []
        for _ in range(max(2, rounds // 3)):
            bench.parts.seconds.clear()
            start = Parts.now()
            step()
            total = Parts.now() - start
            runs.append(dict(bench.parts.seconds) | {"total": total})
        runs.sort(key=lambda run: run["total"])
        found[name]["parts"] = runs[len(runs) // 2]
    bench.parts.on = False
    return found


def peak_mib(case: Case, name: str) -> float:
    """Peak memory of a process that runs this step alone, above what its imports take."""
    command = [sys.executable, __file__, "--peak-of", name, "--case", json.dumps(vars(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return float(done.stdout.split()[-1])


def _print_peak(case: Case, name: str) -> None:
    before = _high_water()
    bench = Bench(case, (name,))
    for _ in range(2):
        bench.steps[name]()
    if DEVICE == "cuda":
        print(torch.cuda.max_memory_reserved() / 2**20)
    else:
        print((_high_water() - before) / 2**10)


def _high_water() -> int:
    """This program's peak resident KiB; `ru_maxrss` would count its parent's before the exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def rows_of(case: Case, found: dict[str, dict[str, Any]], peaks: dict[str, float]) -> list[dict]:
    """One row a provider; ratios are medians over the rounds, with their quintiles."""
    rows, about = [], environment()
    recipes = {n: f for n, f in found.items() if n.startswith("recipe")}
    for name, timing in found.items():
        floor = _ratios(timing, found.get(FLOOR))
        rival = recipes.get(_rival(name))
        faster = _ratios(rival, timing) if rival is not None else None
        seconds = statistics.median(timing["seconds"])
        parts = timing["parts"]
        share = {
            f"share_{part.replace(' ', '_')}": round(parts.get(part, 0.0) / parts["total"], 4)
            for part in PARTS
        }
        rest = round(1.0 - sum(share.values()), 4)
        rows.append(
            {
                "size": case.size,
                "method": case.method,
                "pairs": case.pairs,
                "precision": case.precision,
                "checkpointing": case.checkpointing,
                "provider": name,
                "pairs_per_s": round(case.pairs / seconds, 4),
                "times_floor": floor[1],
                "times_floor_p20": floor[0],
                "times_floor_p80": floor[2],
                "faster_than_recipe": faster[1] if faster else "",
                "faster_p20": faster[0] if faster else "",
                "faster_p80": faster[2] if faster else "",
                "peak_mib": round(peaks[name]) if name in peaks else "",
                **share,
                "share_rest": rest,
                "rounds": len(timing["seconds"]),
                "clock": CLOCK,
                **about,
            }
        )
    return rows


def _rival(name: str) -> str:
    """The recipe that trains the same objective."""
    for which in ("MaPO", "Adaptive-DPO"):
        if which in name:
            return f"recipe {which}"
    return "recipe Diffusion-DPO" if name.startswith("FastPO") else ""


def _ratios(above: dict | None, below: dict | None) -> tuple[Any, Any, Any]:
    """Quintiles and median of the ratio of two providers' seconds, round by round."""
    if above is None or below is None:
        return "", "", ""
    ratios = [a / b for a, b in zip(above["seconds"], below["seconds"], strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5)
    return round(low, 3), round(statistics.median(ratios), 3), round(high, 3)


def main() -> None:
    """Measures every method and batch asked for, and writes `step.csv`."""
    gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="sdxl" if gpu else "mid")
    parser.add_argument("--method", nargs="+", choices=("lora", "full"), default=["full", "lora"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[4] if gpu else [1])
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-peaks", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/<device>/step.csv")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        _print_peak(Case(**options.case), options.peak_of)
        return
    path = options.out or results_path("step")
    rows: list[dict] = []
    for method in options.method:
        for pairs in options.pairs:
            case = Case(options.size, method, pairs, options.precision, options.checkpointing)
            names = tuple(options.providers)
            peaks = {} if options.no_peaks else {n: peak_mib(case, n) for n in names}
            rows += rows_of(case, measure(Bench(case, names), options.rounds), peaks)
            write_records(rows, list(rows[0]), path)
    Console().print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
