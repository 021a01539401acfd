"""What a gain costs: whole runs of the demo, of this checkout and of another one.

    python benchmarks/bench_run.py --before CHECKOUT [--seeds 0 1 2] [--out FILE.csv]
        [--work FOLDER]

CHECKOUT is a folder with another commit of this project. Its run of `fastpo demo` with the ledger
and the gate, one label in five flipped, six epochs, gives the gain in reward to be reached. This
checkout's runs, on the same base and pairs, save a checkpoint after each epoch, whose images are
scored alike; between two of them the gain is taken to grow evenly. User and system seconds of the
processor are counted, from a process's launch, on one thread; all runs of a seed follow one
another. With `--work` what has been trained there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from checkouts import Checkout, known_checkout, used_seconds, whole
from numpy.typing import NDArray

from fastpo.bench.measure import ROOT, environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.config import Config, flatten, with_keys
from fastpo.demo.base import build_base
from fastpo.demo.preferences import write_preferences
from fastpo.demo.run import LEDGER, N_PAIRS, demo_config
from fastpo.evaluate import evaluate
from fastpo.report import load_metrics
from fastpo.system.files import write_json, write_text
from fastpo.train.checkpoint_folders import checkpoint_folder
from fastpo.train.consolidate import exported

EPOCHS, LONGER = 6, 10  # of the demo, and at most of ours
STEPS = 33  # an epoch of the demo's pairs, in batches of 32
REWARD = "ink_reward"
COLUMNS = ("run", "seed", "epoch", "gain", "cpu_s", "reference_cpu_s", "passes", "peak_mib")
SETTINGS = {k: v for k, v in flatten({"train": LEDGER}).items() if k != "train.backward"}


@dataclass(frozen=True)
class Kind:
    """A way to run the demo.

    Attributes:
        name: In the table.
        keys: Its own.
        epochs: How many it runs.
        looked_at: The epochs whose images are scored.
    """

    name: str
    keys: dict[str, Any]
    epochs: int = EPOCHS
    looked_at: tuple[int, ...] = ()


BEFORE = Kind("before", {}, looked_at=(EPOCHS,))
LATE = tuple(range(4, LONGER + 1))
SAMPLED = {"train.backward": "sampled", "train.backward_threshold": 0.5}
OURS = (
    Kind("all", {}, looked_at=(EPOCHS,)),
    Kind("alive", {"train.backward": "alive"}, looked_at=LATE[: EPOCHS - 3]),
    Kind("sampled, threshold 0.5", SAMPLED, LONGER, LATE),
    Kind("sampled, threshold 0.25", {**SAMPLED, "train.backward_threshold": 0.25}, LONGER, LATE),
    Kind(
        "sampled, threshold 0.5, cached reference",
        {**SAMPLED, "train.reference": "cached"},
        LONGER,
        LATE,
    ),
)


@dataclass
class Watch:
    """Notes what a process has used of the processor when a file appears, and its most memory."""

    files: dict[int, Path]
    used: dict[int, float]
    peak: int = 0  # MiB

    def __call__(self, pid: int) -> None:
        """One look, fifty times a second."""
        time.sleep(0.02)
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            now = used_seconds(pid)
        except OSError:  # it has just ended
            return
        for key, path in self.files.items():
            if key not in self.used and path.exists():
                self.used[key] = now
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                self.peak = int(line.split()[1]) // 1024


@dataclass(frozen=True)
class Bench:
    """Where the runs of one seed are, and what they share."""

    work: Path
    base: Path
    seed: int

    @property
    def folder(self) -> Path:
        """Of this seed."""
        return self.work / f"seed-{self.seed}"

    def config(self, kind: Kind) -> Config:
        """The demo's, with its images sampled as the demo samples them."""
        paths = {"base": self.base, "preferences": self.folder / "preferences", "work": self.folder}
        config = demo_config("dpo", paths, seed=self.seed, short=False)
        train = config.train.model_copy(update={"output_dir": self.folder / kind.name})
        return config.model_copy(update={"train": train})

    def file(self, kind: Kind, checkout: Checkout) -> Path:
        """Writes the configuration in the words that both checkouts know."""
        raw = yaml.safe_load((checkout.root / "fastpo/configs/demo.yaml").read_text())
        cache = "cache-before" if kind is BEFORE else "cache"
        keys = {
            "seed": self.seed,
            "model.path": str(self.base),
            "data.path": str(self.folder / "preferences"),
            "data.flip_seed": self.seed,
            "prepare.cache_dir": str(self.folder / cache),
            "train.output_dir": str(self.folder / kind.name),
            "train.epochs": kind.epochs,
            **SETTINGS,
            **kind.keys,
        }
        path = self.folder / f"{kind.name}.yaml"
        write_text(path, yaml.safe_dump(with_keys(raw, keys), sort_keys=False))
        return path


