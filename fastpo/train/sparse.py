"""Steps in which a pair without a gradient gets no backward pass: `train.backward`.

The loss's gradient at the policy's predictions, g = dloss/dprediction, is known after a forward
pass without gradients, whatever the objective and its statistics over the batch. Where g is zero
for both sides of a pair, the pair moves no weight. For the others the scalar `<prediction, g>`, g
held constant, has the same gradient by the weights as the loss. So a step has two parts: all pairs'
g, and a backward pass through the network for those that need one.

A step goes about it in one of two ways, whichever is cheaper (see `LiveShare`):

* at once: pairs whose gate the ledger has closed get a forward pass without gradients; the others
  one with, and their backward pass. Cost: 3 for an open pair, 1 for a closed one.
* probed: all pairs get a forward pass without gradients; those that need it, packed into as few
  micro-batches as they fill, a forward and a backward pass. Cost: 1, and 3 for each of these.

Statistics over the batch are those of all pairs in both, and so are margins, losses and votes. All
processes make equally many passes of each kind, as collectives demand; who has no pair left repeats
one with g = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.config import AdaptiveOptions, LedgerAnnotators
from fastpo.loss import PairLoss
from fastpo.train.live_share import LiveShare
from fastpo.train.metrics import Passes, table_rows
from fastpo.train.step_parts import JudgedBatch, StepParts
from fastpo.train.window import Place, Window, both_sides, some_noised
from fastpo.types import PairBatch
from fastpo_kernels.pair_noise import Stream, pair_uniform

Norm = Tensor | float | None


@dataclass(frozen=True)
class Answer:
    """What the loss says of a micro-batch, after a forward pass.

    Attributes:
        out: The loss.
        slopes: `(2B, C, h, w)` float32, its gradient at the predictions.
        scale: `(B,)` float64, see `gradient_scale`.
    """

    out: PairLoss
    slopes: Tensor
    scale: Tensor


def gradient_scale(slopes: Tensor, errors: Tensor, unit: float) -> Tensor:
    """How strongly a pair pulls: `B max_side |dloss/de| / unit`, `(B,)` float64.

    With N elements a side, `g = dloss/de 2 (prediction - target) / N`, hence
    `|dloss/de| = |g| sqrt(N / e) / 2`. The scale is zero exactly where g is.

    Args:
        slopes: `(2B, ...)`, g.
        errors: `(2B,)` the policy's errors e.
        unit: `|dloss/de|` of a pair of weight 1 on which policy and reference agree.
    """
    flat = slopes.double().flatten(1)
    slope = flat.norm(dim=1) * (flat.shape[1] / errors.double()).sqrt() / 2.0
    slope = slope.where((flat != 0).any(dim=1), 0.0)  # a side without error has no gradient either
    return torch.maximum(*slope.chunk(2)) * (len(slopes) // 2) / unit


def backward_weights(chance: Tensor, batch: PairBatch, *, seed: int) -> Tensor:
    """Weight of each pair's backward pass: 1/q with probability q, else 0; the mean is 1.

    The draw depends on seed, pair and visit alone.

    Args:
        chance: `(B,)` float64, q in [0, 1]; 0 gives 0.
        batch: The pairs, on the device.
        seed: The run's seed.
    """
    # Draws are multiples of 2^-24; so is q, that the mean is exact.
    chance = torch.ceil(chance * 2.0**24) * 2.0**-24
    draw = pair_uniform(batch.pair_key, batch.visit, seed=seed, stream=Stream.BACKWARD)
    return torch.where(draw < chance, 1.0 / chance, 0.0)


@dataclass(frozen=True)
class SparseStep:
    """The passes of one optimizer step.

    Attributes:
        trainer: What a step uses.
        step: Finished optimizer steps.
        check: Called between passes; raises where the run must end.
    """

    trainer: StepParts
    step: int
    check: Callable[[], None]

    def run(self, batches: Iterator[PairBatch]) -> tuple[list[Tensor], Norm]:
        """Makes the step's passes and moves the weights.

        Args:
            batches: This process's micro-batches, in host memory.

        Returns:
            The micro-batches' rows of `COLUMNS`, and the gradient's norm before clipping.
        """
        config = self.trainer.config
        window = Window(
            [next(batches) for _ in range(config.accumulation_steps)], config.micro_batch_size
        )
        closed = [self._closed(batch) for batch in window.batches]
        return (self._probed if self._share.probes else self._at_once)(window, closed)

    @property
    def _share(self) -> LiveShare:
        share = self.trainer.state.live_share
        assert share is not None, "a run with train.backward keeps it"
        return share

    def _closed(self, batch: PairBatch) -> Tensor:
        """Which pairs' weight is zero by the ledger's verdict alone, `(B,)` bool on the host."""
        config, ledger = self.trainer.config, self.trainer.state.ledger
        objective = config.objective
        gated = isinstance(objective, AdaptiveOptions) and objective.weight_kind == "gate"
        if not gated or not isinstance(config.annotators, LedgerAnnotators):
            return torch.zeros(len(batch), dtype=torch.bool)
        return ledger.minority(batch.index) >= 0.5

    def _at_once(self, window: Window, closed: list[Tensor]) -> tuple[list[Tensor], Norm]:
        """A micro-batch's open pairs are differentiated in their one forward pass."""
        trainer, tables = self.trainer, []
        answers = self._answers_of(window, closed)
        norm: Norm = None
        differentiated = False
        for k, batch in enumerate(window.batches):
            self.check()
            last = k + 1 == len(window.batches)
            with trainer.processes.pass_of_step(trainer.policy, last=last):
                judged = trainer.judged(batch, self.step)
                rows, policy = (~closed[k]).nonzero().flatten(), None
                if not len(rows) and trainer.processes.must_differentiate(last=last):
                    rows = torch.zeros(1, dtype=torch.int64)  # its gradient is zero
                if len(rows):
                    policy = self._predict_open(judged, rows)
                answer = self._judge(judged, _whole(policy, rows, answers[k], len(batch)))
                tables.append(self._rows(judged, answer, self._costs(closed[k])))
                if policy is not None:
                    sides = both_sides(rows, len(batch)).to(policy.device)
                    _backward(trainer, policy, answer.slopes[sides])
                    differentiated = True
                elif last and not differentiated:
                    _zero_gradients(trainer)
                norm = trainer.update()
        return tables, norm

    def _answers_of(self, window: Window, wanted: list[Tensor]) -> list[dict[int, Tensor]]:
        """Predictions without gradients of the wanted pairs, `(2, C, h, w)` each, by their row."""
        processes, packs = self.trainer.processes, window.packed(wanted)
        found: list[dict[int, Tensor]] = [{} for _ in window.batches]
        passes = processes.most(len(packs)) if processes.shares_weights else len(packs)
        for number in range(passes):
            self.check()
            places = packs[number] if number < len(packs) else [(0, 0)]
            batch, noised = self.trainer.noised(window.pairs(places))
            with torch.no_grad(), processes.autocast():
                model = self.trainer.denoisers.policy
                policy = self.trainer.denoisers.predict(model, noised, batch.conditions)
            if number < len(packs):
                sides = policy.float().unflatten(0, (2, -1)).unbind(1)
                for (k, row), answer in zip(places, sides, strict=True):
                    found[k][row] = answer
        return found

    def _predict_open(self, judged: JudgedBatch, rows: Tensor) -> Tensor:
        """The policy's predictions of some of a micro-batch's pairs, with their graph."""
        trainer, noised, conditions = self.trainer, judged.noised, judged.batch.conditions
        if len(rows) < len(judged.batch):
            here = rows.to(noised.index.device)
            noised = some_noised(noised, here)
            conditions = {name: tensor[here] for name, tensor in conditions.items()}
        with trainer.processes.autocast():
            return trainer.denoisers.predict(trainer.policy, noised, conditions)

    def _costs(self, closed: Tensor) -> Passes:
        """What pairs cost that are differentiated at once, or only looked at if closed."""
        kept = (~closed).double()
        return Passes(closed=closed, kept=kept, cost=1.0 + (self._share.dense - 1.0) * kept)

    def _probed(self, window: Window, closed: list[Tensor]) -> tuple[list[Tensor], Norm]:
        """All pairs are looked at; those that need a backward pass are packed."""
        trainer, tables, slopes, kept = self.trainer, [], [], []
        for k, batch in enumerate(window.batches):
            self.check()
            judged = trainer.judged(batch, self.step)
            with torch.no_grad(), trainer.processes.autocast():
                policy = trainer.denoisers.predict(
                    trainer.denoisers.policy, judged.noised, judged.batch.conditions
                )
            answer = self._judge(judged, policy.float())
            chance = self._share.chance(answer.scale)
            weight = backward_weights(chance, judged.batch, seed=trainer.seed)
            cost = 1.0 + self._share.dense * (weight > 0)
            tables.append(self._rows(judged, answer, Passes(closed[k], weight, cost)))
            sides = torch.cat([weight, weight]).float().view(-1, *[1] * (policy.ndim - 1))
            slopes.append(answer.slopes * sides)
            kept.append(weight > 0)
        wanted = torch.cat(kept).cpu().split([len(batch) for batch in window.batches])
        return tables, self._pull_back(window, window.packed(wanted), slopes)

    def _pull_back(
        self, window: Window, packs: list[list[Place]], slopes: Sequence[Tensor]
    ) -> Norm:
        """Backward passes over packed pairs, from the loss's gradient at their predictions."""
        trainer, norm = self.trainer, None
        processes = trainer.processes
        passes = processes.most(len(packs))
        if not passes and not processes.must_differentiate(last=True):
            with processes.pass_of_step(trainer.policy, last=True):
                _zero_gradients(trainer)
                return trainer.update()
        passes = max(passes, 1)
        for number in range(passes):
            self.check()
            places = packs[number] if number < len(packs) else [(0, 0)]
            pulls = torch.stack([slopes[k].unflatten(0, (2, -1))[:, row] for k, row in places], 1)
            if number >= len(packs):
                pulls = torch.zeros_like(pulls)
            with processes.pass_of_step(trainer.policy, last=number + 1 == passes):
                batch, noised = trainer.noised(window.pairs(places))
                with processes.autocast():
                    policy = trainer.denoisers.predict(trainer.policy, noised, batch.conditions)
                _backward(trainer, policy, pulls.flatten(0, 1))
                norm = trainer.update()
        return norm

    def _judge(self, judged: JudgedBatch, policy: Tensor) -> Answer:
        """The loss and its gradient at the predictions `(2B, C, h, w)` float32."""
        config, leaf = self.trainer.config, policy.detach().requires_grad_()
        out = self.trainer.pair_loss(judged, leaf)
        (slopes,) = torch.autograd.grad(out.loss, leaf)
        scale = gradient_scale(
            slopes, out.policy_error.detach(), self.trainer.objective.fresh_slope()
        )
        # A short micro-batch weighs by its pairs, so that every pair weighs the same.
        return Answer(out, slopes * (len(judged.batch) / config.micro_batch_size), scale)

    def _rows(self, judged: JudgedBatch, answer: Answer, passes: Passes) -> Tensor:
        size = self.trainer.config.micro_batch_size
        sparse = (answer.scale, passes)
        return table_rows(judged.batch, judged.noised.index, answer.out, size, sparse)


def _whole(policy: Tensor | None, rows: Tensor, answers: dict[int, Tensor], pairs: int) -> Tensor:
    """All pairs' predictions, `(2B, C, h, w)` float32, from those at `rows` and the others."""
    if policy is not None and len(rows) == pairs:
        return policy.detach().float()
    one = next(iter(answers.values()))
    whole = one.new_empty(2, pairs, *one.shape[1:])
    for row, answer in answers.items():
        whole[:, row] = answer
    if policy is not None:
        whole[:, rows.to(whole.device)] = policy.detach().float().unflatten(0, (2, -1))
    return whole.flatten(0, 1)


def _backward(trainer: StepParts, policy: Tensor, slopes: Tensor) -> None:
    """Differentiates `<policy, slopes>`, whose gradient by the weights is the loss's."""
    trainer.processes.backward((policy.float() * slopes).sum())


def _zero_gradients(trainer: StepParts) -> None:
    """Gives every weight the gradient that no pair has one leaves: zero, which is not none."""
    for parameter in trainer.state.trainable.values():
        parameter.grad = torch.zeros_like(parameter)
