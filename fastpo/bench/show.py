"""`fastpo bench`: a progress bar, a table, and a CSV file on request."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastpo.bench.cases import Case, count_of
from fastpo.bench.measure import device
from fastpo.bench.run import Run
from fastpo.bench.table import Row, check_csv, write_csv
from fastpo.errors import FastPOError


class BenchmarkError(FastPOError):
    """A provider failed, or its numbers depart from the reference's."""


def show(run: Run, out: Path | None, console: Console | None = None) -> None:
    """Measures and prints; writes the rows so far after every case where `out` is given.

    Raises:
        ForeignPathError: `out` is there and is no such table.
        BenchmarkError: a provider failed or disagreed; the others' rows are printed and written.
    """
    console = console or Console()
    if out is not None:
        check_csv(out)
    if device() == "cpu":
        console.print("no GPU: eager and compiled CPU path, and ours, the default on a CPU")
    where = run.where
    console.print(
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"Triton {where['triton'] or 'absent'}; copy {run.copy:.1f} GB/s"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("cases", total=len(run.cases), rate="")
        for case, _ in run:
            seconds = progress.tasks[task].elapsed or 0.0
            done = progress.tasks[task].completed + 1
            rate = f"{seconds / done:.1f} s/case"
            progress.update(task, advance=1, description=str(case), rate=rate)
            if out is not None:
                write_csv(run.rows, out)
    for table in _tables(run.rows):
        console.print(table)
    for row in run.rows:
        if row.note:
            console.print(f"{_name(row)} {row.provider}: {row.note}")
    if run.unmeasured:
        console.print(_out_of_time(run.unmeasured))
    if out is not None and run.rows:
        console.print(f"{len(run.rows)} rows in {out}")
    if run.failures:
        raise BenchmarkError("; ".join(run.failures))


def _out_of_time(cases: list[Case]) -> str:
    return f"out of time: {len(cases)} cases not measured, the first {cases[0]}"


def _name(row: Row) -> str:
    return f"{row.case}, {row.latents}, {row.dtype}, {count_of(row.pairs)}"


def _tables(rows: list[Row]) -> Iterator[Table]:
    """One table a case, narrow enough for 80 columns."""
    timed = [row for row in rows if not row.note]
    for name, group in groupby(timed, _name):
        table = Table(title=name, title_justify="left", box=SIMPLE, pad_edge=False)
        for column in ("pass", "provider"):
            table.add_column(column, no_wrap=True)
        for column in ("ms (quintiles)", "host µs", "GB/s", "of copy", "vs best"):
            table.add_column(column, justify="right", no_wrap=True)
        previous = None
        for row in group:
            shown = row.direction if row.direction != previous else ""
            previous = row.direction
            ratio = "" if row.ratio_to_best_other == "" else f"{row.ratio_to_best_other:.2f}x"
            table.add_row(
                shown,
                row.provider,
                f"{row.ms_p50:.3g} ({row.ms_p20:.3g} to {row.ms_p80:.3g})",
                f"{row.host_us:.0f}",
                f"{row.gb_per_s:.1f}",
                f"{100 * float(row.share_of_copy):.0f} %",
                ratio,
            )
        yield table
