"""The methods that a study compares: what each changes of plain DPO, or how it trains.

A method is one entry of `METHODS`. Most are changes of the trainer's configuration; `by_flips` ones
depend on the share of wrong labels, which they are told; a method that is no single run has a
function of its own, which gets the run's configuration and returns what it trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.config import Config, flatten, parse_config, with_keys
from fastpo.data.prepare import prepare
from fastpo.demo.run import LEDGER, RELEASED, passes_of_run
from fastpo.errors import CheckpointError
from fastpo.review.evidence import load_verdicts
from fastpo.review.relabel import Rules, relabel
from fastpo.study import co_teaching, rivals
from fastpo.system.files import write_text
from fastpo.train import train

BETA = 100.0  # the demo's slope
TARGET = 2.0  # the logit on which IPO regresses its margins, in DPO's slope


@dataclass(frozen=True)
class Trained:
    """What a method made.

    Attributes:
        run: The folder of the run whose `final` is the result.
        verdicts: That of the run whose metric tells wrong labels.
        passes: Through the denoiser, for each pair of the data, of all runs: forward 1, backward 2.
    """

    run: Path
    verdicts: Path
    passes: float


Changes = Mapping[str, Any]
Train = Callable[[Config], Trained]


def train_once(config: Config) -> Trained:
    """Trains one run, or goes on with it.

    Raises:
        CheckpointError: A version with other defaults began it, or a file of it is damaged.
    """
    folder = config.train.output_dir
    try:
        run = train(config, resume=folder.exists(), progress=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove {folder}, and it is made anew") from None
    return Trained(run, run, passes_of_run(config))


def drop_and_restart(config: Config) -> Trained:
    """Trains with the ledger's gate, drops the pairs that it doubts, and begins anew with DPO.

    The verdicts are the calibrated probabilities of `fastpo relabel`, at 1/2; where none could be
    learned, the ledger's metric u, at 1/2. The second run takes the first one's objective without
    gate and ledger, on the copy of the data that is left.
    """
    folder = config.train.output_dir
    first = _with(config, {"train.output_dir": str(folder / "first")})
    judged = train_once(first)
    cleaned = folder / "cleaned"
    if not (cleaned / "summary.json").is_file():
        relabel(judged.run, cleaned, _doubted(judged.run), progress=False)
    second = _with(
        config,
        {
            "data.source": "folder",
            "data.path": str(cleaned),
            "prepare.cache_dir": str(folder / "cache"),
            "train.output_dir": str(folder / "second"),
            "train.objective": {"name": "dpo", "beta": config.train.objective.logit_slope()},
            "train.annotators": None,
            "train.backward": "all",
        },
    )
    prepare(second, progress=False)
    trained = train_once(second)
    kept = _pairs(trained.run) / _pairs(judged.run)
    return Trained(trained.run, judged.run, judged.passes + kept * trained.passes)


def _doubted(run: Path) -> Rules:
    """Drops the pairs whose label a run finds more likely wrong than right."""
    verdicts = load_verdicts(run)
    if verdicts.calibration is not None:
        return Rules(threshold=0.5)
    marks = run.parent / "doubted.jsonl"
    wrong = verdicts.judged & (verdicts.minority >= 0.5)
    names = (name for name, doubted in zip(verdicts.pair_ids, wrong, strict=True) if doubted)
    lines = (json.dumps({"pair_id": name, "verdict": "wrong"}) + "\n" for name in names)
    write_text(marks, "".join(lines))
    return Rules(marks=marks, action="drop")


def semi_dpo(config: Config) -> Trained:
    """See `fastpo.study.rivals.semi_dpo`."""
    run, passes = rivals.semi_dpo(config)
    return Trained(run, run, passes)


def em_mixture(config: Config) -> Trained:
    """See `fastpo.study.rivals.em_mixture`."""
    run = rivals.em_mixture(config)
    return Trained(run, run, passes_of_run(config))


def two_that_teach(config: Config) -> Trained:
    """See `fastpo.study.co_teaching`; both models' passes count."""
    run = co_teaching.co_teaching(config)
    return Trained(run, run, 2.0 * passes_of_run(config))


def told_which(config: Config) -> Trained:
    """See `fastpo.study.rivals.told`."""
    run = rivals.told(config)
    return Trained(run, run, passes_of_run(config))


def _with(config: Config, changes: Mapping[str, Any]) -> Config:
    return parse_config(with_keys(config.model_dump(mode="json"), changes))


def _pairs(run: Path) -> int:
    """How many pairs a run was trained on."""
    with (run / "minority.csv").open(encoding="utf-8") as file:
        return sum(1 for _ in file) - 1


