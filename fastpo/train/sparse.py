"""Steps in which a pair without a gradient gets no backward pass: `train.backward`.

The loss's gradient at the policy's predictions, g = dloss/dprediction, is known after a forward
pass without gradients, whatever the objective and its statistics over the batch. Where g is zero
for both sides of a pair, the pair moves no weight. For the others the scalar `<prediction, g>`, g
held constant, has the same gradient by the weights as the loss. So a step has two parts: all pairs'
g, and a backward pass through the network for those that need one.

A step goes about it in one of three ways, whichever is cheapest (see `LiveShare` and `StepCost`):

* as `all` does: every pair is differentiated in its one forward pass. Cost: 3 a pair.
* at once: pairs whose gate the ledger has closed get a forward pass without gradients; the others
  one with, and their backward pass. Cost: 3 for an open pair, 1 for a closed one.
* looking first: all pairs get a forward pass without gradients; those that need it a forward and a
  backward pass more. Cost: 1, and 3 for each of these.

In the last two, pairs are packed over all micro-batches of the step into as few passes as they
fill. Statistics over the batch are those of all pairs always, and so are margins, losses and votes.
All processes make equally many passes of each kind, as collectives demand; who has no pair left
repeats one with g = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastpo.config import AdaptiveOptions, LedgerAnnotators, TrainConfig
from fastpo.errors import ConfigError
from fastpo.loss import PairLoss
from fastpo.system.words import counted
from fastpo.train.live_share import LiveShare
from fastpo.train.metrics import SparseColumns, StepCost
from fastpo.train.passes import Passes, longest_passes, sparse_passes, whole_passes
from fastpo.train.step_parts import JudgedBatch, StepParts
from fastpo.train.window import Place, Window
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


def gradient_scale(slopes: Tensor, errors: Tensor, unit: Tensor | float) -> Tensor:
    """How strongly a pair pulls: `B max_side |dloss/de| / unit`, `(B,)` float64.

    With N elements a side, `g = dloss/de 2 (prediction - target) / N`, hence
    `|dloss/de| = |g| sqrt(N / e) / 2`. The scale is zero exactly where g is.

    Args:
        slopes: `(2B, ...)`, g.
        errors: `(2B,)` the policy's errors e.
        unit: `|dloss/de|` of a pair of weight 1 on which policy and reference agree; one number, or
            one for each pair `(B,)`.
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


