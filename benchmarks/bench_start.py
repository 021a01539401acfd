"""What starting costs: processor time of whole commands, of this checkout and of another one.

    python benchmarks/bench_start.py --before CHECKOUT [--rounds 5] [--out FILE.csv]

CHECKOUT is a folder with another commit of this project (`git worktree add --detach FOLDER
COMMIT`); both run with this Python and its packages, turn by turn, one thread each. User and system
time of the process are counted, not the clock's, so that other work on the machine matters little.
Training is counted from its launch to the first line of `metrics.jsonl`, on the demo's model and a
small part of its data, which each checkout prepares for itself beforehand. What diffusers imports
for a UNet alone, peft with bitsandbytes and torch's compiler included where they are installed, is
the floor of both, whatever our own code does.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from checkouts import Checkout, known_checkout, used_seconds, whole

from fastpo.bench.measure import ROOT, environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.demo.base import SHORT, build_base
from fastpo.demo.preferences import write_preferences
from fastpo.system.files import write_text

COLUMNS = (
    *("case", "of", "cpu_s_p20", "cpu_s_p50", "cpu_s_p80", "runs"),
    *("times_before", "times_import"),
)
TORCH, LOSS, HELP = "import torch", "import fastpo.loss", "fastpo --help"
UNET = "from diffusers import UNet2DConditionModel"
PLAN, TRAIN = "fastpo plan, SDXL with LoRA", "fastpo train, to the first step"
FLOORS = {LOSS: TORCH, PLAN: UNET, TRAIN: UNET}  # what must be imported in any case
PATIENCE = 600.0  # seconds
MOMENTARY, TIMES = (TORCH, LOSS, HELP), 4  # what takes a moment is noisy: so often in a turn


def until_written(checkout: Checkout, words: Sequence[str], cwd: Path, file: Path) -> float:
    """Seconds of the processor that a process takes until it has written a line of a file.

    Raises:
        RuntimeError: It ended before.
    """
    process = checkout.start(words, cwd)
    end = time.monotonic() + PATIENCE
    try:
        while not (file.is_file() and file.stat().st_size):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{checkout.root}: {' '.join(words)} wrote no {file.name}")
            time.sleep(0.002)
        return used_seconds(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def training(checkout: Checkout, work: Path, base: Path, preferences: Path) -> list[str]:
    """The words of a run of the demo's configuration in a folder of its own."""
    folder = work / checkout.name
    changes = {
        "model.path": base,
        "data.path": preferences,
        "prepare.cache_dir": folder / "cache",
        "train.output_dir": folder / "run",
        "train.objective": "{name: dpo, beta: 1000.0}",
        "train.epochs": "null",
        "train.max_steps": 50,
    }
    settings = [part for k, v in changes.items() for part in ("--set", f"{k}={v}")]
    config = str(checkout.root / "fastpo" / "configs" / "demo.yaml")
    whole(checkout, ["-m", "fastpo", "prepare", config, *settings], work)
    return ["-m", "fastpo", "train", config, *settings]


def measure(
    checkouts: Sequence[Checkout], cases: Sequence[str], rounds: int, work: Path
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every case and checkout, turn by turn; the first turn only warms up."""
    runs: dict[str, list[str]] = {}
    if TRAIN in cases:
        base = build_base(work / "base", recipe=SHORT)
        preferences = write_preferences(work / "preferences", n_pairs=60, seed=0)
        runs = {c.name: training(c, work, base, preferences) for c in checkouts}
    found: dict[tuple[str, str], list[float]] = {}
    quick = [case for case in cases if case in MOMENTARY]
    order = quick * TIMES + [case for case in cases if case not in MOMENTARY]
    for turn in range(rounds + 1):
        for case in order:
            for checkout in checkouts:
                if case == TRAIN:
                    folder = work / checkout.name / "run"
                    shutil.rmtree(folder, ignore_errors=True)
                    words = runs[checkout.name]
                    seconds = until_written(checkout, words, work, folder / "metrics.jsonl")
                else:
                    seconds = whole(checkout, _words(case, checkout), work)
                if turn:
                    found.setdefault((case, checkout.name), []).append(seconds)
        print(f"{turn}/{rounds}", flush=True)
    return found


def _words(case: str, checkout: Checkout) -> list[str]:
    if case in (TORCH, LOSS, UNET):
        return ["-c", case]
    if case == HELP:
        return ["-m", "fastpo", "--help"]
    return ["-m", "fastpo", "plan", str(checkout.root / "fastpo/configs/sdxl-lora-24gb.yaml")]


def rows(found: dict[tuple[str, str], list[float]], about: dict[str, object]) -> list[dict]:
    """A row of every case and checkout; a ratio is the median of the turns' ratios."""
    made = []
    for (case, of), seconds in found.items():
        low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
        numbers = (low, statistics.median(seconds), high)
        ratios = [
            ratio(seconds, found.get((case, "before"))) if of == "now" else "",
            ratio(seconds, found.get((FLOORS[case], of))) if case in FLOORS else "",
        ]
        cells = (case, of, *(round(n, 3) for n in numbers), len(seconds), *ratios)
        made.append(dict(zip(COLUMNS, cells, strict=True)) | about)
    return made


def ratio(seconds: Sequence[float], floor: Sequence[float] | None) -> float | str:
    """The median of the turns' ratios."""
    if floor is None:
        return ""
    return round(statistics.median(a / b for a, b in zip(seconds, floor, strict=True)), 3)


def table(made: Sequence[dict]) -> str:
    """The rows in Markdown."""
    first = made[0]
    lines = [
        "# What starting costs",
        "",
        "Seconds of processor time (user and system) of one process, median (20th to 80th "
        f"percentile) of as many runs by turns as the last column says; before: commit "
        f"{first['before']}. "
        f"{first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}. "
        "On another machine, or beside other work, the ratios count and the seconds do not.",
        "",
        "| command | before | now | now / before | now / what must be imported | runs |",
        "|---|---|---|---|---|---|",
    ]
    by = {(row["case"], row["of"]): row for row in made}
    for case in dict.fromkeys(row["case"] for row in made):
        both = [by[case, of] for of in ("before", "now") if (case, of) in by]
        cells = [f"{r['cpu_s_p50']} ({r['cpu_s_p20']} to {r['cpu_s_p80']})" for r in both]
        cells = ["", *cells] if len(cells) == 1 else cells
        now = both[-1]
        floor = f"{now['times_import']} (`{FLOORS[case]}`)" if case in FLOORS else ""
        cells += [str(now["times_before"]), floor, str(now["runs"])]
        lines.append(f"| `{case}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    every = (TORCH, LOSS, HELP, UNET, PLAN, TRAIN)
    parser.add_argument("--cases", nargs="+", choices=every, default=list(every))
    parser.add_argument("--out", type=Path, help="CSV file; default: results/cpu/start.csv")
    args = parser.parse_args()
    try:
        before = known_checkout(args.before)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as work:
        found = measure([before, Checkout(ROOT, "now")], args.cases, args.rounds, Path(work))
    made = rows(found, {"before": before.commit(), **environment()})
    path = args.out or results_path("start")
    write_records(made, list(made[0]), path)
    write_text(path.with_suffix(".md"), table(made))
    print(table(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
