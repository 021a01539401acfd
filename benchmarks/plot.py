"""Tables and figures from the CSV files, never typed.

    python benchmarks/plot.py benchmarks/results/<device>/pair_loss.csv ... [--readme README.md]

Writes `<op>.md`, a table, and `<op>.png`, time over pairs, beside each CSV. `--readme` rewrites the
text between the README's marks `<!-- bench:begin -->` and `<!-- bench:end -->` from the pair
losses' files, in the order given.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from fastpo.bench.table import conditions, full_table, marks, read_csv, summary, with_section
from fastpo.system.files import write_text

MARKS = marks("bench")


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Latents across, directions down, of the first case and dtype: ms over pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    rows = [row for row in rows if row["ms_p50"]]
    rows = [r for r in rows if (r["case"], r["dtype"]) == (rows[0]["case"], rows[0]["dtype"])]
    across, down = (list(dict.fromkeys(r[k] for r in rows)) for k in ("latents", "direction"))
    size = (3.6 * len(across), 2.8 * len(down) + 0.4)
    fig, axes = plt.subplots(len(down), len(across), figsize=size, squeeze=False)
    panels = [(latents, direction) for direction in down for latents in across]
    for axis, panel in zip(axes.flat, panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for r in rows:
            if (r["latents"], r["direction"]) == panel:
                lines[r["provider"]].append((int(r["pairs"]), float(r["ms_p50"])))
        for provider, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=provider)
        axis.set(title=" ".join(panel), xlabel="pairs", xscale="log", yscale="log")
        axis.set_xticks(sorted({pairs for points in lines.values() for pairs, _ in points}))
        axis.minorticks_off()
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for axis in axes[:, 0]:
        axis.set_ylabel("ms (median)")
    axes[0][0].legend()
    fig.suptitle(f"{rows[0]['case']}, {rows[0]['dtype']}; {conditions(rows[0])}", fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(fig)


def readme_with(text: str, sections: list[str]) -> str:
    """The README's text with the sections between its marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    return with_section(text, "bench", "\n\n".join(sections))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, help="rewrite its section")
    args = parser.parse_args()
    try:
        tables = {path: read_csv(path) for path in args.files}
        sections = [summary(rows) for rows in tables.values() if rows[0]["op"] == "pair_loss"]
        readme = args.readme and readme_with(args.readme.read_text(), sections)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, rows in tables.items():
        measured = next(row for row in rows if row["ms_p50"])
        head = f"# {measured['op']}\n\nMedian milliseconds (20th to 80th percentile, share of the "
        head += f"copy bandwidth measured in the same run). {conditions(measured)}.\n\n"
        write_text(path.with_suffix(".md"), head + full_table(rows) + "\n")
        figure(rows, path.with_suffix(".png"))
    if args.readme:
        write_text(args.readme, readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
