"""The run's folder: its results, and which of them a new run may replace."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpo.config import Config, dump_config
from fastpo.errors import CheckpointError, FastPOError
from fastpo.system.files import append_text, flush, make_folder, sweep, write_bytes, write_text
from fastpo.system.json_text import finite
from fastpo.system.ownership import MARKER, claim, remove_file, write_marker
from fastpo.system.progress import progress_bar
from fastpo.system.writer_lock import WriterLock, sole_writer
from fastpo.train import takeover
from fastpo.train.metrics_log import METRICS, kept_metrics
from fastpo.train.rounds import about_labels
from fastpo.train.takeover import CONFIG, EVENTS, MINORITY, RUN
from fastpo.train.votes_log import VOTES, VotesLog

if TYPE_CHECKING:
    from fastpo.data.cache import PairCache
    from fastpo.train.distributed import Processes
    from fastpo.train.metrics import StepTable
    from fastpo.train.state import TrainingState

Metrics = dict[str, float]


class RunFolder:
    """Where a run keeps its results; only the main process writes.

    Args:
        path: The folder.
        main: Whether this is the main process.
    """

    def __init__(self, path: Path, *, main: bool) -> None:
        self.path = path
        self.main = main
        self.votes = VotesLog(path / VOTES)
        self._lock: WriterLock | None = None

    @contextmanager
    def taken(
        self, config: Config, processes: Processes, *, resume: bool, overwrite: bool
    ) -> Iterator[None]:
        """Takes the folder for a run; called by all processes, of which the main one looks.

        A run that was moved aside, by this call or by one that was killed, is put back unless the
        new one has begun.

        Raises:
            BusyFolderError: Another process writes there.
            CheckpointError: The folder holds a run and neither flag was given, or cannot be
                written.
            ForeignPathError: What the run would replace is not proven to be a run's.
        """
        with ExitStack() as stack:

            def look() -> None:
                self._lock = stack.enter_context(sole_writer(self.path))
                takeover.put_back(self.path)
                takeover.check_folder(self.path, config, resume=resume, overwrite=overwrite)

            self._on_main(processes, look)
            try:
                yield
            finally:
                if self.main:
                    takeover.put_back(self.path)

    def _on_main(self, processes: Processes, act: Callable[[], None]) -> None:
        """Does something in the main process; its refusal ends all of them."""
        refusal: FastPOError | None = None
        if self.main:
            try:
                act()
            except FastPOError as error:
                refusal = error
            except OSError as error:
                refusal = CheckpointError(f"train.output_dir {self.path} cannot be used: {error}")
        if not processes.agree(refusal is None):
            raise refusal or CheckpointError(
                f"the main process does not take {self.path}; its own message says why"
            )

    def set_aside(self) -> None:
        """Moves an earlier run aside, until `begun` or to the end of `taken`."""
        if self.main:
            takeover.set_aside(self.path)

    def begun(self) -> None:
        """Notes that this run has done a step: what was moved aside is removed."""
        if self.main:
            takeover.drop_aside(self.path)

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
        if not (self.path / MARKER).exists():
            write_marker(self.path, RUN)
        if "tensorboard" in config.train.trackers:
            claim(self.path / "tensorboard", EVENTS)
        remove_file(self.path / MINORITY, RUN)
        if takeover.may_write_config(self.path):
            write_text(self.path / CONFIG, dump_config(config))
        path = self.path / METRICS
        write_bytes(path, kept_metrics(path, start))
        self.votes.begin(start)

    def log(self, metrics: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if self.main:
            # JSON has no infinity; an fp16 gradient norm may be one.
            append_text(self.path / METRICS, json.dumps(finite(metrics), allow_nan=False) + "\n")

    def log_votes(self, step: int, table: StepTable, state: TrainingState) -> None:
        """Notes a step's margins, as the ledger counts them, for `votes.csv`."""
        if self.main:
            bins = state.ledger.bins(table["timestep"]).tolist()
            turned = state.turned[table.index].int().tolist()
            self.votes.add(step, state.round.number, table, bins, turned)

    def flush(self) -> None:
        """Waits until the disk holds metrics and votes; a checkpoint goes on from lines that last.

        Raises:
            BusyFolderError: Another host has taken this process for dead, and the folder from it.
        """
        if self.main:
            if self._lock is not None:
                self._lock.confirm()
            flush(self.path / METRICS)
            self.votes.flush()

    def write_minority(self, table: str) -> None:
        """Writes what the run found out about every pair, its last result, for the report."""
        write_text(self.path / MINORITY, table)

    def minority_damage(self, table: str) -> str | None:
        """Says if `minority.csv` is not what the run's last checkpoint gives."""
        path = self.path / MINORITY
        try:
            same = path.read_bytes() == table.encode()
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return None if same else f"{path} is not what the run found out about its pairs"


def minority_table(cache: PairCache, state: TrainingState) -> str:
    """Returns `minority.csv`: what a run found out about every pair."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("visits", "ledger_mean", "ledger_minority", "metric_minority")
    writer.writerow(("pair_id", "flipped", *names))
    votes = about_labels(state)
    columns = (cache.flipped.int(), state.ledger.visits, *votes, state.last_minority)
    for pair_id, *values in zip(cache.pair_ids, *(c.tolist() for c in columns), strict=True):
        writer.writerow([pair_id, *("" if v != v else v for v in values)])
    return text.getvalue()


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
