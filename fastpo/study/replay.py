"""On which scale should a margin vote? Replays recorded votes, and writes the tables.

    python -m fastpo.study.replay [--work FOLDER]

FOLDER is that of `fastpo/study/ledger.py`, whose CSV this completes and turns into `ledger.md`
beside it and into the README's table. Plain DPO's votes are replayed, since no ledger had a hand in
them: as they were, with outliers put among them, and through a ledger with other constants.

`view` is what the model predicts. The demo's predicts the velocity v; the same network's answer for
the noise is `sigma x + signal v`, so the squared errors, and margins, are `signal^2` times as
large: what a ledger would see under SD1.5's and SDXL's parametrization.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import fastpo.ledger
from fastpo.bench.measure import ROOT
from fastpo.bench.script import results_path
from fastpo.bench.table import with_section
from fastpo.demo.base import SCHEDULE
from fastpo.ledger import BINS, CERTAIN, DOUBT, PRIOR, WINDOW, PairLedger
from fastpo.study.draws import draws_table
from fastpo.study.ledger import METHODS, Results
from fastpo.study.measure import area
from fastpo.system.files import write_text

OURS = "leveled and worth (ours)"
KEPT = ("methods", "cost", "cases", "draws")  # rows of runs, not of replays
CONSTANTS = {
    "BINS": (5, 20),
    "WINDOW": (32.0, 1e12),
    "PRIOR": (8.0, 128.0),
    "DOUBT": (8.0, 128.0),
    "LEVEL": (1.0, 4.0),
    "ABSURD": (30.0, 1e9),
}
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


def rms_and_worth(_: int):
    """Divided by the bin's running rms, weighed by how far the bin follows the labels."""
    moments = np.zeros((3, BINS))

    def votes(timestep: np.ndarray, margin: np.ndarray) -> np.ndarray:
        bins = timestep.astype(int) * BINS // 1000
        added = [np.bincount(bins, w, BINS) for w in ((margin != 0) * 1.0, margin, margin**2)]
        moments[:] = moments * np.exp(-added[0] / WINDOW) + added
        count, total, power = moments
        rms = np.sqrt(power / np.maximum(count, 1e-9)) + 1e-300
        overall = (total / rms).sum() / (count.sum() + DOUBT)
        s = ((total / rms + PRIOR * overall) / (count + PRIOR)).clip(0.0, CERTAIN)
        return margin * (s / (1 - s**2) / rms)[bins]

    return votes


SCALES: dict[str, Scale | None] = {
    "sign": sign,
    "step rms": step_rms,
    "unscaled": unscaled,
    "timestep rms": timestep_rms,
    "timestep rms and worth": rms_and_worth,
    OURS: None,  # PairLedger itself
}


def none(votes: np.ndarray) -> None:
    """The run as it was."""


def one_in_a_hundred(votes: np.ndarray) -> None:
    """One margin in a hundred is a thousand times the run's rms, of either sign."""
    generator = np.random.default_rng(0)
    found = np.flatnonzero(votes[:, 3])
    found = found[generator.random(len(found)) < 0.01]
    votes[found, 3] = generator.choice([-1e3, 1e3], len(found)) * rms_of(votes)


def one_a_bin(votes: np.ndarray, place: int = 9) -> None:
    """The tenth margin of every bin is; a bin of fewer has none."""
    generator, size = np.random.default_rng(0), 1e3 * rms_of(votes)
    seen = np.flatnonzero(votes[:, 3])
    bins = votes[seen, 2].astype(int) * BINS // 1000
    for k in range(BINS):
        votes[seen[bins == k][place : place + 1], 3] = generator.choice([-1, 1]) * size


def first_of_a_bin(votes: np.ndarray) -> None:
    """The first margin of every bin is."""
    one_a_bin(votes, 0)


