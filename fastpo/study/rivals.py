"""Rivals of the ledger: methods that train on labels in which they do not believe entirely.

Both train by DPO on soft labels. A pair whose label counts as right to the share p and as wrong to
the share q has, with z the logit of its given label, the loss

    -p log sigmoid(z) - q log sigmoid(-z).

`semi_dpo` re-creates Semi-DPO (arXiv 2604.24952), whose code is not at hand: p and q are 0 or 1,
and depend on the timestep. `em_mixture` takes p = 1 - q from an explicit mixture of right and wrong
labels, by the EM algorithm. Such a run is not resumed: one that was killed begins anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastpo.config import Config, parse_config, with_keys
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.demo.run import passes_of_run
from fastpo.ledger import BINS
from fastpo.loss import PairLoss, pair_errors
from fastpo.models.denoisers import without_dropout
from fastpo.review.decide import Decision
from fastpo.review.relabel import RELABELED, Shards, given_pairs
from fastpo.study.own_steps import train_with
from fastpo.system.files import whole_file
from fastpo.system.ownership import owned_folder
from fastpo.train import train
from fastpo.train.experiment import Experiment
from fastpo.train.metrics import StepTable
from fastpo.train.observers import Observer
from fastpo.train.step_parts import JudgedBatch
from fastpo.train.trainer import Trainer

AGREED = 0.21
"""Share of the pairs on which the labels of people and of all reward models agree, as published."""
FIRST = 3.0
"""Epochs of the first stage on these pairs, in those of plain DPO: their number is a fifth."""
DRAWS = 10
"""Noisy copies of a pair that the first stage's model judges."""
SURE = 0.5
"""Share of the judgments in an interval of the timesteps that count, those with the largest
margins; the others give no label there."""
FLIPS = 0.2
"""Share of wrong labels with which the mixture begins."""