def run(bench: Bench, kind: Kind, checkout: Checkout) -> list[dict[str, Any]]:
    """Prepares, trains and scores; one row for each epoch looked at."""
    noted = bench.folder / f"{kind.name}.json"
    if noted.is_file():
        return json.loads(noted.read_text())
    file, folder = bench.file(kind, checkout), bench.folder / kind.name
    whole(checkout, ["-m", "fastpo", "prepare", str(file)], bench.folder)
    reference: float | str = ""
    if kind.keys.get("train.reference") == "cached":
        words = ["-m", "fastpo", "prepare", str(file), "--reference", str(kind.epochs)]
        reference = round(whole(checkout, words, bench.folder), 2)
    watch, words = Watch({}, {}), ["-m", "fastpo", "train", str(file), "--overwrite"]
    if len(kind.looked_at) > 1:
        watch.files = {epoch: checkpoint_folder(folder, epoch * STEPS) for epoch in kind.looked_at}
        words += ["--set", f"train.checkpoint_every={STEPS}"]
        words += ["--set", f"train.keep_checkpoints={kind.epochs}"]
    seconds = whole(checkout, words, bench.folder, watch)
    epochs, passes = np.array(load_metrics(folder)["epoch"]), cumulative_passes(folder, kind)
    rows = []
    for epoch in kind.looked_at:
        last = epoch == kind.epochs
        weights = folder / "final" if last else checkpoint_folder(folder, epoch * STEPS)
        spent = seconds if last else watch.used[epoch]
        done = float(np.interp(epoch, epochs, passes))
        score = gain(bench, kind, weights)
        cells = (kind.name, bench.seed, epoch, round(score, 5), round(spent, 2), reference)
        rows.append(dict(zip(COLUMNS, (*cells, round(done, 2), watch.peak), strict=True)))
        print(*rows[-1].values(), flush=True)
    write_json(noted, rows)
    return rows


def cumulative_passes(folder: Path, kind: Kind) -> NDArray[np.float64]:
    """Passes of the denoiser a pair up to each step: forward 1, backward 2, live reference 1."""
    metrics = load_metrics(folder)
    live = kind.keys.get("train.reference") != "cached"
    cost = metrics.get("backward/cost", np.full(len(metrics["step"]), 3.0)) + live
    return np.cumsum(cost) / STEPS


def gain(bench: Bench, kind: Kind, weights: Path) -> float:
    """Reward over the base's of the same held-out prompts and seeds, as the demo measures it."""
    shared = bench.folder / "base-samples"
    config = bench.config(kind)
    with exported(config.train.output_dir, weights) as (folder, step):
        found = evaluate(config, aligned=folder, base_samples=shared, step=step, progress=False)
    return found.metrics[REWARD].gain


