"""`fastpo demo`: from nothing to a page, through the code path that aligns SDXL or SD3.

It trains and keeps a tiny base, writes preferences in Pick-a-Pic v2's schema, and then does what a
user of such a model does: prepare, train, evaluate, report. Five runs are compared: plain DPO on
the clean labels (the reachable best), and on labels of which a fifth are flipped plain DPO,
Adaptive-DPO as released, Adaptive-DPO with the ledger as annotator and without a backward pass for
the pairs that it leaves out, and two rounds of it, the second begun from the base with the labels
that the first one doubts turned round. Runs are trained side by side, one on each core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from fastpo.config import Config, flatten, parse_config, with_keys
from fastpo.config.sections import EmaAnnotators
from fastpo.data.prepare import prepare
from fastpo.demo.base import ABOUT, FAMILIES, PLAIN, build_base, demo_family
from fastpo.demo.base import SHORT as SHORT_BASE
from fastpo.demo.digits import prompts
from fastpo.demo.preferences import write_preferences
from fastpo.errors import FastPOError
from fastpo.evaluate.compare import Evaluation, evaluate, sample_base
from fastpo.report import load_metrics, minority_auroc, write_report
from fastpo.system.files import write_json
from fastpo.system.ownership import Kind, claim
from fastpo.system.pool import told, workers
from fastpo.system.signals import catch_signals
from fastpo.system.storage import storage_errors
from fastpo.train import train

N_PAIRS, N_PAIRS_SHORT = 1400, 100  # with ties, which are dropped
RELEASED = {
    "objective": {
        "name": "adaptive_dpo",
        "normalize": "rms",
        "rho": 3.75,  # what 15 is over the released batch of 16, whatever the batch
        "weight_kind": "linear",
    },
    "annotators": {"kind": "ema", "decays": [0.9999, 0.5]},
}
LEDGER = {
    "objective": {"name": "adaptive_dpo", "weight_kind": "gate"},
    "annotators": {"kind": "ledger"},
    "backward": "alive",  # no backward pass for pairs whose gate is closed; the same results
}
ROUNDS = {
    **LEDGER,
    "backward": "sampled",  # of small gradients a part, too
    "rounds": 2,
    "round_epochs": 4,
    "rounds_turn": 0.5,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo_clean": {"data": {"flip_rate": 0.0}},
    "dpo": {},
    "adaptive_dpo_released": {"train": RELEASED},
    "adaptive_dpo_ledger": {"train": LEDGER},
    "rounds": {"train": ROUNDS},
}
BEGUN = ("adaptive_dpo_released", "dpo_clean", "dpo", "rounds", "adaptive_dpo_ledger")
"""The order in which runs begin: two processes end at about the same time then."""
DEMO = Kind(
    "a demo",
    "",
    lambda folder: any(
        (folder / f"base{family.suffix}{length}" / ABOUT).is_file()
        for family in FAMILIES.values()
        for length in ("", "-short")
    ),
)
SHORT = {
    "train": {"epochs": None, "max_steps": 4, "round_epochs": None},
    "evaluate": {"seeds_per_prompt": 1},
}


@storage_errors()
def run_demo(
    out: Path,
    *,
    seed: int = 0,
    short: bool = False,
    family: str = PLAIN,
    processes: int | None = None,
) -> dict[str, Any]:
    """Runs the demo and prints where its page is.

    Args:
        out: Folder for the base, the data, the runs, the page and `summary.json`. The base is kept
            for the next call; everything of this seed is made anew.
        seed: Seed of the preferences, the flipped labels and the training.
        short: Only try every step (a few seconds each); the numbers then mean nothing.
        family: What the base is: one of `fastpo.demo.base.FAMILIES`. Each has folders of its own.
        processes: Runs at a time, each with one thread; default: one on each core, and in short
            one after another.

    Returns:
        What `summary.json` holds.

    Raises:
        ForeignPathError: `out` holds other things, and no demo.
        ConfigError: The demo has no such family.
        FastPOError: A run failed.
    """
    kind = demo_family(family)
    claim(out, DEMO)
    console, started = Console(stderr=True), time.perf_counter()
    console.rule(f"1 base: {kind.title} that draws handwritten digits")
    suffix = kind.suffix + ("-short" if short else "")
    base = build_base(out / f"base{suffix}", recipe=SHORT_BASE if short else None, family=family)
    work = out / f"seed-{seed}{suffix}"
    console.rule("2 preferences: the bolder of two scans, one label in five flipped")
    preferences = write_preferences(
        work / "preferences", n_pairs=N_PAIRS_SHORT if short else N_PAIRS, seed=seed
    )
    paths = {"base": base, "preferences": preferences, "work": work}
    configs = {
        name: demo_config(name, paths, seed=seed, short=short, family=family) for name in OBJECTIVES
    }
    prepare(configs["dpo"])
    sample_base(configs["dpo"], work / "base-samples")
    at_once = min(processes or (1 if short else os.cpu_count() or 1), len(configs))
    console.rule(f"3 {len(configs)} runs, {at_once} at a time: train, then sample held-out prompts")
    summary = summarize(_evaluations(configs, work / "base-samples", at_once), configs)
    summary |= {"family": family, "seed": seed, "short": short}
    summary |= {"wall_s": round(time.perf_counter() - started, 1)}
    runs = [config.train.output_dir for config in configs.values()]
    page = write_report(
        runs, work / "report", title="FastPO demo: bolder digits", extra=sections(summary)
    )
    for place in (work / "summary.json", out / "summary.json"):
        write_json(place, summary)
    console.rule("done")
    console.print(f"{summary['wall_s']:.0f} s; numbers in {out / 'summary.json'}")
    print(page)
    return summary


def _evaluations(
    configs: Mapping[str, Config], base_samples: Path, processes: int
) -> dict[str, Evaluation]:
    """Makes the runs in processes, and tells of each when it is done.

    Raises:
        FastPOError: A run failed; those that are being made end too.
    """
    evaluations: dict[str, Evaluation] = {}
    items = [(configs[name], base_samples) for name in BEGUN]
    with catch_signals(), workers(processes) as work:
        for number, failure in work(make_run, items):
            name = BEGUN[number]
            if failure is not None:
                raise FastPOError(f"{name}: {failure}")
            Console(stderr=True).rule(f"{name}: {len(evaluations) + 1} of {len(configs)}")
            evaluations[name] = evaluate(configs[name], base_samples=base_samples)
    return {name: evaluations[name] for name in configs}


@told
def make_run(config: Config, base_samples: Path) -> None:
    """Trains one run and samples from it; `evaluate` then finds the images in its folder."""
    train(config, overwrite=True, progress=False)
    evaluate(config, base_samples=base_samples, progress=False)


def demo_config(
    name: str, paths: Mapping[str, Path], *, seed: int, short: bool, family: str = PLAIN
) -> Config:
    """The configuration of one of the demo's runs: `configs/demo.yaml`, folders, objective."""
    raw = yaml.safe_load(files("fastpo").joinpath("configs/demo.yaml").read_text())
    work = paths["work"]
    layers = [
        demo_family(family).options,
        {
            "seed": seed,
            "model": {"path": str(paths["base"])},
            "data": {"path": str(paths["preferences"]), "flip_seed": seed},
            "prepare": {"cache_dir": str(work / "cache")},
            "train": {"output_dir": str(work / name)},
            "evaluate": {"prompts": prompts(held_out=True)},
        },
        OBJECTIVES[name],
        SHORT if short else {},
    ]
    for layer in layers:
        raw = with_keys(raw, flatten(layer))
    return parse_config(raw, where=f"demo {name}")


