"""Who finds the wrong labels, what that saves of the gain, and what it costs a step.

    python -m fastpo.study.ledger --work FOLDER [--seeds 0 1] [--flips 0.2 0.4] [--parts ...]

The demo's digits through the real trainer, in small: 700 rows of preferences (a quarter of them
ties), four epochs, batches of 16. A finished run is in the CSV and is not repeated. The votes of
plain DPO's runs are kept in FOLDER; `fastpo/study/replay.py` replays them on other scales.
`--short` tries every line in a minute; the numbers then mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.config import Config, flatten, parse_config, with_keys
from fastpo.data.prepare import prepare
from fastpo.demo.base import SHORT as SHORT_BASE
from fastpo.demo.base import build_base
from fastpo.demo.preferences import write_preferences
from fastpo.demo.run import LEDGER, RELEASED, demo_config
from fastpo.evaluate import evaluate
from fastpo.models.folder import ModelFolder
from fastpo.study.digits import Digits, Labels
from fastpo.study.measure import area, minority_columns
from fastpo.train import Observer, train
from fastpo.train.data import setup_data
from fastpo.train.distributed import Processes, setup_accelerator
from fastpo.train.metrics import StepResult, StepTable
from fastpo.train.trainer import setup_trainer

ROWS, ROWS_SHORT = 700, 60
SOFT = with_keys(LEDGER, {"objective.weight_kind": "linear"})
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "moving averages": RELEASED,
    "ledger, soft": SOFT,
    "ledger, gate": LEDGER,
}
VARIANTS: dict[str, tuple[float, dict[str, Any]]] = {  # flipped labels, changes
    "dpo, batch 32": (0.2, {"epochs": 6, "micro_batch_size": 32}),
    "dpo, batch 32, 40 %": (0.4, {"epochs": 6, "micro_batch_size": 32}),
    "dpo, batch 4": (0.2, {"epochs": 3, "micro_batch_size": 4, "optim": {"lr": 2e-5}}),
    "dpo, batch 1": (0.2, {"epochs": 2, "micro_batch_size": 1, "optim": {"lr": 1e-5}}),
    "dpo, LoRA": (
        0.2,
        {"epochs": 4, "micro_batch_size": 32, "method": "lora", "optim": {"lr": 1e-3}},
    ),
}
SMALL = {
    "train": {"epochs": 4, "micro_batch_size": 16},
    "evaluate": {"seeds_per_prompt": 2, "batch_size": 80},
}
FIELDS = (
    "part", "case", "method", "flip_rate", "seed", "pairs", "wrong", "auroc", "worst", "gain",
    "kept", "step_ratio", "device", "threads", "torch", "commit", "date",
)  # fmt: skip
PARTS = ("methods", "cost", "cases", "variants")


@dataclass(frozen=True)
class Place:
    """The base, the folder of all runs, and how many rows of preferences a run has."""

    base: Path
    root: Path
    rows: int
    short: bool

    def work(self, name: str, *, seed: int, times: int = 1) -> Path:
        """A run's folder with its preferences, written if they are not there."""
        work = self.root / name
        if not (work / "preferences").is_dir():
            write_preferences(work / "preferences", n_pairs=times * self.rows, seed=seed)
        return work

    def configure(
        self, work: Path, name: str, train: Mapping[str, Any], *, flip_rate: float, seed: int
    ) -> Config:
        """One run's configuration, the demo's in small; its cache is prepared."""
        paths = {"base": self.base, "preferences": work / "preferences", "work": work}
        raw = demo_config("dpo", paths, seed=seed, short=self.short).model_dump(mode="json")
        train = dict(train)
        if "objective" in train:  # another objective has other options; the slope stays
            beta = raw["train"].pop("objective")["beta"]
            train["objective"] = {"beta": beta, **train["objective"]}
        if self.short:
            train |= {"epochs": None, "max_steps": 4}
        out = work / f"{name}-{flip_rate}".replace(" ", "").replace(",", "-")
        changes = {"data": {"flip_rate": flip_rate}, "train": {"output_dir": str(out), **train}}
        small = SMALL if not self.short else {"train": {"micro_batch_size": 16}}
        config = parse_config(with_keys(raw, flatten(small) | flatten(changes)))
        prepare(config, progress=False)
        return config


