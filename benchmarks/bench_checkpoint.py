"""What checksums cost: saving a checkpoint with and without them; comparing them on resuming.

    python benchmarks/bench_checkpoint.py [--gigabytes 1] [--runs 9] [--folder DIR]

Both ways of saving are timed turn by turn, in real time, over the same state under AdamW: with all
flushes, and with flushes that do nothing. Real time needs idle cores and an idle disk; the ratio is
that of the median times, and its spread the 20th and 80th percentile of single turns' ratios. The
way without checksums is that of the versions without a manifest, whose optimizer's file has torch's
CRC32 instead, which nothing compared. Verification reads a checkpoint
from the page cache, in CPU time of one core, and from the disk, in real time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.config import parse_config
from fastpo.ledger import PairLedger
from fastpo.system.files import whole_folder
from fastpo.system.manifest import find_damage
from fastpo.train.checkpoint import Origin, save_checkpoint
from fastpo.train.state import TrainingState
from fastpo.train.weights import PolicyWeights

TENSORS = 64
STEP = 7
Call = Callable[[], object]


def make_state(gigabytes: float) -> TrainingState:
    """Weights in float32 and both of AdamW's moments: twelve bytes a weight."""
    size = int(gigabytes * 1e9) // (12 * TENSORS)
    weights = {f"layer.{k}.weight": nn.Parameter(torch.randn(size)) for k in range(TENSORS)}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-5)
    for weight in weights.values():
        moments = {"exp_avg": torch.randn(size), "exp_avg_sq": torch.rand(size)}
        optimizer.state[weight] = {"step": torch.tensor(float(STEP)), **moments}
    return TrainingState(
        trainable=weights,
        weights=PolicyWeights(weights, optimizer, main=True),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0),
        ledger=PairLedger(1000),
        last_minority=torch.zeros(1000),
        averages={},
    )


def make_origin(folder: Path) -> Origin:
    """A configuration; nothing of it is looked for."""
    raw = {
        "model": {"path": "model"},
        "data": {"source": "folder", "path": "data"},
        "prepare": {"cache_dir": "cache"},
        "train": {"output_dir": str(folder), "objective": {"name": "sft"}, "max_steps": STEP},
    }
    return Origin(parse_config(raw), "cache", 1)


def save_without_checksums(run: Path, state: TrainingState, origin: Origin) -> None:
    """Saves as the versions without a manifest did."""
    with whole_folder(run / "checkpoints" / f"step-{STEP:08d}") as folder:
        save_file(state.weights.gather(state.weights.local), folder / "trainable.safetensors")
        rest = {
            "optimizer": state.weights.optimizer_state(),
            "schedule": state.schedule.state_dict(),
            "scaler": None,
        }
        torch.save(rest, folder / "optimizer.pt")
        history = {**state.ledger.state_dict(), "metric": state.last_minority}
        save_file(history, folder / "ledger.safetensors")
        about = {"step": STEP, "cache": origin.cache, "group": 1}
        about["config"] = origin.config.model_dump(mode="json")
        (folder / "state.json").write_text(json.dumps(about, indent=1))


def timed(call: Call, clock: Callable[[], float]) -> float:
    """Seconds that a call takes."""
    began = clock()
    call()
    return clock() - began


def saving_rows(folder: Path, gigabytes: float, runs: int) -> list[dict[str, object]]:
    """Saves in both ways, turn by turn, the first of each not counted."""
    state, origin = make_state(gigabytes), make_origin(folder)
    ways: dict[str, Call] = {
        "without checksums": lambda: save_without_checksums(folder / "old", state, origin),
        "with checksums": lambda: save_checkpoint(folder / "new", STEP, state, origin),
    }
    found = []
    for flushes in ("included", "excluded"):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(runs + 1):
            for way, call in list(ways.items())[:: 1 if turn % 2 else -1]:
                os.sync()
                if flushes == "included":
                    spent = timed(call, time.perf_counter)
                else:
                    with mock.patch("os.fsync"):
                        spent = timed(call, time.perf_counter)
                if turn:
                    seconds[way].append(spent)
        old = seconds[next(iter(ways))]
        for way, times in seconds.items():
            ratio = statistics.median(times) / statistics.median(old)
            spread = np.percentile(np.array(times) / np.array(old), (20, 80)).round(3)
            found.append(row(f"save, flushes {flushes}", way, times, gigabytes, ratio, spread))
    return found


def verifying_rows(folder: Path, gigabytes: float, runs: int) -> list[dict[str, object]]:
    """Compares a checkpoint with its manifest, as resuming does before it loads."""
    checkpoint = folder / "new" / "checkpoints" / f"step-{STEP:08d}"
    assert find_damage(checkpoint) is None
    cached = [timed(lambda: find_damage(checkpoint), time.process_time) for _ in range(runs)]
    disk = [
        timed(lambda: find_damage(checkpoint, from_disk=True), time.perf_counter)
        for _ in range(runs)
    ]
    return [
        row("verify", "from the page cache, CPU time of one core", cached, gigabytes),
        row("verify", "from the disk", disk, gigabytes),
    ]


def row(
    measure: str,
    way: str,
    seconds: list[float],
    gigabytes: float,
    ratio: float | None = None,
    spread: np.ndarray | None = None,
) -> dict[str, object]:
    """One line of the results."""
    middle = statistics.median(seconds)
    return {
        "measure": measure,
        "way": way,
        "seconds": round(middle, 3),
        "gb_per_s": round(gigabytes / middle, 3),
        "ratio": "" if ratio is None else round(ratio, 3),
        "spread": "" if spread is None else f"{spread[0]} to {spread[1]}",
        "gigabytes": gigabytes,
        "runs": len(seconds),
    }


def main() -> None:
    """Measures, prints and writes every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to measure [the system's own]")
    parser.add_argument("--out", type=Path, help="CSV file [results/<device>/checkpoint.csv]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = saving_rows(Path(name), options.gigabytes, options.runs)
        found += verifying_rows(Path(name), options.gigabytes, options.runs)
    where = environment()
    known = {key: where[key] for key in ("device", "torch", "commit", "date") if key in where}
    rows = [{**line, "cores": os.cpu_count(), **known} for line in found]
    for line in rows:
        print("  ".join(str(line[key]) for key in list(line)[:6]))
    write_records(rows, list(rows[0]), options.out or results_path("checkpoint"))


if __name__ == "__main__":
    main()
