"""Rounds: judge the labels, begin anew from the base with the verdict, judge again.

A ledger that judges the run it watches learns wrong pairs before it doubts them, and the weights
keep what they learned. So the run begins anew (`train.rounds`): weights, optimizer, schedule and
averages are those of a fresh start, and the ledger keeps a share of its votes (`rounds_carry`).
Pairs that looked wrong at the end of a round are closed from the next one's first step on, and
judged all the same: votes go on over all pairs, and a pair that they acquit is open again. With
`rounds_turn` those that looked worst begin a round with their label turned round, and are open.

The last round trains as long as `epochs` or `max_steps` say, those before it `round_epochs`. It
comes as soon as verdicts have settled: fewer than `rounds_settled` of them are other than at the
beginning of the round that ends, or, with held-out pairs, a round's best accuracy on them is no
higher than that of the rounds before it.

Steps and checkpoints are numbered on through all rounds, and so are the pairs' visits, of which
each has noise of its own; with `rounds_draws: same` each round takes the visits of the first again,
with their batches, timesteps and noise. What decides is in the checkpoint, so a run that was killed
anywhere goes on as it would have.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from fastpo.config import TrainConfig
from fastpo.data.cache import PairCache
from fastpo.data.sampler import PairSampler, round_steps
from fastpo.errors import ConfigError, one_line
from fastpo.ledger import PairLedger
from fastpo.train.state import Round, TrainingState

DOUBTED = 0.5
MINORITY = "minority.csv"


def first_round(config: TrainConfig) -> Round:
    """The round with which a run begins."""
    return Round(last=config.rounds == 1)


def end_of(current: Round, config: TrainConfig, sampler: PairSampler, micro_batches: int) -> int:
    """Finished steps at a round's end.

    Args:
        current: The round.
        config: The training's section.
        sampler: The run's stream.
        micro_batches: Of one step, over all processes.
    """
    judging, last = round_steps(config, sampler, micro_batches)
    return current.start + (last if current.last else judging)


def verdicts(ledger: PairLedger) -> Tensor:
    """Which pairs the ledger's gate closes, `(N,)` bool on the host."""
    return (ledger.minority() >= DOUBTED).cpu()


def next_round(state: TrainingState, config: TrainConfig, end: int) -> Round:
    """The round behind the one that ends after `end` finished steps."""
    changed = float((wrong_labels(state) != state.began).double().mean())
    number = state.round.number + 1
    measured = state.best.step > 0
    settled = changed < config.rounds_settled or (measured and state.best.step <= state.round.start)
    return Round(number=number, start=end, last=settled or number == config.rounds, changed=changed)


def hand_over(state: TrainingState, ledger: PairLedger, config: TrainConfig) -> None:
    """Begins a round's ledger with the last one's votes."""
    state.ledger.load_state_dict(ledger.state_dict())
    _begin(state, config)


def _begin(state: TrainingState, config: TrainConfig) -> None:
    """Turns labels round if asked to, and keeps a share of the votes."""
    ledger = state.ledger
    if config.rounds_turn is not None:
        turned = ledger.minority() >= config.rounds_turn
        ledger.total[turned] *= -1.0  # a vote is about the label as it is read
        state.turned.logical_xor_(turned.cpu())
    ledger.begin_round(config.rounds_carry)
    state.began.copy_(wrong_labels(state))


def wrong_labels(state: TrainingState) -> Tensor:
    """Which of the labels that the run was given look wrong now, `(N,)` bool on the host."""
    return verdicts(state.ledger) ^ state.turned


def about_labels(state: TrainingState) -> tuple[Tensor, Tensor]:
    """Mean vote and minority metric of each label that the run was given, `(N,)` on the host."""
    mean, minority = state.ledger.mean().cpu(), state.ledger.minority().cpu()
    return torch.where(state.turned, -mean, mean), torch.where(state.turned, 1 - minority, minority)


def take_verdicts(state: TrainingState, config: TrainConfig, cache: PairCache) -> None:
    """Begins a run's ledger with the votes of another run, `train.verdicts`.

    Pairs are known by name; one that the other run lacks has no votes, and one whose label is the
    other way round there has them with the other sign.

    Raises:
        ConfigError: The folder holds no such table, or knows none of the pairs.
    """
    if config.verdicts is None:
        return
    path = Path(config.verdicts) / MINORITY
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = {row["pair_id"]: row for row in csv.DictReader(file)}
        known = {
            name: (
                float(row["ledger_mean"]) * int(row["visits"]),
                int(row["visits"]),
                row["flipped"],
            )
            for name, row in rows.items()
        }
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"train.verdicts: {path} is not the table of a finished run: {one_line(error)}"
        ) from None
    found = [known.get(name) for name in cache.pair_ids]
    if not any(found):
        raise ConfigError(f"train.verdicts: {path} knows none of the pairs in {cache.folder}")
    votes = [
        (0.0, 0) if row is None else (row[0] if row[2] == str(int(turned)) else -row[0], row[1])
        for row, turned in zip(found, cache.flipped.tolist(), strict=True)
    ]
    total, visits = zip(*votes, strict=True)
    state.ledger.total.copy_(torch.tensor(total))
    state.ledger.visits.copy_(torch.tensor(visits, dtype=torch.int32))
    _begin(state, config)
