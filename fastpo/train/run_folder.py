"""The run's folder: its results, and which of them a new run may replace."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fastpo.config import Config, dump_config
from fastpo.errors import CheckpointError
from fastpo.ledger import PairLedger
from fastpo.system.files import (
    append_text,
    flush,
    make_folder,
    remove,
    sweep,
    write_bytes,
    write_text,
)
from fastpo.system.progress import progress_bar
from fastpo.train.history import RECORD
from fastpo.train.metrics_log import METRICS, kept_metrics

if TYPE_CHECKING:
    from fastpo.data.cache import PairCache

MINORITY = "minority.csv"
RESULTS = (METRICS, "config.yaml", MINORITY, RECORD)
Metrics = dict[str, float]
FOLDERS = ("checkpoints", "final", "ema", "evaluation")


class RunFolder:
    """Where a run keeps its results; only the main process writes.

    Args:
        path: The folder.
        main: Whether this is the main process.
    """

    def __init__(self, path: Path, *, main: bool) -> None:
        self.path = path
        self.main = main

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuses to mix two runs, and to replace what no run has written.

        Raises:
            CheckpointError: The folder holds a run and neither flag was given, or a folder of a
                name that a run would write, without the metrics that every run has.
        """
        foreign = [name for name in FOLDERS if os.path.lexists(self.path / name)]
        if foreign and not (self.path / METRICS).exists():
            raise CheckpointError(
                f"{self.path / foreign[0]} is there, but no {METRICS} of a run that could have "
                "written it, so it would not be replaced: set another train.output_dir"
            )
        if resume or overwrite or not any((self.path / name).exists() for name in RESULTS):
            return
        raise CheckpointError(
            f"{self.path} already holds a run: go on with --resume, replace it with --overwrite, "
            "or set another train.output_dir"
        )

    def clear(self) -> None:
        """Removes an earlier run's results, and nothing else that lies in the folder."""
        if not self.main:
            return
        for name in ("tensorboard", "fastpo"):
            _remove_events(self.path / name)
        for name in (*FOLDERS, *RESULTS):
            remove(self.path / name)

    def sweep(self) -> None:
        """Makes the folder, or tidies up what a killed process left there."""
        if not self.main:
            return
        make_folder(self.path)
        for folder in (self.path, self.path / "checkpoints"):
            sweep(folder, sole_writer=True)

    def has_results(self, exports: Iterable[str]) -> bool:
        """Whether all that a run writes at its end is there.

        Args:
            exports: The folders of exported weights.
        """
        return all((self.path / name).exists() for name in (*exports, MINORITY))

    def begin(self, config: Config, start: int) -> None:
        """Saves the resolved configuration and drops what steps that come will write anew."""
        if not self.main:
            return
        remove(self.path / MINORITY)
        write_text(self.path / "config.yaml", dump_config(config))
        path = self.path / METRICS
        write_bytes(path, kept_metrics(path, start))

    def log(self, metrics: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if self.main:
            # JSON has no infinity; an fp16 gradient norm may be one.
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            append_text(self.path / METRICS, json.dumps(finite) + "\n")

    def flush(self) -> None:
        """Waits until the disk holds the metrics; a checkpoint goes on from lines that last."""
        if self.main:
            flush(self.path / METRICS)

    def write_minority(self, cache: PairCache, ledger: PairLedger, metric: Tensor) -> None:
        """Writes what the run found out about every pair, its last result, for the report."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = ("visits", "ledger_mean", "ledger_minority", "metric_minority")
        writer.writerow(("pair_id", "flipped", *names))
        columns = (cache.flipped.int(), ledger.visits, ledger.mean(), ledger.minority(), metric)
        for pair_id, *values in zip(cache.pair_ids, *(c.tolist() for c in columns), strict=True):
            writer.writerow([pair_id, *("" if v != v else v for v in values)])
        write_text(self.path / MINORITY, text.getvalue())


def _remove_events(folder: Path) -> None:
    """Removes what a tracker wrote into a folder, and the folders that are then empty.

    Trackers name their folder after the project: beside a checkout it is the package's own.
    """
    if folder.is_symlink():
        return
    for pattern in ("events.out.tfevents.*", "hparams.yml"):
        for file in sorted(folder.rglob(pattern)):
            remove(file)
    inner = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for empty in (*inner, folder):
        with suppress(OSError):
            empty.rmdir()


@contextmanager
def step_progress(total: int, start: int, *, show: bool) -> Iterator[Callable[[Metrics], None]]:
    """Shows steps, loss, accuracy, rate and time left; gives a function to call after each step."""
    recent: list[float] = []

    def after_step(metrics: Metrics) -> None:
        recent.append(metrics["pairs_per_second"])
        del recent[:-20]
        advance(
            note=f"loss {metrics['loss']:.4f} · accuracy {metrics['rewards/accuracies']:.2f} · "
            f"{np.median(recent):.1f} pairs/s"
        )

    with progress_bar("train", total, done=start, show=show) as advance:
        yield after_step
