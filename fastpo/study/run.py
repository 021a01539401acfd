"""`fastpo study`: makes the runs that a study lacks, one on each core, and writes the table.

The folder holds

    base/               the worlds' base models
    data/WORLD-SEED-ID/ preferences, prepared pairs, and the base's images, of one seed
    runs/METHOD-SHARE-ID/   each run, with its evaluation
    rows/ID.json        a finished run's numbers: what is there is not made again
    study.csv           all of them
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from fastpo.errors import FastPOError
from fastpo.study.config import StudyConfig
from fastpo.study.jobs import build_bases, make_data, make_run
from fastpo.study.rows import Row, Table, read_rows
from fastpo.study.trials import Choice, Trial, plan
from fastpo.system.files import check_folder
from fastpo.system.ownership import Kind, claim
from fastpo.system.pool import Workers, workers
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted
from fastpo.system.writer_lock import sole_writer

STUDY = Kind("a study", r"", lambda _: False)


class StudyError(FastPOError):
    """Some of a study's runs failed; the others were made."""


@dataclass(frozen=True)
class Options:
    """How a study is made.

    Attributes:
        work: Its folder.
        csv: The table's file; default: `study.csv` in the folder. Rows that it holds, of runs with
            the same settings, are not made again.
        short: Only try every run: a few steps, one seed.
        processes: Runs at a time, each with one thread; default: one on each core.
        choice: Which of the runs that are lacking to make.
        make: Whether to make runs at all, or only to write the table.
    """

    work: Path
    csv: Path | None = None
    short: bool = False
    processes: int | None = None
    choice: Choice = field(default_factory=Choice)
    make: bool = True

    @property
    def table(self) -> Path:
        """The CSV's path."""
        return self.csv or self.work / "study.csv"


@storage_errors()
def run_study(study: StudyConfig, options: Options) -> list[Row]:
    """Makes the runs that are lacking, most important first, and writes the table after each.

    Returns:
        The rows of all runs of the study that are known.

    Raises:
        ConfigError: Keys of a run do not go together; nothing is made then.
        ForeignPathError: The folder or the CSV is something else.
        BusyFolderError: Another call works in the folder.
        StudyError: Some runs failed; the text names the first.
    """
    # Runs name their data by path, and one that was killed must find the same names.
    options = replace(options, work=options.work.resolve())
    trials = plan(study, short=options.short)
    check_folder(options.table.parent)
    earlier = read_rows(options.table)
    claim(options.work, STUDY)
    with sole_writer(options.work):
        table = Table(trials, options.work, earlier)
        first: dict[str, Trial] = {}  # of the runs with the same numbers
        for trial in trials:
            if trial in options.choice and not table.holds(trial):
                first.setdefault(trial.digest, trial)
        lacking = list(first.values())
        processes = min(options.processes or os.cpu_count() or 1, max(1, len(lacking)))
        making = Making(table, options, processes)
        making.tell(making.outlook(lacking))
        if lacking and options.make:
            with workers(processes) as work:
                making.make(lacking, work)
        table.write(options.table)
    if making.failures:
        more = len(making.failures) - 1
        others = f"; {counted(more, 'more run')} failed" if more else ""
        raise StudyError(f"{making.failures[0]}{others}; the same command tries again")
    return table.rows()


@dataclass
class Making:
    """Runs that are being made, and what is told of them.

    Attributes:
        table: What is known.
        options: How they are made.
        processes: How many at a time.
        failures: Of runs that failed, which and why.
    """

    table: Table
    options: Options
    processes: int
    failures: list[str] = field(default_factory=list)

    def make(self, lacking: Sequence[Trial], work: Workers) -> None:
        """Makes bases, data and runs, each when what it needs is there."""
        folder = self.options.work
        groups: dict[str, list[Trial]] = {}
        for trial in lacking:
            groups.setdefault(trial.data.digest, []).append(trial)
        self._note(failure for _, failure in work(build_bases, [(list(lacking), folder)]))
        if not self.failures:
            data = [(group, folder) for group in groups.values()]
            self._note(failure for _, failure in work(make_data, data))
        if self.failures:
            return
        done = 0
        for number, failure in work(make_run, [(trial, folder) for trial in lacking]):
            trial, done = lacking[number], done + 1
            self._note([failure])
            if failure is not None:
                continue
            self.table.read(trial)
            self.table.write(self.options.table)
            row = self.table.row(trial)
            spent = f"gain {float(row['gain']):+.4f}, {float(row['cpu_s']):.0f} s of CPU"
            self.tell(f"{done}/{len(lacking)} {trial}: {spent}")
            if done % 10 == 0 and done < len(lacking):
                self.tell(self.outlook([t for t in lacking if not self.table.holds(t)]))

    def _note(self, failures: Iterable[str | None]) -> None:
        for text in failures:
            if text is not None:
                self.failures.append(text)
                self.tell(f"failed: {text}")

    def outlook(self, lacking: Sequence[Trial]) -> str:
        """How much there is to do, and how long it takes by the runs that are known."""
        known, spent = len(self.table.rows()), self.table.seconds()
        text = f"{counted(known, 'run')} known, {len(lacking)} to make"
        if lacking and spent:
            others = [seconds for each in spent.values() for seconds in each]
            seconds = sum(statistics.mean(spent.get(t.method_name, others)) for t in lacking)
            hours = seconds / self.processes / 3600.0
            text += f": about {hours:.1f} hours on {counted(self.processes, 'idle core')}"
        return text

    def tell(self, text: str) -> None:
        """Prints a line to standard error."""
        Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)
