"""Where a step's time goes: a stacked bar a provider, and the README's table, from `step.csv`.

    python benchmarks/plot_step.py benchmarks/results/<device>/step*.csv [--readme README.md]

Writes a table (`.md`) and a figure (`.png`) beside every CSV; with `--readme`, the tables and
figures of all files, in their order, between `<!-- step:begin -->` and `<!-- step:end -->` too;
with `--marks` (`--flow-marks` for transformers), what they say of a step's marks between
`<!-- marks:begin -->` (`<!-- flow-marks:begin -->`) and its end.
"""

from __future__ import annotations

import argparse
import csv
import os
from itertools import groupby, pairwise
from pathlib import Path

from fastpo.bench.cases import count_of
from fastpo.bench.table import with_section
from fastpo.system.files import write_text

COLORS = {
    "policy forward": "#4477aa",
    "backward": "#66a3d2",
    "optimizer": "#a8c8e4",
    "reference": "#cc6677",
    "annotators": "#ddaa33",
    "VAE": "#882255",
    "text": "#aa4499",
    "noise": "#117733",
    "loss": "#44aa99",
    "ledger": "#999933",
    "rest": "#bbbbbb",
}
# Ours; its recipe; the bare policy's time at most; faster than the recipe at least; memory below
# this share of the recipe's.
FLOW_RECIPE = "recipe Flow-Factory DPO"
MARKS = (
    ("FastPO MaPO", "recipe MaPO", 1.03, 2.0, 1.0),
    ("FastPO DPO, cached reference", "recipe Diffusion-DPO", 1.03, 2.0, 1.0),
    ("FastPO Adaptive-DPO, ledger, cached reference", "recipe Adaptive-DPO", 1.05, 2.5, 1.0),
)
FLOW_MARKS = (("FastPO DPO, cached reference", FLOW_RECIPE, 1.05, 1.5, 0.75),)
CASE = ("size", "method", "pairs", "precision", "checkpointing")
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV; an option's stands in the panel of the case that it changes."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for before, row in pairwise(rows):
        if row.get("option"):
            row.update(zip(CASE, case_of(before), strict=True))
    return rows


def case_of(row: Row) -> tuple[str, ...]:
    """What the rows of one panel share."""
    return tuple(row[key] for key in CASE)


def title_of(case: tuple[str, ...]) -> str:
    """A panel's heading."""
    size, method, pairs, precision, checkpointing = case
    recompute = ", gradient checkpointing" if checkpointing == "True" else ""
    return f"{size}, {method}, {count_of(int(pairs))}, {precision}{recompute}"


def conditions(rows: list[Row]) -> str:
    """Device, versions, rounds, commit and date in one line."""

    def told(key: str) -> str:
        return " and ".join(dict.fromkeys(row[key] for row in rows))

    return (
        f"{told('device')}, {told('threads')} CPU threads, torch {told('torch')}, "
        f"{told('rounds')} interleaved rounds, commit {told('commit')}, {told('date')}"
    )


