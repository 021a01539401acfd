"""What rounds keep of plain DPO's gain where labels are wrong, and what they cost.

    python -m fastpo.study.rounds --work FOLDER [--seeds 0] [--flips 0.2 0.39 0.45] [--methods ...]

The demo's digits through the real trainer: 1,400 rows of preferences, a quarter of them ties. A run
that FOLDER holds is not repeated; one that was killed goes on. Passes are those through the policy
a pair of the data, forward 1 and backward 2; plain DPO has 18 in its six epochs.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import with_section, write_records
from fastpo.config import Config, flatten, parse_config, with_keys
from fastpo.data.prepare import prepare
from fastpo.demo.base import build_base
from fastpo.demo.preferences import write_preferences
from fastpo.demo.run import LEDGER, N_PAIRS, demo_config
from fastpo.evaluate import evaluate
from fastpo.report import load_metrics
from fastpo.study.ledger import area, minority_columns
from fastpo.system.files import write_text
from fastpo.train import train

EPOCHS = 6
SPARSE = {**LEDGER, "backward": "sampled"}
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "gate": LEDGER,
    "rounds": {**SPARSE, "rounds": 3, "round_epochs": 4, "rounds_turn": 0.5, "rounds_settled": 0.0},
}
FIELDS = (
    "method", "flip_rate", "seed", "pairs", "wrong", "gain", "kept", "legible", "auroc", "right",
    "passes", "times_dpo", "device", "threads", "torch", "commit", "date",
)  # fmt: skip


def configure(work: Path, base: Path, method: str, rate: float, seed: int) -> Config:
    """One run's configuration: the demo's, with a method's changes; its cache is prepared."""
    paths = {"base": base, "preferences": work / "preferences", "work": work}
    raw = demo_config("dpo", paths, seed=seed, short=False).model_dump(mode="json")
    changes = dict(METHODS[method])
    if "objective" in changes:  # another objective has other options; the slope stays
        beta = raw["train"].pop("objective")["beta"]
        changes["objective"] = {"beta": beta, **changes["objective"]}
    changes["output_dir"] = str(work / f"{method}-{rate}")
    return parse_config(with_keys(raw, flatten({"data": {"flip_rate": rate}, "train": changes})))


def measure(config: Config, work: Path) -> dict[str, Any]:
    """Trains and evaluates, or takes what is there; returns the numbers of one row."""
    prepare(config, progress=False)
    run = train(config, resume=True, progress=False)
    evaluation = evaluate(config, base_samples=work / "base-samples")
    names, flipped, metrics = minority_columns(run)
    lines = load_metrics(run)
    passes = 3.0 * EPOCHS
    if "backward/cost" in lines:
        passes = float(lines["backward/cost"].mean() * lines["epoch"][-1])
    both = flipped.any() and not flipped.all()
    return {
        "pairs": len(names),
        "wrong": float(flipped.mean()),
        "gain": evaluation.metrics["ink_reward"].gain,
        "legible": evaluation.metrics["legible"].aligned_mean,
        "auroc": area(flipped, metrics["ledger"]) if both else "",
        "right": float(((metrics["ledger"] >= 0.5) == flipped).mean()),
        "passes": passes,
        "times_dpo": passes / (3.0 * EPOCHS),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier call."""
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a table of Markdown, best share of the clean gain last."""
    names = ("labels wrong", "seed", "method", "gain", "of the clean gain", "legible", "AUROC")
    names += ("verdicts right", "passes a pair", "compute of DPO")
    head = "| " + " | ".join(names) + " |"
    lines = [head, "|---" * 10 + "|"]
    for row in sorted(rows, key=lambda r: (float(r["flip_rate"]), r["seed"], r["method"])):
        auroc = f"{float(row['auroc']):.4f}" if row["auroc"] else ""
        cells = [
            f"{float(row['wrong']):.0%}",
            row["seed"],
            row["method"],
            f"{float(row['gain']):.4f}",
        ]
        cells += [f"{float(row['kept']):.0%}", f"{float(row['legible']):.1%}", auroc]
        cells += [f"{float(row['right']):.1%}", f"{float(row['passes']):.1f}"]
        lines.append("| " + " | ".join([*cells, f"{float(row['times_dpo']):.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what the CSV lacks, and writes the table beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for base, data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--flips", type=float, nargs="+", default=[0.2, 0.39, 0.45])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--csv", type=Path, default=results_path("rounds"), help="the rows' file")
    parser.add_argument("--page", type=Path, help="gets the table, such as docs/rounds.md")
    options = parser.parse_args()
    rows, about = read_rows(options.csv), environment()
    base = build_base(options.work / "base")
    for seed in options.seeds:
        work = options.work / f"seed-{seed}"
        if not (work / "preferences").is_dir():
            write_preferences(work / "preferences", n_pairs=N_PAIRS, seed=seed)
        wanted = [(method, rate) for rate in options.flips for method in options.methods]
        for method, rate in [("dpo", 0.0), *wanted]:
            labels = {"method": method, "flip_rate": str(rate), "seed": str(seed)}
            if any(all(row[k] == v for k, v in labels.items()) for row in rows):
                continue
            found = measure(configure(work, base, method, rate, seed), work)
            clean = [
                float(r["gain"]) for r in rows if r["flip_rate"] == "0.0" and r["seed"] == str(seed)
            ]
            found["kept"] = found["gain"] / (clean[0] if clean else found["gain"])
            found = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
            rows.append({name: str({**about, **labels, **found}.get(name, "")) for name in FIELDS})
            write_records(rows, FIELDS, options.csv)
            if options.page is not None:
                text = options.page.read_text(encoding="utf-8")
                write_text(options.page, with_section(text, "rounds", table(rows)))


if __name__ == "__main__":
    main()