def reached(rows: Sequence[dict[str, Any]], goal: float, column: str) -> float | None:
    """What a run has spent when it first reaches a gain; None: it does not."""
    for before, after in zip([None, *rows], rows, strict=False):
        if after["gain"] >= goal:
            if before is None:
                return after[column]
            share = (goal - before["gain"]) / (after["gain"] - before["gain"])
            return before[column] + share * (after[column] - before[column])
    return None


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown: of each kind of run, what the gain of `before` cost."""
    lines = [
        "# What a gain costs",
        "",
        f"`fastpo demo`'s run with the ledger and the gate, one label in five flipped; seeds "
        f"{', '.join(map(str, sorted({r['seed'] for r in rows})))}. Goal: the gain of commit "
        f"{rows[0]['before']} after {EPOCHS} epochs. Processor seconds from a process's launch and "
        f"passes of the denoiser a pair (forward 1, backward 2, live reference 1), each divided by "
        f"those of the same seed's `before`, mean (least to most). {rows[0]['device']}, torch "
        f"{rows[0]['torch']}, commit {rows[0]['commit']}, {rows[0]['date']}.",
        "",
        "| run | reaches the goal | time | with the reference's preparation | passes | gain at the "
        "time of `before`, before = 1 | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    seeds = sorted({row["seed"] for row in rows})
    for name in dict.fromkeys(row["run"] for row in rows):
        cells: dict[str, list[float]] = {}
        for seed in seeds:
            ours = [row for row in rows if row["run"] == name and row["seed"] == seed]
            base = next(row for row in rows if row["run"] == BEFORE.name and row["seed"] == seed)
            for key, value in compared(ours, base).items():
                cells.setdefault(key, []).append(value)
        texts = [spread(cells.get(k, [])) for k in ("time", "all", "passes", "gain", "peak")]
        lines.append(
            f"| {name} | {len(cells.get('time', []))} of {len(seeds)} | {' | '.join(texts)} |"
        )
    return "\n".join(lines) + "\n"


def compared(ours: Sequence[dict[str, Any]], base: dict[str, Any]) -> dict[str, float]:
    """The quotients of one run and the other checkout's of the same seed."""
    found = {"peak": ours[-1]["peak_mib"] / base["peak_mib"]}
    time_taken = reached(ours, base["gain"], "cpu_s")
    passes = reached(ours, base["gain"], "passes")
    if time_taken is not None and passes is not None:
        extra = float(ours[-1]["reference_cpu_s"] or 0.0)
        found["time"] = time_taken / base["cpu_s"]
        found["all"] = (time_taken + extra) / base["cpu_s"]
        found["passes"] = passes / base["passes"]
    spent = [row["cpu_s"] for row in ours]
    if spent[0] <= base["cpu_s"] <= spent[-1] or len(ours) == 1:
        at = float(np.interp(base["cpu_s"], spent, [row["gain"] for row in ours]))
        found["gain"] = at / base["gain"]
    return found


def spread(values: Sequence[float]) -> str:
    """Mean (least to most), of as many seeds as there are."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(before: Checkout, seeds: Sequence[int], work: Path) -> list[dict[str, Any]]:
    """All runs, one after another, seed by seed."""
    base = build_base(work / "base")
    now, rows = Checkout(ROOT, "now"), []
    for seed in seeds:
        bench = Bench(work, base, seed)
        if not (bench.folder / "preferences").exists():
            write_preferences(bench.folder / "preferences", n_pairs=N_PAIRS, seed=seed)
        for kind in (BEFORE, *OURS):
            rows += run(bench, kind, before if kind is BEFORE else now)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="CSV file; default: results/cpu/run.csv")
    parser.add_argument("--work", type=Path, help="where to train; default: a temporary folder")
    args = parser.parse_args()
    try:
        before = known_checkout(args.before)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(before, args.seeds, args.work or Path(temporary))
    about = {"before": before.commit(), **environment()}
    made = [row | about for row in found]
    path = args.out or results_path("run")
    write_records(made, list(made[0]), path)
    write_text(path.with_suffix(".md"), summary(made))
    print(summary(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
