"""`fastpo selftest`: does this machine lose anything that FastPO was told to keep?"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastpo.selftest.machine import Finding, check_machine
from fastpo.selftest.run import (
    Result,
    SelftestError,
    all_trials,
    flaws,
    make_bench,
    run_trials,
)
from fastpo.selftest.trials import GOOD
from fastpo.system.progress import progress_bar


def selftest(folder: Path, *, minutes: float, show: bool = True) -> bool:
    """Tries kills, power cuts, damaged files and full disks on a small run of everything.

    Args:
        folder: Where to make, and remove again, a folder for it; its disk is tested.
        minutes: How long trials begin; making the small world comes before.
        show: Show a progress bar, and a table at the end.

    Returns:
        Whether nothing was lost, and nothing came out otherwise without a word.

    Raises:
        SelftestError: The folder cannot be written to, or a command fails without any fault.
    """
    try:
        own = Path(tempfile.mkdtemp(prefix="fastpo-selftest-", dir=folder))
    except OSError as error:
        raise SelftestError(f"--folder {folder}: {error.strerror}; give one to write to") from None
    try:
        machine = check_machine(own)
        found = _run(own, 60 * minutes, show=show)
    except OSError as error:
        raise SelftestError(f"--folder {folder}: {error}") from None
    finally:
        shutil.rmtree(own)
    if show:
        show_findings(machine, found, Console())
    return all(one.good for one in machine) and not flaws(found)


def _run(own: Path, seconds: float, *, show: bool) -> list[Result]:
    with progress_bar("small world", 7, unit="parts", show=show) as advance:
        bench = make_bench(own, advance)
    counts: Counter[bool] = Counter()
    with progress_bar("faults (seconds)", int(seconds), show=show) as advance:

        def on_result(result: Result) -> None:
            counts[result.outcome in (*GOOD, "missed")] += 1
            advance(round(result.seconds), note=f"{counts.total()} tried, {counts[False]} flaws")

        return run_trials(
            bench, all_trials(bench, repeats=20), seconds=seconds, on_result=on_result
        )


def show_findings(machine: Sequence[Finding], found: Sequence[Result], console: Console) -> None:
    """Prints what was tried, what came of it, and each flaw."""
    table = Table("this machine", "")
    for finding in machine:
        table.add_row(finding.what, finding.found, style=None if finding.good else "bold red")
    console.print(table)
    table = Table("fault", "tried", "went on, equal", "refused, named", "flaws")
    for test in dict.fromkeys(result.test for result in found):
        counts = Counter(result.outcome for result in found if result.test == test)
        counts.pop("missed", None)
        bad = sum(count for outcome, count in counts.items() if outcome not in GOOD)
        refused = counts["refused"]
        numbers = counts.total(), counts.total() - refused - bad, refused, bad
        table.add_row(test, *map(str, numbers), style="bold red" if bad else None)
    console.print(table)
    for flaw in flaws(found):
        console.print(f"{flaw.outcome}: {flaw.name}: {flaw.detail}", markup=False, highlight=False)
