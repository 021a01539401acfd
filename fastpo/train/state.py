"""What changes while a run trains, and what a checkpoint therefore holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastpo.ledger import PairLedger
from fastpo.train.auto_slope import AutoSlope
from fastpo.train.batch_statistics import Statistics
from fastpo.train.best import BestHeldOut
from fastpo.train.ema import MovingAverages
from fastpo.train.live_share import LiveShare
from fastpo.train.weights import PolicyWeights
from fastpo.train.winner_watch import WinnerWatch


class Round(BaseModel):
    """One of a run's rounds, see `fastpo.train.rounds`; a checkpoint keeps it.

    Attributes:
        number: From 1.
        start: Finished steps when it began.
        last: Whether the run ends with it.
        changed: Share of the verdicts that changed in the round before; None in the first.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    number: int = 1
    start: int = 0
    last: bool = True
    changed: float | None = None


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes while training, besides the step's number.

    Attributes:
        trainable: The policy's trainable parameters by name.
        weights: Where these and their optimizer's state lie.
        optimizer: Their optimizer.
        schedule: The learning-rate schedule.
        ledger: Every pair's votes.
        last_minority: `(num_pairs,)` the minority metric that moving averages gave each pair last,
            NaN before.
        averages: Moving averages by role (`annotators`, `export`).
        scaler: The gradient scaler (fp16), or None.
        statistics: Running batch statistics, where the run keeps any.
        slope: The slope that follows the margins, where it does.
        live_share: How many rows of late a second pass would have, with `train.backward`.
        winners: Tells when the policy gets worse at the winners, where there is a reference.
        best: The best measurement on held-out pairs.
        turned: `(num_pairs,)` bool, the cache's own: pairs that come with their label turned round.
        round: The round that is under way.
        began: `(num_pairs,)` bool, the labels that looked wrong when it began.
    """

    trainable: dict[str, nn.Parameter]
    weights: PolicyWeights
    optimizer: Optimizer
    schedule: LRScheduler
    ledger: PairLedger
    last_minority: Tensor
    averages: dict[str, MovingAverages]
    scaler: Any = None
    statistics: Statistics | None = None
    slope: AutoSlope | None = None
    live_share: LiveShare | None = None
    winners: WinnerWatch | None = None
    best: BestHeldOut = field(default_factory=BestHeldOut)
    turned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    round: Round = field(default_factory=Round)
    began: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
