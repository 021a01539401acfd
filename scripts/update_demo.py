"""Writes the demo's table and picture from what `fastpo demo` left.

    python scripts/update_demo.py runs/demo 0 1
    python scripts/update_demo.py runs/demo 0 --family sd3

The first argument is the demo's folder, the others are the seeds that were run in it. The table of
SDXL goes into the README, that of SD3 into `docs/flow-models.md`.
"""

import argparse
import json
import shutil
from pathlib import Path

from fastpo._version import __version__
from fastpo.bench.table import with_section
from fastpo.system.files import write_text

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
FLOW_PAGE = DOCS / "flow-models.md"
NAMES = {
    "dpo_clean": "DPO, clean labels",
    "dpo": "DPO",
    "adaptive_dpo_released": "Adaptive-DPO as released",
    "adaptive_dpo_ledger": "Adaptive-DPO, ledger",
    "rounds": "The same, two rounds",
}


def table(summaries: dict[str, dict]) -> str:
    """Returns the Markdown table, one column group per seed."""
    head = ["run", *(f"gain, seed {seed}" for seed in summaries)]
    head += [*(f"kept, seed {seed}" for seed in summaries), "passes a pair"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key, name in NAMES.items():
        runs = [summary["objectives"][key] for summary in summaries.values()]
        cells = [f"{run['gain']:+.3f}" for run in runs]
        cells += [f"{run['gain_kept']:.0%}" for run in runs]
        passes = " and ".join(dict.fromkeys(f"{run['passes']:.1f}" for run in runs))
        lines.append("| " + " | ".join([name, *cells, passes]) + " |")
    return "\n".join(lines)


def text(summaries: dict[str, dict]) -> str:
    """Returns everything between the README's two marks."""
    first = next(iter(summaries.values()))
    flips = f"{first['flip_rate']:.0%}"
    found = " and ".join(f"{s['minority_auroc']:.3f}" for s in summaries.values())
    again = " and ".join(f"{s['minority_auroc_rounds']:.3f}" for s in summaries.values())
    wins = min(
        s["objectives"][name]["win_rate_interval"][0]
        for s in summaries.values()
        for name in ("adaptive_dpo_ledger", "rounds")
    )
    legible = min(o["legibility"] for s in summaries.values() for o in s["objectives"].values())
    base = first["base"]["reward_mean"]
    wait = max(share for s in summaries.values() for share in s["data_wait"].values())
    lines = (
        f"`make demo`, version {__version__}:",
        "pairs of handwritten digits, the bolder preferred,",
        f"{flips} of the labels flipped in all runs but the first.",
        f"Gain is mean ink over the base's ({base:.3f}) on held-out prompts and seeds;",
        "kept is the share of the gain that clean labels give;",
        "a forward pass through the denoiser counts 1, a backward pass 2.",
        f"\n\n{table(summaries)}\n\n",
        "The ledger judges a pair by its own past margins and costs no forward pass,",
        "and pairs that it leaves out need no backward pass "
        "([sparse steps](docs/sparse-steps.md));",
        f"it finds the flipped labels with an AUROC of {found}.",
        "A second [round](docs/rounds.md) begins anew from the base, with the labels that looked",
        f"wrong turned round (AUROC {again}).",
        "The win rate of both over the base has a 95 % interval that starts at",
        f"{wins:.3f} or above; at least {legible:.0%} of any run's samples are read",
        "as the digit that was asked for. Training waited for data",
        f"for {wait:.1%} of a step at most. A toy preference on a toy model: a lead, not a result.",
    )
    return " ".join(lines).replace(" \n", "\n").replace("\n ", "\n")


def flow_text(summaries: dict[str, dict]) -> str:
    """Returns everything between the two marks of the page on flow matching."""
    first = next(iter(summaries.values()))
    found, again = (
        " and ".join(f"{s[key]:.3f}" for s in summaries.values())
        for key in ("minority_auroc", "minority_auroc_rounds")
    )
    legible = min(o["legibility"] for s in summaries.values() for o in s["objectives"].values())
    base = first["base"]
    lines = (
        f"`fastpo demo --family sd3`, version {__version__}:",
        f"{first['flip_rate']:.0%} of the labels flipped in all runs but the first.",
        f"Gain is mean ink over the base's ({base['reward_mean']:.3f}) on held-out prompts and",
        "seeds, where an image that is not read as its digit counts 0;",
        "kept is the share of the gain that clean labels give.",
        f"\n\n{table(summaries)}\n\n",
        f"The ledger finds the flipped labels with an AUROC of {found}, in two rounds {again}.",
        f"Of the base's samples {base['legibility']:.0%} are read as the digit that was asked for,",
        f"of every run's at least {legible:.0%}. A toy preference on a toy model.",
    )
    return " ".join(lines).replace(" \n", "\n").replace("\n ", "\n")


def main() -> None:
    """Reads the summaries, rewrites the page, copies the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seeds", nargs="+")
    parser.add_argument("--family", choices=("sdxl", "sd3"), default="sdxl")
    options = parser.parse_args()
    suffix = "" if options.family == "sdxl" else f"-{options.family}"
    runs = {seed: options.folder / f"seed-{seed}{suffix}" for seed in options.seeds}
    summaries = {s: json.loads((run / "summary.json").read_text()) for s, run in runs.items()}
    for seed, summary in summaries.items():
        (DOCS / f"demo{suffix}-seed-{seed}.json").write_text(json.dumps(summary, indent=1) + "\n")
    grid = runs[options.seeds[0]] / "report" / "grid-adaptive_dpo_ledger.png"
    shutil.copyfile(grid, DOCS / f"demo{suffix}.png")
    page, body = (FLOW_PAGE, flow_text) if suffix else (README, text)
    write_text(page, with_section(page.read_text(), "demo", body(summaries)))


if __name__ == "__main__":
    main()