class Labels(Protocol):
    """What is believed of the given labels."""

    def shares(self, index: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """To which shares labels are right and wrong, each `(B,)` float32.

        Args:
            index: `(B,)` positions of pairs in the cache, on the CPU.
            places: `(B,)` places in the noise schedule, on the CPU.
        """
        ...

    def see(self, table: StepTable) -> None:
        """Learns from a step's margins, of the labels as they were given."""
        ...


@dataclass(frozen=True)
class SoftLabelTrainer(Trainer):
    """Steps on soft labels; margins and the ledger's votes are about the labels as given.

    Attributes:
        labels: What is believed of the labels.
    """

    labels: Labels

    def pair_loss(self, judged: JudgedBatch, policy: Tensor) -> PairLoss:
        """See the module's docstring."""
        shares = self.labels.shares(judged.batch.index.cpu(), judged.noised.index.cpu())
        right, wrong = (share.to(policy.device) for share in shares)
        given = super().pair_loss(replace(judged, weight=right), policy)
        turned = super().pair_loss(_turned(judged, wrong), _swapped(policy, len(right)))
        return given._replace(loss=given.loss + turned.loss)

    def record(self, table: StepTable) -> None:
        """See `Trainer`."""
        super().record(table)
        self.labels.see(table)


def _swapped(sides: Tensor, pairs: int) -> Tensor:
    """Losers first, then winners; what a pair shares, with B rows, stays."""
    return sides if len(sides) == pairs else torch.cat([sides[pairs:], sides[:pairs]])


def _turned(judged: JudgedBatch, weight: Tensor) -> JudgedBatch:
    """The same pairs with their labels turned round."""
    pairs = len(judged.batch)
    assert not judged.annotators and judged.reference is not None, "plain DPO"
    noised = replace(judged.noised, target=_swapped(judged.noised.target, pairs))
    reference = _swapped(judged.reference, pairs)
    return replace(judged, noised=noised, reference=reference, weight=weight)


def train_on(config: Config, labels: Callable[[PairCache], Labels]) -> Path:
    """Trains on soft labels, unless the run's folder holds a finished run; returns the folder."""

    def soft(run: Experiment) -> SoftLabelTrainer:
        return SoftLabelTrainer(**vars(run.trainer), labels=labels(run.data.cache))

    return train_with(config, soft)


@dataclass(frozen=True)
class Known:
    """Pairs whose label is wrong are left out.

    Attributes:
        wrong: `(N,)` bool.
    """

    wrong: Tensor

    def shares(self, index: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """See `Labels`."""
        right = (~self.wrong[index]).float()
        return right, torch.zeros_like(right)

    def see(self, table: StepTable) -> None:
        """Learns nothing."""


def told(config: Config) -> Path:
    """Trains by DPO on the pairs that `data.flip_rate` left right, told which these are.

    The others are in the batches and count nothing: as pairs whose gate is closed.
    """
    return train_on(config, lambda cache: Known(cache.flipped))


class Mixture:
    """Right and wrong labels as a mixture: how likely a pair's label is wrong, and how many are.

    Where the label is right, a margin with logit z has the likelihood sigmoid(z), where it is wrong
    sigmoid(-z). With f the share of wrong labels, the E-step gives after visits v

        q = f / (f + (1 - f) exp(sum_v z_v)),

    and the M-step sets f to the mean of q over the pairs that were visited. Each pair is judged by
    its earlier visits. A step makes one of each.

    Attributes:
        flips: f, at most one half.
    """

    def __init__(self, pairs: int, slope: float) -> None:
        """Begins without an opinion.

        Args:
            pairs: How many.
            slope: Factor of a margin that makes it a logit.
        """
        self.flips, self._slope = FLIPS, slope
        self._logits = torch.zeros(pairs, dtype=torch.float64)
        self._seen = torch.zeros(pairs, dtype=torch.bool)

    def doubts(self) -> Tensor:
        """q of every pair, `(N,)` float64."""
        prior = np.log((1.0 - self.flips) / self.flips)
        return torch.sigmoid(-(prior + self._logits))

    def shares(self, index: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """See `Labels`."""
        wrong = self.doubts()[index].float()
        return 1.0 - wrong, wrong

    def see(self, table: StepTable) -> None:
        """See `Labels`."""
        self._logits.index_add_(0, table.index, self._slope * table.votes.double().cpu())
        self._seen[table.index] = True
        share = float(self.doubts()[self._seen].mean())
        self.flips = min(max(share, 1e-3), 0.5)


def em_mixture(config: Config) -> Path:
    """Trains by DPO on the labels of a mixture that it learns as it goes."""
    slope = config.train.objective.logit_slope()
    assert slope is not None, "DPO has a slope"
    return train_on(config, lambda cache: Mixture(len(cache), slope))


@dataclass(frozen=True)
class PseudoLabels:
    """Fixed labels by interval of the timesteps.

    Attributes:
        signs: `(N, BINS)`: 1 where the given label is taken, -1 where it is turned round, 0 where
            the pair is left out.
        num_timesteps: Length of the noise schedule.
    """

    signs: Tensor
    num_timesteps: int

    def shares(self, index: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """See `Labels`."""
        sign = self.signs[index, places * BINS // self.num_timesteps]
        return (sign > 0).float(), (sign < 0).float()

    def see(self, table: StepTable) -> None:
        """Learns nothing."""


class Judge(Observer):
    """After a run's last step its model judges the pairs of another cache, without gradients.

    Args:
        cache: The pairs.
        rows: `(M,)` int64, those of them that are judged.
        last: The run's number of steps.
        file: Where margins go, `(N, DRAWS)` float64, 0 of pairs that are not judged, and the
            timesteps' places, int64.
    """

    def __init__(self, cache: PairCache, rows: Tensor, last: int, file: Path) -> None:
        self._cache, self._rows, self._last, self._file = cache, rows, last, file
        self._trainer: Trainer | None = None

    def on_start(self, trainer: Trainer, start: int) -> None:
        """See `Observer`."""
        self._trainer = trainer

    def on_step(self, step: int, table: StepTable, metrics: Mapping[str, float]) -> None:
        """See `Observer`."""
        if step == self._last:
            assert self._trainer is not None, "a run has begun"
            margins = np.zeros((len(self._cache), DRAWS))
            places = np.zeros((len(self._cache), DRAWS), dtype=np.int64)
            for rows, draw, margin, place in self._judged(self._trainer):
                margins[rows, draw], places[rows, draw] = margin, place
            with whole_file(self._file) as whole, whole.open("wb") as file:
                np.savez(file, margins=margins, places=places)

    @torch.no_grad()
    def _judged(self, trainer: Trainer) -> Iterator[tuple[list[int], int, Tensor, Tensor]]:
        """Yields positions, a draw, margins and places, a batch at a time."""
        size = trainer.config.micro_batch_size
        denoisers, bucket = trainer.denoisers, self._cache.bucket[self._rows]
        for number in bucket.unique().tolist():
            for rows in self._rows[bucket == number].split(size):
                for draw in range(DRAWS):
                    batch, noised = trainer.noised(self._cache.read(rows.tolist(), draw))
                    with trainer.processes.autocast(), denoisers.reference() as frozen:
                        ours = denoisers.predict(frozen, noised, batch.conditions)
                    reference = pair_errors(ours, noised.target).double()
                    with trainer.processes.autocast(), without_dropout(denoisers.policy) as policy:
                        ours = denoisers.predict(policy, noised, batch.conditions)
                    gain = reference - pair_errors(ours, noised.target).double()
                    winners, losers = gain.cpu().chunk(2)
                    yield rows.tolist(), draw, winners - losers, noised.index.cpu()


def pseudo_labels(
    margins: np.ndarray, places: np.ndarray, agreed: np.ndarray, length: int
) -> Tensor:
    """Makes labels by interval of the timesteps.

    The sum of a pair's margins in an interval decides there: its sign is the label, if its size is
    among the largest `SURE` of the interval's. Agreed pairs keep their label everywhere.

    Args:
        margins: `(N, DRAWS)` of the given labels.
        places: `(N, DRAWS)` places in the noise schedule.
        agreed: `(N,)` bool.
        length: Of the schedule.

    Returns:
        `(N, BINS)` int64, see `PseudoLabels`.
    """
    bins = places * BINS // length
    rows = np.broadcast_to(np.arange(len(margins))[:, None], bins.shape)
    sums = np.zeros((len(margins), BINS))
    np.add.at(sums, (rows, bins), margins)
    doubtful = np.where(agreed[:, None] | (sums == 0.0), np.nan, np.abs(sums))
    with np.errstate(all="ignore"):
        least = np.array(
            [
                np.quantile(known, 1.0 - SURE) if (known := column[~np.isnan(column)]).size else 0.0
                for column in doubtful.T
            ]
        )
    signs = np.where(np.abs(sums) >= least, np.sign(sums), 0.0)
    return torch.from_numpy(np.where(agreed[:, None], 1.0, signs)).long()


def semi_dpo(config: Config) -> tuple[Path, float]:
    """Semi-DPO, re-created from its description.

    1. DPO on the pairs on which people and reward models agree, about a fifth: here a fifth of all
       pairs at random, of those that `data.flip_rate` left right. That is the method's best case:
       nobody knows such pairs for certain, and reward models agree on easy ones.
    2. The model judges all other pairs at `DRAWS` timesteps and noises. In each tenth of the
       timesteps the sign of a pair's margin becomes its label there, if the margin is large enough.
    3. DPO from the base on all pairs, with the labels of the interval that a visit falls into.

    The published method repeats 2 and 3; its thresholds and lengths are not known here, `SURE` and
    `FIRST` stand for them.

    Returns:
        The run of step 3, and the passes of all steps for each pair of the data.
    """
    folder, train_config = config.train.output_dir, config.train
    cache = PairCache.open(config)
    share = AGREED / (1.0 - config.data.flip_rate)
    named = [is_agreed(name, share, config.seed) for name in cache.pair_ids]
    agreed = torch.tensor(named) & ~cache.flipped
    count, pairs = int(agreed.sum()), len(cache)
    batch = train_config.micro_batch_size * train_config.accumulation_steps
    epochs = FIRST * (train_config.epochs or 0.0)
    steps = train_config.max_steps or max(1, round(epochs * count / batch))
    first = _changed(
        config,
        {
            **{"data.source": "folder", "data.path": str(folder / "agreed"), "data.flip_rate": 0.0},
            **{"prepare.cache_dir": str(folder / "cache"), "train.epochs": None},
            **{"train.output_dir": str(folder / "first"), "train.max_steps": steps},
        },
    )
    file = folder / "judged.npz"
    if not file.is_file():
        chosen = {str(cache.pair_ids[row]) for row in agreed.nonzero().flatten().tolist()}
        _copy_agreed(config, folder / "agreed", chosen)
        prepare(first, progress=False)
        judge = Judge(cache, (~agreed).nonzero().flatten(), steps, file)
        again = first.train.output_dir.exists()
        train(first, overwrite=again, progress=False, observers=[judge])
    judged = np.load(file)
    length = 1000
    signs = pseudo_labels(judged["margins"], judged["places"], agreed.numpy(), length)
    second = _changed(config, {"train.output_dir": str(folder / "second")})
    run = train_on(second, lambda _: PseudoLabels(signs, length))
    part = count / pairs
    passes = part * passes_of_run(first) + 2.0 * DRAWS * (1.0 - part) + passes_of_run(second)
    return run, passes


def _changed(config: Config, changes: Mapping[str, object]) -> Config:
    return parse_config(with_keys(config.model_dump(mode="json"), changes))


def _copy_agreed(config: Config, folder: Path, names: set[str]) -> None:
    """Writes the chosen pairs as a data set of their own."""
    with owned_folder(folder, RELABELED) as made:
        shards = Shards(made)
        with shards.closing():
            for pair in given_pairs(config):
                if pair.pair_id in names:
                    fault = shards.add(pair, Decision())
                    assert fault is None, fault


def is_agreed(pair_id: str, share: float, seed: int) -> bool:
    """Chooses a share of the pairs by their names."""
    digest = hashlib.blake2b(f"agreed {seed}:{pair_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64
