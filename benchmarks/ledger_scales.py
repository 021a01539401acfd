"""On which scale should a margin vote? Replays recorded votes, and writes the tables.

    python benchmarks/ledger_scales.py [--work FOLDER]

FOLDER is that of `bench_ledger.py`, whose CSV this completes and turns into `ledger.md` beside it
and into the README's table. Plain DPO's votes are replayed, since no ledger had a hand in them.

`view` is what the model predicts. The demo's predicts the velocity v; the same network's answer for
the noise is `sigma x + signal v`, so the squared errors, and margins, are `signal^2` times as
large: what a ledger would see under SD1.5's and SDXL's parametrisation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_ledger import METHODS, Results, area
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fastpo.bench.measure import ROOT
from fastpo.bench.script import results_path
from fastpo.bench.table import with_section
from fastpo.demo.base import SCHEDULE
from fastpo.files import write_text
from fastpo.ledger import BINS, PairLedger

Scale = Callable[[int], Callable[[np.ndarray, np.ndarray], np.ndarray]]


def step_rms(_: int):
    """Divided by the rms of the step's margins."""
    return lambda timestep, margin: margin / np.sqrt((margin**2).mean() + 1e-300)


def sign(_: int):
    """The sign alone."""
    return lambda timestep, margin: np.sign(margin)


def unscaled(_: int):
    """The margin as it is."""
    return lambda timestep, margin: margin


def timestep_rms(_: int):
    """Divided by the running rms of the timestep's bin; every bin weighs alike."""
    power, count = np.zeros(BINS), np.zeros(BINS)

    def votes(timestep: np.ndarray, margin: np.ndarray) -> np.ndarray:
        bins = timestep.astype(int) * BINS // 1000
        added = np.bincount(bins, minlength=BINS)
        fade = np.exp(-added / 256.0)
        power[:] = power * fade + np.bincount(bins, margin**2, BINS)
        count[:] = count * fade + added
        return margin / np.sqrt(power[bins] / count[bins] + 1e-300)

    return votes


SCALES: dict[str, Scale | None] = {
    "sign": sign,
    "step rms": step_rms,
    "unscaled": unscaled,
    "timestep rms": timestep_rms,
    "timestep rms and worth (ours)": None,  # PairLedger itself
}


def replay(votes: np.ndarray, pairs: int, scale: Scale | None, group: int | None, visits: int):
    """Returns each pair's doubt after `visits` votes of every pair."""
    votes = votes[: pairs * visits]
    cuts = np.flatnonzero(np.diff(votes[:, 0])) + 1
    parts = np.split(votes, cuts if group is None else np.arange(group, len(votes), group))
    if scale is None:
        ledger = PairLedger(pairs)
        for part in parts:
            rows = torch.from_numpy(part)
            ledger.update(rows[:, 1].long(), rows[:, 3], rows[:, 2].long())
        return -ledger.total.numpy()
    total, of = np.zeros(pairs), scale(pairs)
    for part in parts:
        np.add.at(total, part[:, 1].astype(int), of(part[:, 2], part[:, 3]))
    return -total


def scales(work: Path, results: Results) -> None:
    """AUROC of every scale on every recorded run of plain DPO, after one visit and after all."""
    signal2 = DDPMScheduler(**SCHEDULE).alphas_cumprod.double().numpy()
    results.rows = [row for row in results.rows if row["part"] != "scale"]
    for path in sorted((work / "votes").glob("dpo*.npz")):
        name, rate, seed = path.stem.rsplit("-", 2)
        kept = np.load(path)
        recorded, flipped = kept["votes"], kept["flipped"]
        pairs = len(flipped)
        last = len(recorded) // pairs
        for view in ("velocity", "noise"):
            votes = recorded.copy()
            if view == "noise":
                votes[:, 3] *= signal2[votes[:, 2].astype(int)]
            for group in (None, 1) if name == "dpo" else (None,):
                for visits in sorted({1, last}):
                    for label, scale in SCALES.items():
                        doubt = replay(votes, pairs, scale, group, visits)
                        batch = "one pair a step" if group else "as run"
                        case = f"{name}; {view}; {batch}; {visits} visits"
                        results.add(
                            part="scale",
                            case=case,
                            method=label,
                            flip_rate=float(rate),
                            seed=int(seed),
                            pairs=pairs,
                            wrong=float(flipped.mean()),
                            auroc=area(flipped, doubt),
                        )


