"""Whole training steps: FastPO's options, the released trainers' recipes, the bare policy.

    python benchmarks/bench_step.py                               # a CPU, or a first look
    python benchmarks/bench_step.py --size sdxl --method lora --pairs 1 4
    python benchmarks/bench_step.py --options                     # torch.compile, 8-bit AdamW, ...
    python benchmarks/plot_step.py benchmarks/results/<device>/step.csv

Every step is an optimiser step on one micro-batch. Ours is `fastpo.train.optimizer_step` itself;
recipes are those of `step_recipes.py`; the floor is plain fine-tuning on cached latents: noise,
policy forward, mean squared error, backward, clipping, update. All share one model and one
optimiser and take turns, in another order every round; a ratio is formed within a round, so that a
change of load meets both of its sides. With `--options` each of the trainer's options for memory
and speed, on a model of its own, takes turns with MaPO's step without it. On a CPU with one thread
the clock is the process's own, which leaves out waits for other processes. Parts are timed in
rounds of their own, with a synchronisation at every border. Peak memory is that of a process that
runs one kind of step alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from step_models import SIZES
from step_providers import CLOCK, DEVICE, FLOOR, OPTIONS, PROVIDERS, Bench, Case, Parts

from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.errors import FastPOError
from fastpo.models import DTYPES

PLAIN = "FastPO MaPO"  # nothing frozen runs beside the policy, so an option's effect shows whole

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


def measure(benches: list[Bench], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round, and the parts of a step, by provider."""
    steps = {name: step for bench in benches for name, step in bench.steps.items()}
    found: dict[str, dict[str, Any]] = {n: {"seconds": [], "parts": {}} for n in steps}
    for step in steps.values():  # first calls allocate and compile
        step()
        step()
    rng = random.Random(0)
    for _ in track(range(rounds), "rounds", console=Console(stderr=True)):
        for name in rng.sample(list(steps), len(steps)):
            start = Parts.now()
            steps[name]()
            found[name]["seconds"].append(Parts.now() - start)
    for bench in benches:
        for name in bench.steps:
            found[name]["parts"] = parts_of(bench, name, max(2, rounds // 3))
    return found


def parts_of(bench: Bench, name: str, runs: int) -> dict[str, float]:
    """Seconds by part of a provider's median step."""
    found = []
    bench.parts.on = True
    for _ in range(runs):
        bench.parts.seconds.clear()
        start = Parts.now()
        bench.steps[name]()
        total = Parts.now() - start
        found.append(dict(bench.parts.seconds) | {"total": total})
    bench.parts.on = False
    return sorted(found, key=lambda run: run["total"])[len(found) // 2]


def measure_options(
    case: Case, options: Iterable[str], rounds: int, peaks: bool
) -> Iterator[list[dict]]:
    """Rows of the bare policy and of MaPO, then one of MaPO with each option alone.

    An option that this machine or method refuses is named with the reason, and has no row.
    """
    plain = Bench(case, (FLOOR, PLAIN))
    yield rows_of(case, measure([plain], rounds), _peaks(case, plain.steps, peaks))
    for option in options:
        changed = replace(case, option=option)
        try:
            yield [_option_row(plain, changed, rounds, peaks)]
        except (FastPOError, ValueError, RuntimeError) as error:
            Console(stderr=True).print(f"{option}: {error}", markup=False)
        gc.collect()


def _option_row(plain: Bench, changed: Case, rounds: int, peaks: bool) -> dict:
    bench, name = Bench(changed, (PLAIN,)), f"{PLAIN}, {changed.option}"
    bench.steps = {name: bench.steps[PLAIN]}
    found = measure([plain, bench], rounds)
    memory = peak_mib(changed, PLAIN) if peaks else None
    return _row(changed, name, found, memory)


def _peaks(case: Case, names: Iterable[str], wanted: bool) -> dict[str, float | None]:
    return {name: peak_mib(case, name) if wanted else None for name in names}


def peak_mib(case: Case, name: str) -> float | None:
    """Peak memory of a process that runs this step alone, above what its imports take.

    None where the process fails, for want of memory say: the terminal shows why, and the row keeps
    its times.
    """
    command = [sys.executable, __file__, "--peak-of", name, "--case", json.dumps(vars(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        Console(stderr=True).print(f"no peak memory of {name}: {reason}", markup=False)
        return None
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


def rows_of(
    case: Case, found: dict[str, dict[str, Any]], peaks: dict[str, float | None]
) -> list[dict]:
    """One row a provider."""
    return [_row(case, name, found, peaks[name]) for name in found]


def _row(
    case: Case, name: str, found: dict[str, dict[str, Any]], peak: float | None
) -> dict[str, Any]:
    """A provider's row; ratios are medians over the rounds, with their quintiles."""
    timing, rival = found[name], found.get(_rival(name))
    floor = _ratios(timing, found.get(FLOOR))
    faster = _ratios(rival, timing)
    parts = timing["parts"]
    share = {
        f"share_{part.replace(' ', '_')}": round(parts.get(part, 0.0) / parts["total"], 4)
        for part in PARTS
    }
    return {
        "size": case.size,
        "method": case.method,
        "pairs": case.pairs,
        "precision": case.precision,
        "checkpointing": case.config().train.gradient_checkpointing,
        "option": case.option,
        "provider": name,
        "pairs_per_s": round(case.pairs / statistics.median(timing["seconds"]), 4),
        "times_floor": floor[1],
        "times_floor_p20": floor[0],
        "times_floor_p80": floor[2],
        "faster_than_recipe": faster[1],
        "faster_p20": faster[0],
        "faster_p80": faster[2],
        "peak_mib": "" if peak is None else round(peak),
        **share,
        "share_rest": round(1.0 - sum(share.values()), 4),
        "rounds": len(timing["seconds"]),
        "clock": CLOCK,
        **environment(),
    }


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


def _rows(case: Case, options: argparse.Namespace) -> Iterator[list[dict]]:
    """The rows of a case, as they are measured."""
    if options.options is not None:
        chosen = options.options or OPTIONS
        yield from measure_options(case, chosen, options.rounds, not options.no_peaks)
        return
    names = tuple(options.providers)
    peaks = _peaks(case, names, not options.no_peaks)
    yield rows_of(case, measure([Bench(case, names)], options.rounds), peaks)


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
    parser.add_argument(
        "--options", nargs="*", choices=OPTIONS, help="these, or all, instead of the providers"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-peaks", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/<device>/step.csv")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        _print_peak(Case(**options.case), options.peak_of)
        return
    path = options.out or results_path("step" if options.options is None else "step_options")
    rows: list[dict] = []
    for method in options.method:
        for pairs in options.pairs:
            case = Case(options.size, method, pairs, options.precision, options.checkpointing)
            for found in _rows(case, options):
                rows += found
                write_records(rows, list(rows[0]), path)
    Console().print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
