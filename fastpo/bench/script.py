"""The command line of `benchmarks/bench_*.py`: argparse and torch only, for a bare GPU machine."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastpo.bench.cases import DIRECTIONS, DTYPES, LATENTS, PAIRS, grid
from fastpo.bench.measure import ROOT, device
from fastpo.bench.run import NAMES, Options, Run, providers_of
from fastpo.bench.table import read_rows, write_csv


def results_path(op: str) -> Path:
    """`benchmarks/results/<device>/<op>.csv` of the checkout."""
    name = torch.cuda.get_device_name() if device() == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / slug / f"{op}.csv"


def _parser(op: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known, providers = NAMES[op], providers_of(op)
    flag = "--objectives" if op == "pair_loss" else "--predictions"
    parser.add_argument(flag, dest="names", nargs="+", choices=known, default=list(known))
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--pairs", nargs="+", type=int, default=list(PAIRS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--providers", nargs="+", choices=providers, default=list(providers))
    parser.add_argument("--seconds", type=float, default=0.3, help="per case and direction")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="in all")
    parser.add_argument("--commit", help="for the CSV, where git's history is missing")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/<device>/<op>.csv")
    parser.add_argument("--append", action="store_true", help="measure only what the file lacks")
    parser.add_argument("--skip-tests", action="store_true", help="they have just passed")
    return parser


def main(op: str, description: str | None, tests: Sequence[str]) -> int:
    """Measures the chosen part of the grid; 1 where a provider failed or disagreed."""
    args = _parser(op, description).parse_args()
    if not args.skip_tests:
        _require_tests(tests)
    path = args.out or results_path(op)
    cases = grid(op, args.names, args.latents, args.dtypes, args.pairs)
    options = Options(
        args.seconds, args.budget_seconds, args.providers, args.directions, args.commit
    )
    run = Run(cases, options)
    if args.append and path.exists():
        run.go_on_from(read_rows(path))
        cases = run.cases
    if device() == "cpu":
        print("no GPU: eager and compiled CPU path, and ours, the default on a CPU")
    print(f"{run.where['device']}: copy {run.copy:.1f} GB/s; {len(cases)} cases, writing {path}")
    for k, (case, rows) in enumerate(run):
        for direction in dict.fromkeys(r.direction for r in rows):
            words = [
                r.note or f"{r.provider} {r.ms_p50:.4f}" for r in rows if r.direction == direction
            ]
            print(f"{k + 1}/{len(cases)} {case} {direction} [ms]: {', '.join(words)}", flush=True)
        write_csv(run.rows, path)
    if run.unmeasured:
        print(f"out of time: {len(run.unmeasured)} of {len(cases)} cases not measured")
    for failure in run.failures:
        print(f"FAILED {failure}")
    return bool(run.failures)


def _require_tests(files: Sequence[str]) -> None:
    """Refuses to measure an operation whose tests fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(f"tests fail, nothing measured: {' '.join(files)}")