@dataclass(frozen=True)
class Method:
    """One way of training.

    Attributes:
        about: What it is, for the page.
        changes: Sections and keys of `train` that differ from plain DPO's; an objective keeps the
            slope unless it names its own.
        by_flips: Further ones, from the share of labels that the study flips.
        train: How its runs are made.
        version: Raised when `train` comes to do something else, so that earlier rows no longer
            count.
    """

    about: str
    changes: Changes = field(default_factory=dict)
    by_flips: Callable[[float], Changes] | None = None
    train: Train = train_once
    version: int = 1

    def apply(self, raw: Mapping[str, Any], flip_rate: float) -> dict[str, Any]:
        """Returns plain DPO's configuration, as nested mappings, with the method's changes."""
        changes = dict(self.changes)
        if self.by_flips is not None:
            changes |= self.by_flips(flip_rate)
        result = with_keys(raw, {"data.flip_rate": flip_rate})
        if "objective" in changes:  # another objective has other options
            objective = dict(changes.pop("objective"))
            if objective["name"] not in SLOPELESS:
                objective = {"beta": result["train"]["objective"]["beta"], **objective}
            result = with_keys(result, {"train.objective": objective})
        return with_keys(result, flatten({"train": changes}))


SLOPELESS = ("sft", "ipo", "mapo")
"""Objectives that have no slope, or none that is comparable with DPO's."""


def _adaptive(name: str = "adaptive_dpo", **options: Any) -> dict[str, Any]:
    """The ledger's gate, with other options of the objective."""
    return {**LEDGER, "objective": {**LEDGER["objective"], "name": name, **options}}


def _smoothed(name: str) -> Callable[[float], Changes]:
    return lambda share: {"objective": {"name": name, "label_smoothing": share}}


METHODS: dict[str, Method] = {
    "dpo": Method("Diffusion-DPO"),
    "sft": Method("fine-tuning on the preferred images", {"objective": {"name": "sft"}}),
    "conservative": Method(
        "DPO with label smoothing by the true share of wrong labels", by_flips=_smoothed("dpo")
    ),
    "robust": Method(
        "robust DPO, which is told the true share of wrong labels", by_flips=_smoothed("robust_dpo")
    ),
    "ipo": Method(
        "IPO, its target where DPO's logit is 2",
        {"objective": {"name": "ipo", "tau": BETA / (2.0 * TARGET)}},
    ),
    "mapo": Method("MaPO, without a reference", {"objective": {"name": "mapo"}}),
    "poly_dpo": Method("Poly-DPO", {"objective": {"name": "poly_dpo"}}),
    "adaptive_dpo_ema": Method("Adaptive-DPO as released: moving averages vote", RELEASED),
    "adaptive_dpo_ledger": Method("Adaptive-DPO with the ledger and its gate", LEDGER),
    "adaptive_dpo_none": Method(
        "Adaptive-DPO without annotators: the policy's own margin votes",
        {"objective": RELEASED["objective"]},
    ),
    "adaptive_ipo": Method(
        "Adaptive-IPO with the ledger and its gate",
        _adaptive("adaptive_ipo", tau=BETA / (2.0 * TARGET)),
    ),
    "weights_only": Method(
        "the ledger's soft weights, no margin", _adaptive(weight_kind="linear", margin_scale=0.0)
    ),
    "margin_only": Method(
        "the ledger's margin, all weights alike", _adaptive(weight_kind="linear", weight_scale=0.0)
    ),
    "drop_and_restart": Method(
        "the pairs that the ledger doubts are dropped, then DPO from the base",
        LEDGER,
        train=drop_and_restart,
    ),
    "rounds": Method(
        "up to three rounds from the base, labels that the round before doubts turned round",
        {
            **LEDGER,
            "backward": "sampled",
            "rounds": 3,
            "round_epochs": 4,
            "rounds_turn": 0.5,
        },
    ),
    "semi_dpo": Method(
        "Semi-DPO re-created: labels by interval of the timesteps, from a model trained on a fifth "
        "of the pairs, which it is told are right",
        train=semi_dpo,
    ),
    "em_mixture": Method(
        "DPO on soft labels, from a mixture of right and wrong ones that is learned as it trains",
        train=em_mixture,
    ),
    "co_teaching": Method(
        "Co-teaching re-created: each of two models picks the pairs with small losses that the "
        "other one learns from; it is told the true share of wrong labels",
        train=two_that_teach,
    ),
    "told_which": Method(
        "DPO that is told which labels are wrong and leaves their pairs out: no method can know "
        "that",
        train=told_which,
    ),
}
"""By name. At a share of 0 `conservative` is plain DPO, and shares its run."""
