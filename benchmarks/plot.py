"""Tables and figures from the CSV files, never typed.

    python benchmarks/plot.py benchmarks/results/<device>/pair_loss.csv ...

Writes `<op>.md`, a table, and `<op>.png`, time over pairs, beside each CSV.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def conditions(rows: list[dict[str, str]]) -> str:
    """Device, versions, commit and date in one line."""
    first = rows[0]
    words = [first["device"], f"{first['threads']} CPU threads", f"torch {first['torch']}"]
    words += [f"Triton {first['triton']}"]
    words += [f"driver {first['driver']}"] if first["driver"] else []
    return ", ".join([*words, f"commit {first['commit']}", first["date"]])


def table(rows: list[dict[str, str]]) -> str:
    """Median milliseconds (20th to 80th percentile) by case and provider, in Markdown."""
    keys = ("case", "latents", "dtype", "pairs", "direction")
    cells: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    for row in rows:
        p20, p50, p80 = (float(row[f"ms_p{q}"]) for q in (20, 50, 80))
        share = f", {100 * float(row['share_of_copy']):.0f} %"
        cells[tuple(row[k] for k in keys)][row["provider"]] = (
            f"{p50:.3g} ({p20:.3g} to {p80:.3g}{share})"
        )
    lines = [f"| {' | '.join((*keys, *providers))} |", "|" + "---|" * (len(keys) + len(providers))]
    for key, found in cells.items():
        lines.append(f"| {' | '.join((*key, *(found.get(p, '') for p in providers)))} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """One panel per latents and direction of the first case and dtype: ms over pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if (r["case"], r["dtype"]) == (rows[0]["case"], rows[0]["dtype"])]
    panels = list(dict.fromkeys((r["latents"], r["direction"]) for r in rows))
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for r in rows:
            if (r["latents"], r["direction"]) == panel:
                lines[r["provider"]].append((int(r["pairs"]), float(r["ms_p50"])))
        for provider, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=provider)
        axis.set(title=" ".join(panel), xlabel="pairs", xscale="log", yscale="log")
    axes[0][0].set_ylabel("ms (median)")
    axes[0][0].legend()
    fig.suptitle(f"{rows[0]['case']}, {rows[0]['dtype']}; {conditions(rows)}", fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        rows = read(path)
        head = f"# {rows[0]['op']}\n\nMedian milliseconds (20th to 80th percentile, share of the "
        head += f"copy bandwidth measured in the same run). {conditions(rows)}.\n\n"
        path.with_suffix(".md").write_text(head + table(rows) + "\n")
        figure(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
