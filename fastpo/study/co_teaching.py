"""Co-teaching: two models, each of which picks the pairs that the other one learns from.

Re-created from Han et al. 2018 (arXiv 1804.06872, algorithm 1). Both models see the same
mini-batches. Of each batch each model picks the share R(T) with the smallest losses, and the other
one takes its step on these, with

    R(T) = 1 - tau min(T / T_k, 1),

T the epochs so far and tau the share of wrong labels, which the method is told. Two models make
other mistakes, so that one's wrong picks are not what it has learned itself.

What the setting makes different: both begin as the base, so they differ by their draws of
timesteps and noise (and, with LoRA, by the adapters' first values) and not by random weights; the
loss is DPO's; T_k is one epoch instead of the paper's 10 of 200, since a run has a few in all. The
result is the first model. Such a run is not resumed: one that was killed begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastpo.config import Config, parse_config, with_keys
from fastpo.models.folder import ModelFolder
from fastpo.study.own_steps import train_with
from fastpo.train.experiment import Experiment
from fastpo.train.metrics import StepResult
from fastpo.train.step_parts import JudgedBatch
from fastpo.train.trainer import Trainer, setup_trainer
from fastpo.types import PairBatch

GRADUAL = 1.0
"""T_k, epochs until the full share is left out."""


def small_losses(margin: Tensor, share: float) -> Tensor:
    """Picks the pairs of a batch with the smallest losses.

    DPO's loss `-log sigmoid(beta d)` falls with the margin d, so these have the largest margins.

    Args:
        margin: `(B,)` d.
        share: How many of them, rounded down, but one at least.

    Returns:
        `(B,)` float32 weights: B / n for the n pairs that are picked, so that a mean over the batch
        is the mean over them; 0 for the others.
    """
    count = max(1, int(share * len(margin)))
    weight = torch.zeros(len(margin), device=margin.device)
    weight[margin.argsort(descending=True, stable=True)[:count]] = len(margin) / count
    return weight


@dataclass(frozen=True)
class Heard:
    """A micro-batch after the forward pass, with the graph for the backward pass."""

    judged: JudgedBatch
    policy: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Pupil(Trainer):
    """Learns from the pairs that it is given, of batches whose forward pass is done.

    Attributes:
        lessons: The step's micro-batches that wait for their backward pass.
    """

    lessons: list[Heard]

    def hear(self, batch: PairBatch, step: int) -> Heard:
        """Makes a batch's forward pass."""
        judged = self.judged(batch, step)
        with self.processes.autocast():
            policy = self.denoisers.predict(self.policy, judged.noised, judged.batch.conditions)
        return Heard(judged, policy, self.pair_loss(judged, policy.detach()).margin)

    def learn(self, heard: Heard, picked: Tensor) -> None:
        """Keeps a batch for its backward pass, with the weights `(B,)` that the other one gives."""
        given = heard.judged.weight
        weight = picked if given is None else given * picked
        self.lessons.append(replace(heard, judged=replace(heard.judged, weight=weight)))

    def training_step(self, batch: PairBatch, step: int) -> tuple[Tensor, Tensor]:
        """The loss of a batch that was heard, and its rows; see `Trainer`."""
        heard = self.lessons.pop(0)
        out = self.pair_loss(heard.judged, heard.policy)
        share = len(batch) / self.config.micro_batch_size
        return out.loss * share, self.rows(heard.judged, out)


@dataclass(frozen=True)
class CoTeacher(Pupil):
    """The first model, which takes the second one along.

    Attributes:
        other: The second model.
        remembered: R(T), by finished steps.
    """

    other: Pupil
    remembered: Callable[[int], float]

    def optimizer_step(
        self,
        batches: Iterator[PairBatch],
        step: int,
        must_end: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """One step of both models on the same micro-batches; returns the first one's."""
        window = [next(batches) for _ in range(self.config.accumulation_steps)]
        share = self.remembered(step)
        for batch in window:
            mine, theirs = self.hear(batch, step), self.other.hear(batch, step)
            self.learn(mine, small_losses(theirs.margin, share))
            self.other.learn(theirs, small_losses(mine.margin, share))
        self.other.record(self.other.optimizer_step(iter(window), step).read())
        return super().optimizer_step(iter(window), step, must_end)


def co_teaching(config: Config) -> Path:
    """Trains two models by co-teaching; returns the folder of the first one's run.

    It is told the share of wrong labels, `data.flip_rate`. The second model has the next seed for
    its draws.
    """
    raw = config.model_dump(mode="json")
    second = parse_config(with_keys(raw, {"seed": config.seed + 1}))

    def both(run: Experiment) -> CoTeacher:
        assert run.processes.count == 1 and config.train.lora.dropout == 0.0, "a study's runs"
        model = ModelFolder.resolve(config.model)
        other = setup_trainer(second, model, run.data, run.processes)

        def remembered(step: int) -> float:
            return 1.0 - config.data.flip_rate * min(run.data.epoch(step) / GRADUAL, 1.0)

        return CoTeacher(
            **vars(run.trainer),
            lessons=[],
            other=Pupil(**vars(other), lessons=[]),
            remembered=remembered,
        )

    return train_with(config, both)
