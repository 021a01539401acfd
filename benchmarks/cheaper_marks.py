"""What the tables say of the marks for sparse steps, the losses on a CPU, and starting.

    python benchmarks/cheaper_marks.py [--results benchmarks/results/cpu]
        [--readme benchmarks/README.md] [--page docs/sparse-steps.md]

Reads `step_sparse.csv`, `run.csv`, `pair_loss.csv` and `start.csv`, and rewrites the text between
`<!-- cheaper-marks:begin -->` and `<!-- cheaper-marks:end -->`; on the page what whole runs gave,
between `<!-- whole-runs:begin -->` and its end.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_run import BEFORE, EPOCHS, compared, spread
from bench_start import HELP, LOSS, PLAN, TORCH, TRAIN

from fastpo.bench.measure import ROOT
from fastpo.bench.script import results_path
from fastpo.bench.table import read_csv, with_section
from fastpo.system.files import write_text

README = Path(__file__).with_name("README.md")
PAGE = ROOT / "docs" / "sparse-steps.md"
LEDGER = "FastPO Adaptive-DPO, ledger, cached reference"
HALVES = ("bf16", "fp16")
Row = dict[str, str]
Mark = tuple[str, str, str, bool]
"""What is measured, the mark, what was found, and whether that meets it."""


def read(path: Path) -> list[Row]:
    """A CSV's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_steps(rows: Sequence[Row]) -> Iterator[Mark]:
    """One step of the mid-size model, one pair in five behind a closed gate."""
    found = {row["provider"]: row for row in rows}
    alive = found[f"{LEDGER}, alive"]
    low, middle, high = (alive[f"times_floor{end}"] for end in ("_p20", "", "_p80"))
    yield (
        "a step, `alive`, over the bare policy",
        "at most 0.85",
        f"{middle} ({low} to {high}, {alive['rounds']} rounds)",
        float(middle) <= 0.85,
    )
    for name, row in found.items():
        if name.startswith(f"{LEDGER}, "):
            peak, plain = row["peak_mib"], found[LEDGER]["peak_mib"]
            kind = name.removeprefix(f"{LEDGER}, ")
            yield (
                f"peak memory, {kind}",
                f"at most that of `all`, {plain} MiB",
                f"{peak} MiB",
                float(peak) <= float(plain),
            )


def of_runs(rows: Sequence[Row]) -> Iterator[Mark]:
    """Whole runs of the demo, over those of an earlier commit."""
    made = numbered(rows)
    for name in dict.fromkeys(row["run"] for row in made):
        if name == BEFORE.name:
            continue
        each = []
        for seed in dict.fromkeys(row["seed"] for row in made):
            ours = [row for row in made if (row["run"], row["seed"]) == (name, seed)]
            base = next(r for r in made if (r["run"], r["seed"]) == (BEFORE.name, seed))
            each.append(compared(ours, base))
        for key, what, mark, meets in RUNS:
            values = [one[key] for one in each if key in one]
            lacking = "" if len(values) == len(each) else f"; {len(values)} of {len(each)} seeds"
            met = len(values) == len(each) and meets(sum(values) / len(values))
            yield f"{what}, {name}", mark, f"{spread(values)}{lacking}" or "not reached", met


