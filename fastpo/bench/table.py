"""Rows, CSV files, and the Markdown that is generated from them."""

from __future__ import annotations

import csv
import io
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from fastpo.bench.cases import count_of
from fastpo.bench.measure import Timing
from fastpo.errors import ForeignPathError
from fastpo.system.files import check_folder, make_folder, write_text

Number = float | str


@dataclass(frozen=True)
class Row:
    """One provider on one case and direction; a number is empty where none was measured."""

    op: str
    case: str
    latents: str
    pairs: int
    dtype: str
    direction: str
    provider: str
    ms_p20: Number
    ms_p50: Number
    ms_p80: Number
    latency_ms: Number
    host_us: Number
    gb_per_s: Number
    share_of_copy: Number
    copy_gb_per_s: Number
    peak_mib: Number
    ratio_to_best_other: Number
    runs: int
    note: str
    clock: str
    device: str
    threads: int
    version: str
    torch: str
    triton: str
    driver: str
    commit: str
    date: str


NUMBERS = [f.name for f in fields(Row) if f.type == "Number"]


def family(provider: str) -> str:
    """`ours` and `ours-graph` are one kind of provider, and so are both compiled ones."""
    return provider.split("-")[0]


def timed_rows(
    timings: Mapping[str, Timing], n_bytes: int, copy: float, labels: Mapping[str, object]
) -> list[Row]:
    """One row a provider; `ratio_to_best_other` above 1 means faster than the best other kind."""
    medians = {name: timing.ms for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        others = [ms for other, ms in medians.items() if family(other) != family(name)]
        quintiles = statistics.quantiles((s.ms for s in timing.samples), n=5, method="inclusive")
        speed = n_bytes / medians[name] / 1e6
        values = {
            "provider": name,
            "ms_p20": round(quintiles[0], 5),
            "ms_p50": round(medians[name], 5),
            "ms_p80": round(quintiles[3], 5),
            "latency_ms": round(timing.latency_ms, 5),
            "host_us": round(timing.host_us, 1),
            "gb_per_s": round(speed, 2),
            "share_of_copy": round(speed / copy, 4),
            "copy_gb_per_s": round(copy, 2),
            "peak_mib": timing.peak_mib,
            "ratio_to_best_other": round(min(others) / medians[name], 3) if others else "",
            "runs": len(timing.samples),
            "note": "",
        }
        rows.append(Row(**{**labels, **values}))  # pyright: ignore[reportArgumentType]
    return rows


def noted_row(note: str, labels: Mapping[str, object]) -> Row:
    """A row without numbers: why there are none."""
    empty = {"provider": "", "direction": "", **dict.fromkeys(NUMBERS, ""), "runs": 0}
    return Row(**{**empty, **labels, "note": note})  # pyright: ignore[reportArgumentType]


def write_records(
    records: Iterable[Mapping[str, object]], columns: Sequence[str], path: Path
) -> None:
    """Writes a CSV of any columns anew, whole or not at all."""
    make_folder(path.parent)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes all rows anew, whole or not at all."""
    write_records((asdict(row) for row in rows), [f.name for f in fields(Row)], path)


def check_csv(path: Path) -> None:
    """Refuses to write over anything but a table of an earlier run.

    Raises:
        ForeignPathError: The path is there and is no such table.
        StorageError: Its folder cannot be made or written in.
    """
    check_folder(path.parent)
    if not os.path.lexists(path):
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        columns = None
    if columns is None or (columns and not {"provider", "direction"} <= set(columns)):
        raise ForeignPathError(f"{path} is there and is no table of `fastpo bench`: give another")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads what `write_csv` wrote.

    Raises:
        ValueError: the file is not such a table.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        expected = [f.name for f in fields(Row)]
        if list(reader.fieldnames or []) != expected:
            raise ValueError(f"{path} must have the columns {expected}, got {reader.fieldnames}")
        rows = list(reader)
    if not any(row["ms_p50"] for row in rows):
        raise ValueError(f"{path} holds no measured row")
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run, to which a further one adds.

    Raises:
        ValueError: the file is not such a table.
    """
    integers = {f.name for f in fields(Row) if f.type == "int"}

    def value(name: str, text: str) -> int | float | str:
        if name in integers:
            return int(text)
        return float(text) if name in NUMBERS and text else text

    return [Row(**{n: value(n, t) for n, t in row.items()}) for row in read_csv(path)]  # pyright: ignore[reportArgumentType]


def marks(name: str) -> tuple[str, str]:
    """The marks before and after a generated section of a Markdown file."""
    return f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"


def with_section(text: str, name: str, body: str) -> str:
    """The text with another body between a section's marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    first, last = marks(name)
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last.strip())}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the README must hold the marks {first.strip()} and {last.strip()}")
    return pattern.sub(lambda _: first + body + last, text)


def conditions(row: Mapping[str, str]) -> str:
    """Device, versions, commit and date in one line."""
    words = [row["device"]]
    words += [f"{row['threads']} CPU threads"] if row["clock"] != "events" else []
    words += [f"torch {row['torch']}", f"Triton {row['triton']}"]
    words += [f"driver {row['driver']}"] if row["driver"] else []
    return ", ".join([*words, f"FastPO {row['version']}, commit {row['commit']}", row["date"]])


def _cells(rows: Iterable[Mapping[str, str]], keys: Sequence[str]) -> dict[tuple, dict[str, dict]]:
    cells: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        if row["ms_p50"]:
            cells[tuple(row[k] for k in keys)][row["provider"]] = dict(row)
    return cells


def full_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Median milliseconds (20th to 80th percentile, share of copy) by case and provider."""
    keys = ("case", "latents", "dtype", "pairs", "direction")
    cells = _cells(rows, keys)
    providers = list(dict.fromkeys(name for found in cells.values() for name in found))
    lines = [f"| {' | '.join((*keys, *providers))} |", "|---" * (len(keys) + len(providers)) + "|"]
    for key, found in cells.items():
        words = []
        for provider in providers:
            row = found.get(provider)
            if row is None:
                words.append("")
                continue
            low, middle, high = (float(row[f"ms_p{q}"]) for q in (20, 50, 80))
            share = f"{100 * float(row['share_of_copy']):.0f} %"
            words.append(f"{middle:.3g} ({low:.3g} to {high:.3g}, {share})")
        lines.append(f"| {' | '.join((*key, *words))} |")
    return "\n".join(lines + [""] * bool(notes(rows)) + [f"- {note}" for note in notes(rows)])


def notes(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """What was not measured, and why."""
    return [
        f"{r['case']} {r['latents']} {r['dtype']}, {r['pairs']} pairs"
        + (f", {r['provider']}" if r["provider"] else "")
        + f": {r['note']}"
        for r in rows
        if r["note"]
    ]


def _ratio(found: Mapping[str, Mapping[str, str]], kind: str) -> float | None:
    """How many times the fastest of our providers is faster than the fastest of a kind."""
    ours = [float(r["ms_p50"]) for name, r in found.items() if family(name) == "ours"]
    theirs = [float(r["ms_p50"]) for name, r in found.items() if family(name) == kind]
    return min(theirs) / min(ours) if ours and theirs else None


def _headlines(keys: Iterable[tuple]) -> list[tuple]:
    """DPO's and Adaptive-DPO's cases, if there are any, with the fewest and the most pairs."""
    every = sorted(keys, key=lambda key: (*key[:3], int(key[3])))
    chosen = [key for key in every if key[0] in ("dpo", "adaptive_dpo")] or every
    groups = [list(group) for _, group in groupby(chosen, key=lambda key: key[:3])]
    return [key for group in groups for key in (group if len(group) < 2 else (group[0], group[-1]))]


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """The README's section on one device: both passes together, and shares of the copy bandwidth.

    The table is of `_headlines`; the sentence on rows that fall short counts all.

    Args:
        rows: of `pair_loss`, as `read_csv` gives them.
    """
    keys = ("case", "latents", "dtype", "pairs")
    measured = [r for r in rows if r["ms_p50"]]
    first = measured[0]
    graph = any(r["provider"] == "ours-graph" for r in measured)
    lines = [
        f"Times faster than eager as trainers write it and than `torch.compile`, forward and "
        f"backward together, medians; {'the better of ours and ours in a CUDA graph; ' * graph}"
        f"share of the copy bandwidth ({_copy_range(measured)} GB/s) that the bytes which must "
        f"move reach. {conditions(first)}.",
        "",
        "| objective | latents | dtype | pairs | vs eager | vs compile | forward | backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_direction = {
        d: _cells((r for r in rows if r["direction"] == d), keys) for d in ("both", "fwd", "bwd")
    }
    for key in _headlines(by_direction["both"]):
        found = by_direction["both"][key]
        ratios = [_ratio(found, kind) for kind in ("eager", "compile")]
        shares = [
            by_direction[d].get(key, {}).get("ours", {}).get("share_of_copy")
            for d in ("fwd", "bwd")
        ]
        words = ["" if r is None else f"{r:.2f}x" for r in ratios]
        words += ["" if s is None else f"{100 * float(s):.0f} %" for s in shares]
        lines.append(f"| {' | '.join((*key, *words))} |")
    return "\n".join([*lines, "", _shortfalls(measured), *_left_out(rows)])


def _copy_range(rows: Sequence[Mapping[str, str]]) -> str:
    """The copy bandwidths of the runs that the rows come from."""
    found = sorted({round(float(row["copy_gb_per_s"])) for row in rows})
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _shortfalls(rows: Sequence[Mapping[str, str]]) -> str:
    """How many rows of all directions fall short of eager and of torch.compile, and the worst."""
    cells = _cells(rows, ("case", "latents", "dtype", "pairs", "direction"))
    sentences = []
    for kind, name in (("eager", "eager"), ("compile", "`torch.compile`")):
        ratios = {key: r for key, found in cells.items() if (r := _ratio(found, kind)) is not None}
        if not ratios:
            continue
        slower = [key for key, ratio in ratios.items() if ratio < 1]
        worst = min(ratios, key=lambda key: ratios[key])
        case, latents, dtype, pairs, direction = worst
        sentences.append(
            f"Slower than {name} on {len(slower)} of {len(ratios)} rows, all directions counted; "
            f"the lowest ratio is {ratios[worst]:.2f} ({case}, {latents}, {dtype}, "
            f"{count_of(int(pairs))}, {direction})."
        )
    return " ".join(sentences)


def _left_out(rows: Sequence[Mapping[str, str]]) -> list[str]:
    found = notes(rows)
    return ["", "Not measured: " + "; ".join(found) + "."] if found else []