def check_dropout(policy: nn.Module, config: TrainConfig) -> None:
    """Refuses a model with dropout of its own: a second forward pass would have another mask.

    Raises:
        ConfigError: `train.backward` is not `all`, and a module drops; the text names the first.
    """
    dropping = [
        (name, module.p)
        for name, module in policy.named_modules()
        if isinstance(module, _DropoutNd) and module.p > 0.0
    ]
    if config.backward == "all" or not dropping:
        return
    (name, p), more = dropping[0], len(dropping) - 1
    others = f" and {counted(more, 'other module')}" if more else ""
    raise ConfigError(
        f"train.backward: {config.backward} decides by one forward pass and differentiates "
        f"another, whose dropout would differ; the model drops {p:g} in {name}{others}: set its "
        "dropout to 0 in its config.json, or use train.backward: all"
    )


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

    def run(self, batches: Iterator[PairBatch]) -> tuple[list[Tensor], Norm, StepCost]:
        """Makes the step's passes and moves the weights.

        Args:
            batches: This process's micro-batches, in host memory.

        Returns:
            The micro-batches' rows of `COLUMNS`, the gradient's norm before clipping, and what the
            passes were.
        """
        config = self.trainer.config
        window = Window(
            [next(batches) for _ in range(config.accumulation_steps)], config.micro_batch_size
        )
        closed = [self._closed(batch) for batch in window.batches]
        passes, cost = self._cheapest(window, closed)
        if passes is None:
            return self._looking_first(window, closed)
        tables, norm, drawn = self._at_once(window, closed, passes)
        _, _, share = self._second_passes(window, drawn)
        return tables, norm, StepCost(cost, share)

    @property
    def _share(self) -> LiveShare:
        share = self.trainer.state.live_share
        assert share is not None, "a run with train.backward keeps it"
        return share

    @property
    def _gated(self) -> bool:
        """Whether the ledger's verdict alone may make a pair's weight zero."""
        objective = self.trainer.config.objective
        gated = isinstance(objective, AdaptiveOptions) and objective.weight_kind == "gate"
        return gated and isinstance(self.trainer.config.annotators, LedgerAnnotators)

    def _closed(self, batch: PairBatch) -> Tensor:
        """Which pairs' weight is zero by the ledger's verdict alone, `(B,)` bool on the host."""
        if not self._gated:
            return torch.zeros(len(batch), dtype=torch.bool)
        return self.trainer.state.ledger.minority(batch.index) >= 0.5

    def _cheapest(self, window: Window, closed: list[Tensor]) -> tuple[Passes | None, float]:
        """The passes of the cheapest way, None for looking first, and their cost a pair."""
        processes, dense = self.trainer.processes, self._share.dense
        best, cost = whole_passes(window), dense
        if self._gated:
            aligned = processes.count > 1 and self.trainer.config.statistics == "processes"
            passes, pairs = sparse_passes(window, closed, processes, aligned=aligned)
            rows = sum(passes.longest_looks) + dense * sum(passes.longest)
            if rows / pairs < cost:
                best, cost = passes, rows / pairs
        return (None if self._share.looking < cost else best), cost

    def _second_passes(
        self, window: Window, drawn: Sequence[Tensor]
    ) -> tuple[list[list[Place]], int, float]:
        """Packs the drawn pairs; collective.

        Args:
            window: The step's micro-batches.
            drawn: `(B,)` bool for each of them, on the device.

        Returns:
            The packs, how many the process with most of them has, and the share of its pairs.
        """
        processes = self.trainer.processes
        packs = window.packed(torch.cat(list(drawn)).cpu().split(window.sizes))
        longest, sizes = longest_passes(processes, window, packs)
        if not any(longest) and processes.must_differentiate:
            longest[0] = 1
        return packs, sum(rows > 0 for rows in longest), sum(longest) / sum(sizes)

    def _at_once(
        self, window: Window, closed: list[Tensor], passes: Passes
    ) -> tuple[list[Tensor], Norm, list[Tensor]]:
        """Pairs are differentiated in their one forward pass; tells what looking would draw."""
        trainer, tables, drawn = self.trainer, {}, {}
        norm: Norm = None
        found = self._answers_of(window, passes)
        known: dict[int, JudgedBatch] = {}
        if not passes.aligned:  # with the reference's passes, of which all processes make as many
            for k, batch in enumerate(window.batches):
                self.check()
                known[k] = _without_inputs(trainer.judged(batch, self.step))
        kept = passes.kept(window)
        for number, places in enumerate(passes.places):
            self.check()
            if passes.aligned:
                known[number] = trainer.judged(window.batches[number], self.step)
            made, policy, slopes = passes.longest[number] > 0, None, {}
            with self._pass(last=number == passes.last) if made else nullcontext():
                if made:
                    here = known[number] if passes.aligned else None
                    policy = self._differentiable(window, places, here)
                    _enter(found, places, policy)
                for k in passes.judged[number]:
                    judged, answers, found[k] = known.pop(k), found[k], {}
                    whole = torch.stack([answers[row] for row in range(len(answers))], dim=1)
                    answer = self._judge(judged, whole.flatten(0, 1))
                    tables[k] = self._rows(judged, answer, closed[k], kept[k])
                    drawn[k] = self._weight(answer, judged.batch) > 0
                    slopes[k] = answer.slopes
                if policy is not None:
                    _backward(trainer, policy, slopes, places)
                    norm = trainer.update()
        if passes.last < 0:
            norm = self._no_gradient()
        order = range(len(window.batches))
        return [tables[k] for k in order], norm, [drawn[k] for k in order]

    def _pass(self, *, last: bool) -> AbstractContextManager[None]:
        return self.trainer.processes.pass_of_step(self.trainer.policy, last=last)

    def _answers_of(self, window: Window, passes: Passes) -> list[dict[int, Tensor]]:
        """Predictions of the pairs that are only looked at, `(2, C, h, w)` each, by their row."""
        processes, looks = self.trainer.processes, passes.looks
        found: list[dict[int, Tensor]] = [{} for _ in window.batches]
        all_of_them = sum(rows > 0 for rows in passes.longest_looks)
        for number in range(all_of_them if processes.shares_weights else len(looks)):
            self.check()
            places = looks[number] if number < len(looks) else []
            batch, noised = self.trainer.noised(window.pairs(places or [(0, 0)]))
            with torch.no_grad(), processes.autocast():
                model = self.trainer.denoisers.policy
                policy = self.trainer.denoisers.predict(model, noised, batch.conditions)
            _enter(found, places, policy)
        return found

    def _differentiable(
        self, window: Window, places: Sequence[Place], judged: JudgedBatch | None = None
    ) -> Tensor:
        """The policy's predictions of these pairs, with their graph; without any, of some pair.

        Args:
            window: The step's micro-batches.
            places: The pairs.
            judged: Their micro-batch, if all of them are of one that is on the device.
        """
        trainer = self.trainer
        if judged is not None and len(places) == len(judged.batch):
            batch, noised = judged.batch, judged.noised
        else:
            batch, noised = trainer.noised(window.pairs(places or [(0, 0)]))
        with trainer.processes.autocast():
            return trainer.denoisers.predict(trainer.policy, noised, batch.conditions)

    def _looking_first(
        self, window: Window, closed: list[Tensor]
    ) -> tuple[list[Tensor], Norm, StepCost]:
        """All pairs are looked at; those that need a backward pass are packed."""
        trainer, tables, drawn = self.trainer, [], []
        slopes: dict[int, Tensor] = {}
        for k, batch in enumerate(window.batches):
            self.check()
            judged = trainer.judged(batch, self.step)
            with torch.no_grad(), trainer.processes.autocast():
                policy = trainer.denoisers.predict(
                    trainer.denoisers.policy, judged.noised, judged.batch.conditions
                )
            answer = self._judge(judged, policy.float())
            weight = self._weight(answer, judged.batch)
            tables.append(self._rows(judged, answer, closed[k], weight))
            sides = torch.cat([weight, weight]).float().view(-1, *[1] * (policy.ndim - 1))
            slopes[k] = answer.slopes * sides
            drawn.append(weight > 0)
        packs, count, share = self._second_passes(window, drawn)
        norm = None if count else self._no_gradient()
        for number in range(count):
            self.check()
            places = packs[number] if number < len(packs) else []
            with self._pass(last=number + 1 == count):
                _backward(trainer, self._differentiable(window, places), slopes, places)
                norm = trainer.update()
        return tables, norm, StepCost(1.0 + self._share.dense * share, share)

    def _no_gradient(self) -> Norm:
        """The update of a step in which no pair has a gradient, and none is needed."""
        with self._pass(last=True):
            for parameter in self.trainer.state.trainable.values():
                parameter.grad = torch.zeros_like(parameter)  # which is not none
            return self.trainer.update()

    def _weight(self, answer: Answer, batch: PairBatch) -> Tensor:
        """The weights of the pairs' backward passes, where all are looked at first."""
        return backward_weights(self._share.chance(answer.scale), batch, seed=self.trainer.seed)

    def _judge(self, judged: JudgedBatch, policy: Tensor) -> Answer:
        """The loss and its gradient at the predictions `(2B, C, h, w)` float32."""
        config, leaf = self.trainer.config, policy.detach().requires_grad_()
        out = self.trainer.pair_loss(judged, leaf)
        (slopes,) = torch.autograd.grad(out.loss, leaf)
        unit = self.trainer.fresh_slope(judged.noised.index)
        scale = gradient_scale(slopes, out.policy_error.detach(), unit)
        # A short micro-batch weighs by its pairs, so that every pair weighs the same.
        return Answer(out, slopes * (len(judged.batch) / config.micro_batch_size), scale)

    def _rows(self, judged: JudgedBatch, answer: Answer, closed: Tensor, kept: Tensor) -> Tensor:
        return self.trainer.rows(judged, answer.out, SparseColumns(answer.scale, closed, kept))