def summarize(
    evaluations: Mapping[str, Evaluation], configs: Mapping[str, Config]
) -> dict[str, Any]:
    """The demo's numbers, as measured.

    `gain_kept` is a run's gain in reward over the base, divided by plain DPO's on clean labels;
    `passes` as `passes_of_run`; `data_wait` the mean share of a step in which training waited for
    data.
    """
    reward, legible = "ink_reward", "legible"
    first = evaluations["dpo_clean"].metrics
    reachable = first[reward].gain
    objectives = {}
    for name, evaluation in evaluations.items():
        metric = evaluation.metrics[reward]
        objectives[name] = {
            "reward_mean": metric.aligned_mean,
            "gain": metric.gain,
            "gain_kept": metric.gain / reachable if reachable > 0 else None,
            "win_rate": metric.win_rate,
            "win_rate_interval": list(metric.win_interval),
            "legibility": evaluation.metrics[legible].aligned_mean,
            "passes": passes_of_run(configs[name]),
        }
    found = {name: minority_auroc(config.train.output_dir) for name, config in configs.items()}
    waits = {
        name: float(load_metrics(config.train.output_dir)["data/wait"].mean())
        for name, config in configs.items()
    }
    return {
        "base": {
            "reward_mean": first[reward].base_mean,
            "legibility": first[legible].base_mean,
        },
        "objectives": objectives,
        "minority_auroc": found["adaptive_dpo_ledger"].get("ledger"),
        "minority_auroc_released": found["adaptive_dpo_released"].get("ema"),
        "minority_auroc_rounds": found["rounds"].get("ledger"),
        "flip_rate": configs["dpo"].data.flip_rate,
        "data_wait": waits,
    }


def passes_of_run(config: Config) -> float:
    """Returns the passes through the denoiser that a run took for each pair of the data.

    A forward pass counts 1, a backward pass 2: of the policy `metrics.jsonl` tells the mean, the
    live reference and each moving average take a forward pass a visit.
    """
    train, metrics = config.train, load_metrics(config.train.output_dir)
    policy = metrics["backward/cost"] if "backward/cost" in metrics else np.array([3.0])
    averages = len(train.annotators.decays) if isinstance(train.annotators, EmaAnnotators) else 0
    frozen = averages + (train.needs_reference and train.reference == "live")
    return (float(policy.mean()) + frozen) * float(metrics["epoch"][-1])


def sections(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says beside the comparison."""
    rows = [
        {
            "run": name,
            "reward": f"{values['reward_mean']:.3f}",
            "gain over the base": f"{values['gain']:+.3f}",
            "share of the clean gain": "-"
            if values["gain_kept"] is None
            else f"{values['gain_kept']:.0%}",
            "legible": f"{values['legibility']:.0%}",
            "passes a pair": f"{values['passes']:.1f}",
        }
        for name, values in summary["objectives"].items()
    ]
    about = (
        "Pairs of scans of the same handwritten digit, the bolder one preferred. In all runs but "
        "dpo_clean one label in five is flipped. The reward is the mean ink of an image that a "
        "classifier, fitted on the scans, reads as the prompted digit, and 0 for any other image. "
        "Prompts and seeds of the evaluation were used for nothing else."
    )
    return {"What is compared": about, "Share of the gain that is kept": rows}
