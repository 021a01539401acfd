"""Whole training steps: FastPO's options, the released trainers' recipes, the bare policy.

    python benchmarks/bench_step.py                               # a CPU, or a first look
    python benchmarks/bench_step.py --size sdxl --method lora --pairs 1 4
    python benchmarks/bench_step.py --options                     # torch.compile, 8-bit AdamW, ...
    python benchmarks/plot_step.py benchmarks/results/<device>/step.csv

Every step is an optimizer step on one micro-batch. Ours is the trainer's own
(`fastpo.train.trainer.Trainer.optimizer_step`); recipes are those of `step_recipes.py`; the floor
is plain fine-tuning on cached latents: noise, policy forward, mean squared error, backward,
clipping, update.

The steps of one objective, its recipe and the floor share a model and an optimizer and take turns,
in another order every round; a ratio is formed within a round, so that a change of load meets both
of its sides. One such group is in memory at a time. Where it does not fit, each of its steps is
measured with the floor alone: the ratio to its recipe is then that of their medians over the floor,
and has no spread. With `--options` each of the trainer's options for memory and speed, on a model
of its own, takes turns with MaPO's step without it. `times_floor` compares all rows of a case;
`pairs_per_s` is to be read beside `floor_pairs_per_s`, the floor's in the same rounds.

On a CPU with one thread the clock is the process's own, which leaves out waits for other processes.
Parts are timed in rounds of their own, with a synchronization at every border. Peak memory is that
of a process that runs one kind of step alone, after all times are taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from step_models import SIZES
from step_providers import (
    EVERY,
    FLOOR,
    OPTIONS,
    Bench,
    Case,
    groups,
    providers_of,
    rival,
)
from step_timing import CLOCK, DEVICE, Parts

from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.errors import FastPOError
from fastpo.precision import DTYPES

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
Found = dict[str, dict[str, Any]]
Row = dict[str, Any]


def measure(benches: list[Bench], rounds: int) -> Found:
    """Seconds of every round, and the parts of a step, by provider."""
    steps = {name: step for bench in benches for name, step in bench.steps.items()}
    found: Found = {n: {"seconds": [], "parts": {}} for n in steps}
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
            found[name]["parts"] = parts_of(bench, name, max(1, rounds // 3))
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


def measure_providers(case: Case, names: Iterable[str], rounds: int) -> Iterator[list[Row]]:
    """The case's rows, again after every group."""
    rows: list[Row] = []
    for group in groups(case.method, names, flow=SIZES[case.size].flow):
        for found in _together_or_apart(case, group, rounds):
            rows += [_row(case, name, found) for name in found if name != FLOOR or not rows]
            _compare_over_floor(rows)
            yield rows


def _together_or_apart(case: Case, group: tuple[str, ...], rounds: int) -> Iterator[Found]:
    """What a group's rounds found; where it does not fit in memory, each step's with the floor."""
    found = _in_turn(case, group, rounds)
    if found is not None:
        yield found
        return
    if len(group) > 2:
        _say(f"do not fit in memory together, measured one by one: {'; '.join(group[1:])}")
    for name in group[1:]:
        found = _in_turn(case, (FLOOR, name), rounds) if len(group) > 2 else None
        if found is not None:
            yield found
        else:
            _say(f"{name}: does not fit in memory, no row")


def _in_turn(case: Case, names: tuple[str, ...], rounds: int) -> Found | None:
    """Measures steps that share a model, and frees it; None where memory does not suffice."""
    try:
        found = measure([Bench(case, names)], rounds)
    except torch.OutOfMemoryError:
        found = None
    _free()
    return found