def bursts(votes: np.ndarray) -> None:
    """Twice in the run, 80 margins in a row are three hundredfold."""
    seen = np.flatnonzero(votes[:, 3])
    for start in (len(seen) // 10, len(seen) // 2):
        votes[seen[start : start + 80], 3] *= 300


OUTLIERS = {
    "none": none,
    "1 in 100": one_in_a_hundred,
    "each bin's tenth": one_a_bin,
    "each bin's first": first_of_a_bin,
    "two bursts of 80": bursts,
}


def rms_of(votes: np.ndarray) -> float:
    """Of the margins that are not zero."""
    margin = votes[:, 3]
    return float(np.sqrt((margin[margin != 0] ** 2).mean()))


@dataclass(frozen=True)
class Replayed:
    """One recorded run under one parametrization, cut into steps in one way."""

    name: str
    rate: float
    seed: int
    view: str
    group: int | None  # pairs a step; None: as run
    votes: np.ndarray
    flipped: np.ndarray

    @property
    def visits(self) -> list[int]:
        """One, and all."""
        return sorted({1, len(self.votes) // len(self.flipped)})

    def auroc(self, scale: Scale | None, visits: int, change: Callable = none) -> float:
        """AUROC of the doubt after some visits of every pair."""
        votes = self.votes.copy()
        change(votes)
        doubt = replay(votes, len(self.flipped), scale, self.group, visits)
        return area(self.flipped, doubt)


def replayed(work: Path) -> Iterator[Replayed]:
    """Every recorded run of plain DPO."""
    signal2 = DDPMScheduler(**SCHEDULE).alphas_cumprod.double().numpy()
    for path in sorted((work / "votes").glob("dpo*.npz")):
        name, rate, seed = path.stem.rsplit("-", 2)
        kept = np.load(path)
        for view in ("velocity", "noise"):
            votes = kept["votes"].copy()
            if view == "noise":
                votes[:, 3] *= signal2[votes[:, 2].astype(int)]
            for group in (None, 1) if name == "dpo" else (None,):
                yield Replayed(name, float(rate), int(seed), view, group, votes, kept["flipped"])


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


def scales(runs: list[Replayed], results: Results) -> None:
    """AUROC of every scale on every run, after one visit and after all."""
    for run in runs:
        for visits in run.visits:
            for label, scale in SCALES.items():
                batch = "one pair a step" if run.group else "as run"
                results.add(
                    part="scale",
                    case=f"{run.name}; {run.view}; {batch}; {visits} visits",
                    method=label,
                    flip_rate=run.rate,
                    seed=run.seed,
                    pairs=len(run.flipped),
                    wrong=float(run.flipped.mean()),
                    auroc=run.auroc(scale, visits),
                )


def outliers_and_constants(runs: list[Replayed], results: Results) -> None:
    """Both ledgers among outliers, and ours with other constants, over all runs."""
    before = {place: [r.auroc(rms_and_worth, r.visits[place]) for r in runs] for place in (0, -1)}

    def add(part: str, case: str, method: str, change: Callable = none) -> None:
        for place, visits in ((0, "one visit"), (-1, "all visits")):
            found = [r.auroc(SCALES[method], r.visits[place], change) for r in runs]
            worst = min(b - a for a, b in zip(before[place], found, strict=True))
            case_ = f"{case}; {visits}"
            results.add(part=part, case=case_, method=method, auroc=np.mean(found), worst=worst)

    for case, change in OUTLIERS.items():
        for method in ("timestep rms and worth", OURS):
            add("outliers", case, method, change)
    for name, values in CONSTANTS.items():
        for value in values:
            with constant(name, value):
                add("constants", f"{name} = {value:g}", OURS)


@contextmanager
def constant(name: str, value: float) -> Iterator[None]:
    """A ledger with another constant."""
    before = getattr(fastpo.ledger, name)
    setattr(fastpo.ledger, name, value)
    try:
        yield
    finally:
        setattr(fastpo.ledger, name, before)


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


def means_table(results: Results, part: str) -> str:
    """Mean AUROC over the runs after one visit and after all, and the largest change of a run."""
    rows = [r for r in results.rows if r["part"] == part]
    if part == "constants":
        none_ = [r for r in results.rows if r["part"] == "outliers" and r["method"] == OURS]
        rows = [{**r, "case": r["case"].replace("none", "as they are")} for r in none_[:2]] + rows
    methods = list(dict.fromkeys(r["method"] for r in rows))
    cases = list(dict.fromkeys(r["case"].rpartition(";")[0] for r in rows))
    head = [part, *(f"{m}, {v}" for m in methods for v in ("one visit", "all visits"))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases:
        cells = [
            f"{float(r['auroc']):.3f} ({float(r['worst']):+.3f})"
            for m in methods
            for r in rows
            if r["method"] == m and r["case"].rpartition(";")[0] == case
        ]
        lines.append("| " + " | ".join([case, *cells]) + " |")
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
    parser.add_argument("--csv", type=Path, default=results_path("ledger"), help="the rows' file")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="gets the table")
    options = parser.parse_args()
    work, results = options.work, Results(options.csv)
    if work is not None:
        results.rows = [r for r in results.rows if r["part"] in KEPT]
        runs = list(replayed(work))
        scales(runs, results)
        outliers_and_constants(runs, results)
    row = next(r for r in results.rows if r["part"] == "methods")
    pairs = {r["seed"]: r["pairs"] for r in results.rows if r["part"] == "methods"}
    about = (
        f"{row['device']}, {row['threads']} thread(s), torch {row['torch']}, {row['commit']}, "
        f"{row['date']}; {' and '.join(pairs.values())} pairs of digits (seed "
        f"{' and '.join(pairs)}), 4 visits. Mean over seeds (range). Cost: one micro-batch of 16 "
        "with a live reference, without the optimizer, over the policy's bare forward and "
        "backward; dpo and the ledger run the same passes, so their differences are noise. dpo's "
        "AUROC is that of a ledger that only watches."
    )
    wide = "Rows below that name a batch or LoRA come from 1,045 pairs, votes alone."
    over = (
        "Outliers, and other constants of the ledger: mean AUROC over all rows above that differ "
        "in more than the scale, and in brackets the largest loss of one of them against `timestep "
        "rms and worth` without outliers. The bursts' 160 margins are half the votes of some pairs "
        "after one visit."
    )
    constants = (
        f"The ledger's own: {', '.join(f'{n} = {getattr(fastpo.ledger, n):g}' for n in CONSTANTS)}."
    )
    drawn = (
        "Several timesteps and noises a visit that vote together, of plain DPO; in brackets the "
        "passes through the denoiser for each pair until then, with a live reference and with a "
        "cached one, whose own passes are not counted."
    )
    tables = [methods_table(results), scales_table(results), cases_table(results)]
    if table := draws_table(results):
        tables += [drawn, table]
    more = [over, means_table(results, "outliers"), constants, means_table(results, "constants")]
    text = f"# The ledger\n\n{about} {wide}\n\n" + "\n\n".join([*tables, *more]) + "\n"
    write_text(results.path.with_suffix(".md"), text)
    body = f"{about}\n\n{tables[0]}\n\n{cases_line(results)}"
    write_text(options.readme, with_section(options.readme.read_text(), "ledger", body))


if __name__ == "__main__":
    main()