def numbered(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of whole runs with numbers where there are some."""
    words = ("run", "commit", "before", "device", "date")
    return [{k: v if k in words else _number(v) for k, v in row.items()} for row in rows]


def runs_table(rows: Sequence[Row]) -> str:
    """What each way of training gave after the demo's epochs, and at its end, in Markdown."""
    made = numbered(rows)
    seeds = sorted({int(row["seed"]) for row in made})
    lines = [
        f"Seeds {', '.join(map(str, seeds))}: mean (least to most). Commits {rows[0]['before']} "
        f"(before) and {rows[0]['commit']}, {rows[0]['date']}; {rows[0]['device']}, one thread.",
        "",
        "| `train.backward` | epochs | gain in reward | passes a pair | time, `before` = 1 |",
        "|---|---|---|---|---|",
    ]
    spent = {row["seed"]: row["cpu_s"] for row in made if row["run"] == BEFORE.name}
    for name in dict.fromkeys(row["run"] for row in made):
        found = [row for row in made if row["run"] == name]
        for epoch in dict.fromkeys((EPOCHS, int(max(row["epoch"] for row in found)))):
            at = [row for row in found if row["epoch"] == epoch]
            gains = [row["gain"] for row in at]
            gain = f"{statistics.mean(gains):.4f} ({min(gains):.4f} to {max(gains):.4f})"
            passes = f"{statistics.mean(row['passes'] for row in at):.1f}"
            time = spread([row["cpu_s"] / spent[row["seed"]] for row in at])
            lines.append(f"| {name} | {epoch} | {gain} | {passes} | {time} |")
    return "\n".join(lines)


RUNS: tuple[tuple[str, str, str, Callable[[float], bool]], ...] = (
    ("time", "time to the gain of the earlier commit", "at most 0.6", lambda found: found <= 0.6),
    ("gain", "gain in that commit's time", "at least 1.15", lambda found: found >= 1.15),
)


def of_losses(rows: Sequence[Row]) -> Iterator[Mark]:
    """Every case of the losses on a CPU."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["ms_p50"]:
            key = tuple(row[k] for k in ("case", "latents", "pairs", "dtype", "direction"))
            cases.setdefault(key, {})[row["provider"]] = row
    for other in ("compile", "eager"):
        pairs = [(ours["ours"], ours[other]) for ours in cases.values() if other in ours]
        ratios = [float(theirs["ms_p50"]) / float(ours["ms_p50"]) for ours, theirs in pairs]
        yield _all(f"a loss, speed over `{other}`", ratios, 1.0)
    halves = [
        float(c["compile"]["ms_p50"]) / float(c["ours"]["ms_p50"])
        for (_, latents, pairs, dtype, _), c in cases.items()
        if dtype in HALVES and "compile" in c and (latents == "video" or int(pairs) >= 16)
    ]
    yield _all("half precision, from 16 SD1.5 pairs on, over `compile`", halves, 1.5)
    large = [
        float(c["ours"]["share_of_copy"])
        for (_, latents, pairs, _, _), c in cases.items()
        if latents != "sd15" and (latents == "video" or int(pairs) >= 16)
    ]
    yield _all("from 16 SDXL pairs on, share of the copy bandwidth", large, 0.8)


def _all(what: str, values: Sequence[float], least: float) -> Mark:
    below = sum(value < least for value in values)
    found = f"{min(values):.2f} to {max(values):.2f}, {below} of {len(values)} rows below"
    return what, f"at least {least:g} on each", found, not below


def of_starting(rows: Sequence[Row]) -> Iterator[Mark]:
    """Processor time of whole commands."""
    now = {row["case"]: row for row in rows if row["of"] == "now"}
    loss, helps = now[LOSS]["times_import"], now[HELP]["cpu_s_p50"]
    yield f"`{LOSS}` over `{TORCH}`", "at most 1.05", loss, float(loss) <= 1.05
    yield f"`{HELP}`", "under 0.4 s", f"{helps} s", float(helps) < 0.4
    for case, most in ((PLAN, 0.5), (TRAIN, 0.6)):
        found = now[case]["times_before"]
        yield f"`{case}`, over the earlier commit", f"at most {most}", found, float(found) <= most


SOURCES: tuple[tuple[str, Callable[[Sequence[Row]], Iterator[Mark]]], ...] = (
    ("step_sparse", of_steps),
    ("run", of_runs),
    ("pair_loss", of_losses),
    ("start", of_starting),
)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def table(folder: Path) -> str:
    """All marks in Markdown, and where they were measured."""
    lines = ["| measured | mark | found | | table |", "|---|---|---|---|---|"]
    about = []
    for name, marks in SOURCES:
        path = folder / f"{name}.csv"
        rows = read_csv(path) if name == "pair_loss" else read(path)
        about.append(f"`{name}`: commit {', '.join(dict.fromkeys(r['commit'] for r in rows))}")
        about[-1] += f", {rows[0]['date']}"
        for what, mark, found, met in marks(rows):
            verdict = "met" if met else "not met"
            lines.append(f"| {what} | {mark} | {found} | {verdict} | `{name}.csv` |")
    where = f"{rows[0]['device']}, one thread, torch {rows[0]['torch']}; {'; '.join(about)}."
    return f"{where}\n\n" + "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results_path("run").parent)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    try:
        text = with_section(args.readme.read_text("utf-8"), "cheaper-marks", table(args.results))
        runs = runs_table(read(args.results / "run.csv"))
        page = with_section(args.page.read_text("utf-8"), "whole-runs", runs)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 2
    write_text(args.readme, text)
    write_text(args.page, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
