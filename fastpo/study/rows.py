"""The rows of a study: one file a run in its folder, and one CSV of all of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpo.bench.table import write_records
from fastpo.errors import DataError, ForeignPathError
from fastpo.study.measure import win_rate
from fastpo.study.trials import Trial
from fastpo.system.files import make_folder, write_json
from fastpo.system.json_text import read_json

LABELS = ("part", "case", "method", "flip_rate", "seed", "settings")
MEASURED = (
    "pairs", "wrong", "reward", "base_reward", "gain", "win_base", "win_dpo", "legible",
    "base_legible", "auroc", "right", "bin_pairs", "bin_wrong", "passes", "cpu_s",
)  # fmt: skip
CALIBRATED = ("learned_wrong", "reliability", "reliability_u")  # tables of old versions lack them
ABOUT = ("device", "threads", "torch", "commit", "date")
MOST_BYTES = 1 << 22  # of a run's file; one holds a few hundred scores
Row = dict[str, str]


def row_path(work: Path, trial: Trial) -> Path:
    """Where a run's numbers are kept."""
    return work / "rows" / f"{trial.digest}.json"


def keep_row(work: Path, trial: Trial, row: Mapping[str, Any]) -> None:
    """Writes a finished run's numbers, `scores` among them: the reward of each of its images."""
    path = row_path(work, trial)
    make_folder(path.parent)
    write_json(path, {"run": str(trial), **row})


@dataclass
class Table:
    """What is known of a study's runs.

    Attributes:
        trials: All runs of the study.
        work: The folder with the rows that were made there.
        earlier: Rows of a CSV that was there before.
    """

    trials: Sequence[Trial]
    work: Path
    earlier: Sequence[Row]

    def __post_init__(self) -> None:
        """Reads what the folder holds."""
        self._found: dict[str, dict[str, Any]] = {}
        self._earlier = {row["settings"]: row for row in self.earlier}
        for trial in self.trials:
            self.read(trial)

    def read(self, trial: Trial) -> None:
        """Takes a run's numbers from the folder, if they are there.

        Raises:
            DataError: The file is damaged; the text says what to do.
        """
        path = row_path(self.work, trial)
        if trial.digest in self._found or not path.is_file():
            return
        try:
            row = read_json(path, most_bytes=MOST_BYTES)
            self._found[trial.digest] = {**row, "scores": [float(s) for s in row["scores"]]}
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{path} is no row of a study; remove it, and the run is made again"
            ) from None

    def holds(self, trial: Trial) -> bool:
        """Whether a run's numbers are known."""
        return trial.digest in self._found or trial.digest in self._earlier

    def seconds(self) -> dict[str, list[float]]:
        """The CPU seconds of the runs that are known, by method."""
        spent: dict[str, list[float]] = {}
        for row in self.rows():
            if row["cpu_s"]:
                spent.setdefault(row["method"], []).append(float(row["cpu_s"]))
        return spent

    def rows(self) -> list[Row]:
        """The rows of all runs that are known, in the study's order, all with the same columns."""
        rows = [self.row(trial) for trial in self.trials if self.holds(trial)]
        known = (*LABELS, *MEASURED, *CALIBRATED, *ABOUT)
        more = sorted({key for row in rows for key in row} - set(known))
        columns = (*LABELS, *MEASURED, *CALIBRATED, *more, *ABOUT)
        return [{key: row.get(key, "") for key in columns} for row in rows]

    def row(self, trial: Trial) -> Row:
        """The row of a run that is known, compared with plain DPO's where that is known too."""
        found = self._found.get(trial.digest)
        if found is None:
            plain = {"win_dpo": ""} if trial.method_name == "dpo" else {}
            return {**self._earlier[trial.digest], **plain, **trial.labels}
        row = {k: v for k, v in found.items() if k not in ("run", "scores")}
        partner = self._found.get(_plain_of(trial, self.trials).digest)
        same = partner is not None and len(partner["scores"]) == len(found["scores"])
        if partner is not None and same and trial.method_name != "dpo":
            row["win_dpo"] = win_rate(found["scores"], partner["scores"])
        elif trial.method_name != "dpo" and trial.digest in self._earlier:
            row["win_dpo"] = self._earlier[trial.digest]["win_dpo"]
        text = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        text |= {k: "" for k, v in row.items() if v is None}  # it was not finite
        return {**text, **trial.labels}

    def write(self, path: Path) -> None:
        """Writes the CSV whole; columns of some worlds alone stand behind the measured ones."""
        rows = self.rows()
        columns = list(rows[0]) if rows else [*LABELS, *MEASURED, *CALIBRATED, *ABOUT]
        write_records(rows, columns, path)


def _plain_of(trial: Trial, trials: Iterable[Trial]) -> Trial:
    """The run of plain DPO that a run is compared with: on the same labels, as like it as can be.

    Itself where there is none.
    """
    plain = [
        other
        for other in trials
        if other.method_name == "dpo"
        and (other.seed, other.flip_rate, other.world) == (trial.seed, trial.flip_rate, trial.world)
    ]
    same_part = (trial.part.name, trial.case)
    alike = sorted(
        plain,
        key=lambda o: (o.part.name == same_part[0]) + (o.case == same_part[1]) * 2,
        reverse=True,
    )
    return alike[0] if alike else trial


def read_rows(path: Path) -> list[Row]:
    """Reads a CSV of an earlier call; none if there is no file.

    Raises:
        ForeignPathError: The file is no table of a study.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            rows = [{k: v or "" for k, v in row.items()} for row in reader]
    except (OSError, ValueError, csv.Error):
        columns, rows = set(), []
    if not {*LABELS, *MEASURED} <= columns:
        raise ForeignPathError(f"{path} is there and is no table of `fastpo study`: give another")
    return rows