CASES: dict[str, tuple[Labels, float]] = {  # labels of the world, flipped on top
    "Bradley-Terry": ("bradley_terry", 0.0),
    "two tastes, 70/30": ("two_tastes", 0.0),
    "subtle, 20 % flipped": ("subtle", 0.2),
}


class VoteRecorder(Observer):
    """Keeps every vote of a run.

    Attributes:
        votes: For each step `(N, 4)` float64: step from 0, pair, timestep, margin.
    """

    def __init__(self) -> None:
        self.votes: list[np.ndarray] = []

    def on_step(self, step: int, table: StepTable, metrics: Mapping[str, float]) -> None:
        """Notes the step's votes."""
        number = torch.full((len(table.rows),), float(step - 1), dtype=torch.float64)
        columns = (number, table["index"], table["timestep"], table.votes)
        self.votes.append(torch.stack(columns, dim=1).numpy())


def keep(path: Path, votes: list[np.ndarray], flipped: np.ndarray) -> None:
    """Writes a run's votes for `fastpo/study/replay.py`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, votes=np.concatenate(votes), flipped=flipped)


class Results:
    """The CSV, written after every run."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.about = path, [], environment()
        if path.is_file():
            with path.open() as file:
                self.rows = list(csv.DictReader(file))

    def has(self, **labels: object) -> bool:
        """Whether a row with these labels is there."""
        return any(all(row[k] == str(v) for k, v in labels.items()) for row in self.rows)

    def find(self, key: str, **labels: object) -> float:
        """Returns one number of the row with these labels."""
        for row in self.rows:
            if all(row[k] == str(v) for k, v in labels.items()):
                return float(row[key])
        raise KeyError(labels)

    def add(self, **values: object) -> None:
        """Appends a row and writes the file whole."""
        about = self.about
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        row = {f: str(rounded.get(f, about.get(f, ""))) for f in FIELDS}
        self.rows.append(row)
        write_records(self.rows, FIELDS, self.path)


def run_methods(
    place: Place, flips: list[float], seeds: list[int], methods: list[str], results: Results
) -> None:
    """Every method at every rate and seed; plain DPO on clean labels is what could be had."""
    for seed in seeds:
        for method, rate in [("dpo", 0.0), *((m, rate) for rate in flips for m in methods)]:
            labels = {"part": "methods", "method": method, "flip_rate": rate, "seed": seed}
            if results.has(**labels):
                continue
            work = place.work(f"seed-{seed}", seed=seed)
            config = place.configure(work, method, METHODS[method], flip_rate=rate, seed=seed)
            recorder = VoteRecorder()
            run = train(config, overwrite=True, progress=False, observers=[recorder])
            evaluation = evaluate(config, base_samples=work / "base-samples")
            gain = evaluation.metrics["ink_reward"].gain
            clean = gain
            if rate:
                clean = results.find("gain", part="methods", flip_rate=0.0, seed=seed)
            ids, flipped, metrics = minority_columns(run)
            if rate and method == "dpo":
                keep(place.root / "votes" / f"dpo-{rate}-{seed}.npz", recorder.votes, flipped)
            annotators = "ema" if method == "moving averages" else "ledger"
            results.add(
                **labels,
                case="digits",
                pairs=len(ids),
                wrong=float(flipped.mean()),
                auroc=area(flipped, metrics[annotators]) if rate else "",
                gain=gain,
                kept=gain / clean if clean else math.nan,
            )


def run_variants(place: Place, seed: int) -> None:
    """Plain DPO on twice as many pairs, in other ways of training: votes alone, for the scales."""
    for name, (rate, changes) in VARIANTS.items():
        path = place.root / "votes" / f"{name}-{rate}-{seed}.npz"
        if path.is_file():
            continue
        work = place.work(f"variants-{seed}", seed=seed, times=2)
        config = place.configure(work, name, changes, flip_rate=rate, seed=seed)
        recorder = VoteRecorder()
        run = train(config, overwrite=True, progress=False, observers=[recorder])
        keep(path, recorder.votes, minority_columns(run)[1])


