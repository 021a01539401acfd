"""Implicit preference on pairs that training leaves out (`data.held_out`), measured as it goes.

A held-out pair is never drawn, so its visits 0, 1, ... are free: measurement takes the timestep,
the noise and the dropped captions of visit k for the k-th of `train.held_out_draws`, by the rule of
`fastpo.noise`. They depend on the seed, the pair and k, so every measurement sees the same noisy
pairs, and curves can be compared. No random state is read or changed.

With `e` the policy's and `r` the reference's mean squared error, a draw's margin is
`(r_w - e_w) - (r_l - e_l)`, without a reference `e_l - e_w`. A pair's margin is the mean over its
draws; it is right where that is positive. Equal batches are measured by any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastpo.data.cache import PairCache
from fastpo.loss import pair_errors
from fastpo.models.denoisers import without_dropout
from fastpo.system.read_ahead import read_ahead
from fastpo.train.trainer import Trainer
from fastpo.types import PairBatch

Numbers = np.ndarray
PLACE = "measuring on held-out pairs"


@dataclass(frozen=True)
class HeldOut:
    """Measures a run's policy on its held-out pairs.

    Attributes:
        trainer: The run's models, noise and cached reference errors.
        cache: The prepared pairs.
    """

    trainer: Trainer
    cache: PairCache
    _reference: list[Tensor] = field(default_factory=list)  # of this process's batches, once known

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether there is a measurement after `step` finished steps."""
        if not bool(self.cache.held_out.any()):
            return False
        return step % self.trainer.config.measures_every == 0 or step == total_steps

    def measure(self) -> dict[str, float]:
        """Runs policy and reference over all held-out pairs, without gradients (collective).

        Returns:
            `held_out/...` metrics, see `summarize`, the same on all processes.
        """
        trainer = self.trainer
        processes, config = trainer.processes, trainer.config
        mine = self._batches(processes.rank, processes.count)
        tables = []
        batches = read_ahead(self._read, [b for b, _ in mine], threads=config.loader_workers)
        with torch.no_grad(), self._eager(), closing(batches):
            for number, (batch, (_, counts)) in enumerate(zip(batches, mine, strict=True)):
                processes.progress.at(PLACE)
                rows = self._rows(batch, number)
                tables.append(rows if counts else torch.full_like(rows, -1.0))
        return summarize(processes.gather(torch.cat(tables)).cpu().numpy(), self.cache)

    def _batches(self, rank: int, count: int) -> list[tuple[tuple[int, list[int]], bool]]:
        """This process's batches, `(draw, positions)`, and whether each counts.

        All processes get as many, since they may have to run their models together; a process
        that lacks one repeats the last, which does not count.
        """
        every = list(self._every_batch())
        rounds = range(-(-len(every) // count))
        places = [k * count + rank for k in rounds]
        return [(every[min(n, len(every) - 1)], n < len(every)) for n in places]

    def _every_batch(self) -> Iterator[tuple[int, list[int]]]:
        config, bucket = self.trainer.config, self.cache.bucket
        positions = self.cache.held_out.nonzero().flatten()
        for number in bucket[positions].unique().tolist():
            alike = positions[bucket[positions] == number]
            for draw in range(config.held_out_draws):
                for batch in alike.split(config.micro_batch_size):
                    yield draw, batch.tolist()

    def _read(self, batch: tuple[int, Sequence[int]]) -> PairBatch:
        draw, positions = batch
        return self.cache.read(positions, visit=draw)

    def _eager(self) -> AbstractContextManager[object]:
        """Outside of compiled code, for which evaluation would be another variant to compile."""
        compiled = self.trainer.denoisers.compiled
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def _rows(self, batch: PairBatch, number: int) -> Tensor:
        """`(micro_batch_size, 6)` float64: index, draw, the errors e_w, e_l, r_w, r_l; else -1."""
        trainer, config = self.trainer, self.trainer.config
        known = trainer.reference_errors
        cached = None if known is None else known.lookup(batch)
        batch = batch.to(trainer.processes.device)
        noised = trainer.noise.noised_pair(batch)
        batch = trainer.noise.drop_captions(batch, config.empty_prompt_rate, trainer.empty_prompt)

        def errors(model: torch.nn.Module) -> Tensor:
            with trainer.processes.autocast():
                prediction = trainer.denoisers.predict(model, noised, batch.conditions)
            return pair_errors(prediction, noised.target, impl=config.loss_impl).double()

        with without_dropout(trainer.denoisers.policy) as policy:
            own = errors(policy)
            if cached is not None:
                reference = cached.to(own)
            elif not config.runs_reference:
                reference = torch.full_like(own, torch.nan)
            else:  # the same at every measurement
                if number == len(self._reference):
                    with trainer.denoisers.reference() as model:
                        self._reference.append(errors(model).cpu())
                reference = self._reference[number].to(own)
        columns = (batch.index.double(), batch.visit.double(), *own.chunk(2), *reference.chunk(2))
        rows = torch.stack(columns, dim=1)
        left = config.micro_batch_size - len(rows)
        return torch.nn.functional.pad(rows, (0, 0, 0, left), value=-1.0)


def summarize(rows: Numbers, cache: PairCache) -> dict[str, float]:
    """Makes the metrics from every draw's errors.

    Args:
        rows: `(N, 6)` float64 as of `HeldOut._rows`, in any order; those with index -1 are left
            out. The reference's errors are NaN where there is none.
        cache: Knows which labels were flipped on purpose.

    Returns:
        `held_out/accuracy`, `held_out/margin`; `held_out/error/winner` and `/loser`, the policy's
        mean error, and `held_out/against_reference/winner` and `/loser`, the same less the
        reference's, where there is one. Where labels are flipped on purpose, accuracy and margin of
        `held_out/clean/...` and `held_out/flipped/...` apart.
    """
    rows = rows[rows[:, 0] >= 0]
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # sums do not depend on who measured what
    index, first = np.unique(rows[:, 0].astype(np.int64), return_index=True)
    draws = np.diff(np.append(first, len(rows)))
    errors = np.add.reduceat(rows[:, 2:], first, axis=0) / draws[:, None]
    own, reference = errors[:, :2], errors[:, 2:]
    compared = not bool(np.isnan(rows[:, 4:]).all())
    gap = own - reference if compared else own
    margin = gap[:, 1] - gap[:, 0]
    metrics = _preference(margin)
    sides = ("winner", "loser")
    metrics |= {f"error/{side}": float(own[:, i].mean()) for i, side in enumerate(sides)}
    if compared:
        change = gap.mean(axis=0)
        metrics |= {f"against_reference/{side}": float(change[i]) for i, side in enumerate(sides)}
    flipped = cache.flipped.numpy()[index]
    if cache.flipped.any():
        for name, kind in (("clean", ~flipped), ("flipped", flipped)):
            if kind.any():
                metrics |= {f"{name}/{k}": v for k, v in _preference(margin[kind]).items()}
    return {f"held_out/{name}": value for name, value in metrics.items()}


def _preference(margin: Numbers) -> dict[str, float]:
    return {"accuracy": float((margin > 0).mean()), "margin": float(margin.mean())}