def _free() -> None:
    """Gives a dropped bench's memory back: its hooks and steps refer to it in circles."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def _compare_over_floor(rows: list[Row]) -> None:
    """Fills in ratios to recipes that were measured on a model of their own."""
    floors = {row["provider"]: row["times_floor"] for row in rows}
    for row in rows:
        recipe = floors.get(_recipe_of(row["size"], row["provider"]))
        if recipe is not None and row["faster_than_recipe"] == "":
            row["faster_than_recipe"] = round(recipe / row["times_floor"], 3)


def _recipe_of(size: str, name: str) -> str:
    return rival(name, flow=SIZES[size].flow)


def measure_options(case: Case, options: Iterable[str], rounds: int) -> Iterator[list[Row]]:
    """Rows of the bare policy and of MaPO, then one more of MaPO with each option alone.

    An option that this machine or method refuses is named with the reason, and has no row.
    """
    plain = Bench(case, (FLOOR, PLAIN))
    found = measure([plain], rounds)
    rows = [_row(case, name, found) for name in found]
    yield rows
    for option in options:
        try:
            rows.append(_option_row(plain, replace(case, option=option), rounds))
            yield rows
        except (FastPOError, ValueError, RuntimeError) as error:
            _say(f"{option}: {error}")
        _free()


def _option_row(plain: Bench, changed: Case, rounds: int) -> Row:
    bench, name = Bench(changed, (PLAIN,)), f"{PLAIN}, {changed.option}"
    bench.steps = {name: bench.steps[PLAIN]}
    return _row(changed, name, measure([plain, bench], rounds))


def add_peaks(case: Case, rows: list[Row], wanted: Collection[str]) -> Iterator[list[Row]]:
    """The rows, again after each peak memory that is wanted."""
    for row in rows:
        name = PLAIN if row["option"] else row["provider"]
        if name in wanted:
            row["peak_mib"] = peak_mib(replace(case, option=row["option"]), name)
            yield rows


def peak_mib(case: Case, name: str) -> int | str:
    """Peak memory of a process that runs this step alone, above what its imports take.

    Empty where the process fails, for want of memory say: the terminal shows why, and the row keeps
    its times.
    """
    command = [sys.executable, __file__, "--peak-of", name, "--case", json.dumps(vars(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        _say(f"no peak memory of {name}: {reason}")
        return ""
    return round(float(done.stdout.split()[-1]))


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


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False)


def _row(case: Case, name: str, found: Found) -> Row:
    """A provider's row; ratios are medians over the rounds, with their quintiles."""
    timing = found[name]
    floor, recipe = _ratios(timing, found[FLOOR]), found.get(_recipe_of(case.size, name))
    faster = ("", "", "") if recipe is None else _ratios(recipe, timing)
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
        "pairs_per_s": _pairs_per_second(case, timing),
        "floor_pairs_per_s": _pairs_per_second(case, found[FLOOR]),
        "times_floor": floor[1],
        "times_floor_p20": floor[0],
        "times_floor_p80": floor[2],
        "faster_than_recipe": faster[1],
        "faster_p20": faster[0],
        "faster_p80": faster[2],
        "peak_mib": "",
        **share,
        "share_rest": round(1.0 - sum(share.values()), 4),
        "rounds": len(timing["seconds"]),
        "clock": CLOCK,
    }


def _pairs_per_second(case: Case, timing: dict[str, Any]) -> float:
    return round(case.pairs / statistics.median(timing["seconds"]), 4)


def _ratios(above: dict[str, Any], below: dict[str, Any]) -> tuple[float, float, float]:
    """Lowest quintile, median and highest of the ratio of two providers' seconds, by round."""
    ratios = [a / b for a, b in zip(above["seconds"], below["seconds"], strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
    return round(low, 3), round(statistics.median(ratios), 3), round(high, 3)


def measure_case(case: Case, options: argparse.Namespace) -> Iterator[list[Row]]:
    """The case's rows so far, again whenever there is more to tell."""
    rows: list[Row] = []
    if options.options is None:
        names = [name for name in options.providers if name in providers_of(case.size)]
        found = measure_providers(case, names, options.rounds)
    else:
        found = measure_options(case, options.options or OPTIONS, options.rounds)
    for rows in found:
        yield rows
    del found
    _free()  # peaks need the memory
    yield from add_peaks(case, rows, options.peaks)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["sdxl" if gpu else "mid"])
    parser.add_argument("--method", nargs="+", choices=("lora", "full"), default=["full", "lora"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[4] if gpu else [1])
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--providers", nargs="+", choices=EVERY, default=EVERY)
    parser.add_argument(
        "--options", nargs="*", choices=OPTIONS, help="these, or all, instead of the providers"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--peaks", nargs="*", choices=EVERY, default=EVERY, help="peak memory of these only"
    )
    parser.add_argument("--commit", help="for the CSV, where git's history is not at hand")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/<device>/step.csv")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measures every size, method and batch asked for, and writes `step.csv`."""
    options = make_parser().parse_args()
    if options.peak_of:
        _print_peak(Case(**options.case), options.peak_of)
        return
    where = environment(options.commit)  # as it is before anything runs
    path = options.out or results_path("step" if options.options is None else "step_options")
    done: list[Row] = []
    for size in options.size:
        for method in options.method:
            for pairs in options.pairs:
                case = Case(size, method, pairs, options.precision, options.checkpointing)
                rows: list[Row] = []
                for rows in measure_case(case, options):
                    written = [row | where for row in done + rows]
                    write_records(written, list(written[0]), path)
                done += rows
    Console().print(f"{len(done)} rows in {path}")


if __name__ == "__main__":
    main()