def run_cases(place: Place, seed: int, results: Results) -> None:
    """Errors that are not coin flips, under the gate's ledger."""
    for number, (case, (kind, rate)) in enumerate(CASES.items()):
        labels = {"part": "cases", "case": case, "method": "ledger, gate", "seed": seed}
        if results.has(**labels):
            continue
        work, world = place.root / f"case-{number}-{seed}", Digits(labels=kind, rows=place.rows)
        found = world.write_preferences(
            work / "preferences", base=place.base, seed=seed, short=place.short
        )
        config = place.configure(work, "gate", LEDGER, flip_rate=rate, seed=seed)
        run = train(config, overwrite=True, progress=False)
        ids, flipped, metrics = minority_columns(run)
        wrong = flipped | np.isin(ids, list(found))
        results.add(
            **labels,
            pairs=len(ids),
            wrong=float(wrong.mean()),
            auroc=area(wrong, metrics["ledger"]),
        )


def step_costs(place: Place, results: Results) -> None:
    """Micro-batches of each method beside the policy's bare forward and backward, interleaved."""
    if results.has(part="cost"):
        return
    calls = {}
    work = place.work("seed-0", seed=0)
    for method in METHODS:
        config = place.configure(work, method, METHODS[method], flip_rate=0.2, seed=0)
        model = ModelFolder.resolve(config.model)
        processes = Processes(setup_accelerator(config.train), config.train)
        data = setup_data(config, model, processes)
        trainer = setup_trainer(config, model, data, processes)
        batch = data.cache.read(list(range(16)), visit=0)
        for step in range(2):  # before the weights have moved no annotator runs
            trainer.optimizer_step(itertools.repeat(batch), step)
        calls[method] = _step_of(trainer, batch)
        if method == "dpo":
            calls["bare"] = _bare(trainer, batch)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(12), "step cost"):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    bare = np.array(seconds.pop("bare")[2:])
    for method, spent in seconds.items():
        ratio = float(np.median(np.array(spent[2:]) / bare))
        results.add(part="cost", case="digits", method=method, pairs=16, step_ratio=ratio)


def _step_of(trainer, batch) -> Callable[[], None]:
    """One micro-batch and its entry into the ledger, without the optimizer."""

    def call() -> None:
        loss, rows = trainer.training_step(batch, step=10)
        loss.backward()
        trainer.record(StepResult(rows, 0.0, 0.0, moved=True).read())

    return call


def _bare(trainer, batch) -> Callable[[], None]:
    """Plain fine-tuning on cached latents: noise, policy, squared error, backward."""

    def call() -> None:
        noised = trainer.noise.noised_pair(batch)
        answer = trainer.denoisers.predict(trainer.policy, noised, batch.conditions)
        (answer - noised.target).square().mean().backward()

    return call


def main() -> None:
    """Runs what the CSV lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for base, data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--flips", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--short", action="store_true", help="try every step, measure nothing")
    parser.add_argument(
        "--out",
        type=Path,
        help="CSV file; default: results/<device>/ledger.csv, with --short WORK/short/ledger.csv",
    )
    options = parser.parse_args()
    short = options.short
    root = options.work / "short" if short else options.work
    results = Results(options.out or (root / "ledger.csv" if short else results_path("ledger")))
    base = build_base(root / "base", recipe=SHORT_BASE if short else None)
    place = Place(base, root, ROWS_SHORT if short else ROWS, short)
    if "methods" in options.parts:
        run_methods(place, options.flips, options.seeds, options.methods, results)
    if "cost" in options.parts:
        step_costs(place, results)
    if "cases" in options.parts:
        run_cases(place, 0, results)
    if "variants" in options.parts:
        run_variants(place, 0)


if __name__ == "__main__":
    main()