def table(rows: list[Row]) -> str:
    """Times the bare policy, times faster than the recipe, peak memory, in Markdown."""
    heads = ("step", "time, bare policy = 1", "faster than its recipe", "peak memory, MiB")
    kept = [k for k in range(len(heads)) if any(_cells(row)[k] for row in rows)]
    blocks = []
    for case, group in groupby(rows, case_of):
        lines = [f"**{title_of(case)}**\n"]
        for cells in (heads, ["---"] * len(heads), *map(_cells, group)):
            lines.append(f"| {' | '.join(cells[k] for k in kept)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cells(row: Row) -> list[str]:
    time = f"{row['times_floor']} ({row['times_floor_p20']} to {row['times_floor_p80']})"
    faster = row["faster_than_recipe"] and f"{row['faster_than_recipe']}x"
    spread = f" ({row['faster_p20']} to {row['faster_p80']})" if row["faster_p20"] else ""
    return [row["provider"], time, faster + spread, row["peak_mib"]]


def marks_table(rows: list[Row]) -> str:
    """Our steps' medians beside their marks, in Markdown."""
    lines = [
        "| case | step | time, bare policy = 1 | faster than its recipe | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for case, group in groupby(rows, case_of):
        found = {row["provider"]: row for row in group}
        for ours, recipe, most, least, share in FLOW_MARKS if FLOW_RECIPE in found else MARKS:
            if ours not in found:
                continue
            time, faster, peak = (
                found[ours][k] for k in ("times_floor", "faster_than_recipe", "peak_mib")
            )
            other = found[recipe]["peak_mib"] if recipe in found else ""
            cells = [
                _verdict(time, float(time) <= most, f"at most {most}"),
                faster and _verdict(f"{faster}x", float(faster) >= least, f"at least {least}x"),
                peak and other and _verdict(peak, *_memory_mark(peak, other, share)),
            ]
            lines.append(f"| {title_of(case)} | {ours} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory_mark(peak: str, other: str, share: float) -> tuple[bool, str]:
    of_recipe = other if share == 1.0 else f"{share} x {other}"
    return float(peak) < share * float(other), f"below {of_recipe}"


def _verdict(value: str, met: bool, mark: str) -> str:
    return f"{value}, {'met' if met else 'not met'} ({mark})"


def figure(rows: list[Row], path: Path) -> None:
    """One panel a case, one bar a provider, as long as its time over the bare policy's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(case, list(group)) for case, group in groupby(rows, case_of)]
    names = list(dict.fromkeys(row["provider"] for row in rows))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    height = down * (0.42 * len(names) + 1.0) + 0.4
    fig, grid = plt.subplots(
        down, across, figsize=(6.2 * across, height), squeeze=False, sharey=True
    )
    axes = list(grid.flat)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (case, group) in zip(axes, panels, strict=False):
        places = [names.index(row["provider"]) for row in group]
        starts = [0.0] * len(group)
        for part, color in COLORS.items():
            lengths = [
                float(row[f"share_{part.replace(' ', '_')}"]) * float(row["times_floor"])
                for row in group
            ]
            axis.barh(places, lengths, left=starts, color=color, label=part)
            starts = [s + max(length, 0.0) for s, length in zip(starts, lengths, strict=True)]
        for place, row, end in zip(places, group, starts, strict=True):
            axis.text(end + 0.03, place, f"{float(row['times_floor']):.2f}", va="center", size=8)
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=title_of(case), xlabel="time of a step, bare policy = 1")
        axis.set_xlim(right=1.1 * max(starts))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(len(labels), 6 * across)
    fig.legend(handles, labels, loc="lower center", ncols=columns, fontsize=8, frameon=False)
    fig.suptitle(conditions(rows), fontsize=8)
    fig.tight_layout(rect=(0, 0.5 / height, 1, 1))
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    """Writes the table and the figure beside every CSV, and all into the README where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, help="rewrite the text between its step markers")
    parser.add_argument("--marks", type=Path, help="rewrite the text between its marks markers")
    parser.add_argument("--flow-marks", type=Path, help="the same between its flow-marks markers")
    options = parser.parse_args()
    texts, marks = [], []
    for path in options.files:
        rows, picture = read(path), path.with_suffix(".png")
        marks.append(f"{conditions(rows)}.\n\n{marks_table(rows)}")
        text = f"{conditions(rows)}.\n\n{table(rows)}"
        write_text(path.with_suffix(".md"), f"# Whole training steps\n\n{text}\n")
        figure(rows, picture)
        if options.readme:
            place = Path(os.path.relpath(picture, options.readme.parent)).as_posix()
            texts.append(f"{text}\n\n![Time of a step by part]({place})")
    sections = (
        (options.readme, "step", texts),
        (options.marks, "marks", marks),
        (options.flow_marks, "flow-marks", marks),
    )
    for file, name, bodies in sections:
        if file:
            write_text(file, with_section(file.read_text(), name, "\n\n".join(bodies)))


if __name__ == "__main__":
    main()