def mean(results: Results, key: str, **labels: object) -> str:
    """The mean over seeds of one column, with the range where there are several."""
    found = [
        float(row[key])
        for row in results.rows
        if row[key] and all(row[k] == str(v) for k, v in labels.items())
    ]
    if not found:
        return "-"
    text = f"{np.mean(found):.3f}"
    return text if len(found) == 1 else f"{text} ({min(found):.3f} to {max(found):.3f})"


def methods_table(results: Results) -> str:
    """AUROC, kept gain and step cost of every method."""
    rates = sorted({r["flip_rate"] for r in results.rows if r["part"] == "methods"} - {"0.0"})
    head = ["method", "cost of a step"]
    head += [f"{what}, {float(r):.0%} flipped" for r in rates for what in ("AUROC", "gain kept")]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in METHODS:
        cells = [method, mean(results, "step_ratio", part="cost", method=method) + "x"]
        for rate in rates:
            labels = {"part": "methods", "method": method, "flip_rate": rate}
            cells += [mean(results, "auroc", **labels), mean(results, "kept", **labels)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scales_table(results: Results) -> str:
    """AUROC by scale."""
    rows = [r for r in results.rows if r["part"] == "scale"]
    cases = list(dict.fromkeys((r["case"], r["flip_rate"]) for r in rows))
    lines = ["| run; prediction; step; visits | flipped | " + " | ".join(SCALES) + " |"]
    lines += ["|---" * (2 + len(SCALES)) + "|"]
    for case, rate in cases:
        labels = {"part": "scale", "case": case, "flip_rate": rate}
        cells = [mean(results, "auroc", **labels, method=m).split(" ")[0] for m in SCALES]
        lines.append("| " + " | ".join([case, f"{float(rate):.0%}", *cells]) + " |")
    return "\n".join(lines)


def cases_table(results: Results) -> str:
    """AUROC on harder labels."""
    lines = ["| labels | wrong or of the minority | AUROC |", "|---|---|---|"]
    for row in results.rows:
        if row["part"] == "cases":
            lines.append(f"| {row['case']} | {float(row['wrong']):.0%} | {row['auroc']} |")
    return "\n".join(lines)


def cases_line(results: Results) -> str:
    """The cases in a sentence, for the README."""
    found = [
        f"{row['case']} ({row['pairs']} pairs) {float(row['auroc']):.3f}"
        for row in results.rows
        if row["part"] == "cases"
    ]
    return f"AUROC of the gate's ledger on harder labels, one seed: {'; '.join(found)}."


def main() -> None:
    """Completes the CSV, writes `ledger.md`, refreshes the README's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="without it, only the tables are written anew")
    work, results = parser.parse_args().work, Results(results_path("ledger"))
    if work is not None:
        scales(work, results)
    row = next(r for r in results.rows if r["part"] == "methods")
    pairs = {r["seed"]: r["pairs"] for r in results.rows if r["part"] == "methods"}
    about = (
        f"{row['device']}, {row['threads']} thread(s), torch {row['torch']}, {row['commit']}, "
        f"{row['date']}; {' and '.join(pairs.values())} pairs of digits (seed "
        f"{' and '.join(pairs)}), 4 visits. Mean over seeds (range). Cost: one micro-batch of 16 "
        "with a live reference, without the optimiser, over the policy's bare forward and "
        "backward; dpo and the ledger run the same passes, so their differences are noise. dpo's "
        "AUROC is that of a ledger that only watches."
    )
    wide = "Rows below that name a batch or LoRA come from 1,045 pairs, votes alone."
    tables = [methods_table(results), scales_table(results), cases_table(results)]
    text = f"# The ledger\n\n{about} {wide}\n\n" + "\n\n".join(tables) + "\n"
    results.path.with_suffix(".md").write_text(text)
    readme = ROOT / "README.md"
    body = f"{about}\n\n{tables[0]}\n\n{cases_line(results)}"
    write_text(readme, with_section(readme.read_text(), "ledger", body))


if __name__ == "__main__":
    main()