def _without_inputs(judged: JudgedBatch) -> JudgedBatch:
    """What the loss of a micro-batch needs; what the policy sees may leave the device."""
    batch, noised = judged.batch, judged.noised
    nothing = noised.noisy_latents.new_empty(0)
    batch = replace(batch, latent_mean=nothing, latent_logvar=nothing, conditions={})
    return replace(judged, batch=batch, noised=replace(noised, noisy_latents=nothing))


def _enter(found: list[dict[int, Tensor]], places: Sequence[Place], policy: Tensor) -> None:
    """Enters predictions `(2B, C, h, w)` of the pairs at these places, if there are any."""
    sides = policy.detach().float().unflatten(0, (2, -1)).unbind(dim=1)
    for (k, row), answer in zip(places, sides, strict=False):  # of no place is the one repeated
        found[k][row] = answer


def _backward(
    trainer: StepParts, policy: Tensor, slopes: Mapping[int, Tensor], places: Sequence[Place]
) -> None:
    """Differentiates `<policy, g>`, whose gradient by the weights is the loss's; zero of no place.

    Args:
        trainer: What a step uses.
        policy: `(2B, C, h, w)`, predictions of the pairs at these places.
        slopes: g of whole micro-batches, `(2B, C, h, w)` each.
        places: The pairs.
    """
    pulls = [slopes[k].unflatten(0, (2, -1))[:, row] for k, row in places]
    g = torch.stack(pulls, dim=1).flatten(0, 1) if pulls else torch.zeros_like(policy)
    trainer.processes.backward((policy.float() * g).sum())
