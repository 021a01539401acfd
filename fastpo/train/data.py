"""The pairs of a run, in which order they come, and how many optimizer steps they make."""

from __future__ import annotations

from dataclasses import dataclass

from fastpo.config import Config
from fastpo.data.cache import PairCache
from fastpo.data.loader import PairLoader, make_loader
from fastpo.data.mixing import make_sampler
from fastpo.data.sampler import PairSampler
from fastpo.models.folder import ModelFolder
from fastpo.train.distributed import Processes
from fastpo.train.rounds import end_of, first_round
from fastpo.train.state import Round


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        cache: The prepared pairs.
        sampler: The endless stream of micro-batches.
        micro_batches_per_step: Micro-batches of one optimizer step, over all processes.
        total_steps: Finished optimizer steps at the end of the round, of the last one and of a run
            without others at the end of the run.
        round: Which round that is.
        repeats: Whether each round draws from the stream's beginning on; see `train.rounds_draws`.
    """

    cache: PairCache
    sampler: PairSampler
    micro_batches_per_step: int
    total_steps: int
    round: Round
    repeats: bool = False

    def epoch(self, step: int) -> float:
        """Epochs that are finished after `step` optimizer steps."""
        return step * self.micro_batches_per_step / self.sampler.micro_batches_per_epoch

    def loader(self, processes: Processes, start: int, *, workers: int) -> PairLoader:
        """Returns this process's micro-batches of steps `start..total_steps-1`.

        Args:
            processes: Which one this is, of how many.
            start: Finished optimizer steps.
            workers: Threads that read ahead; 0 reads when the step asks.
        """
        before = self.round.start if self.repeats else 0
        return make_loader(
            self.cache,
            self.sampler,
            rank=processes.rank,
            world_size=processes.count,
            accumulation_steps=self.micro_batches_per_step // processes.count,
            start_step=start - before,
            total_steps=self.total_steps - before,
            workers=workers,
            pin_memory=processes.device.type == "cuda",
        )


def setup_data(
    config: Config, model: ModelFolder, processes: Processes, current: Round | None = None
) -> TrainingData:
    """Opens the cache and lays out its order up to the end of a round, the first by default.

    Raises:
        CacheError: There is no cache, or it was prepared from something else.
    """
    train = config.train
    cache = PairCache.open(config, model=model)
    sampler = make_sampler(cache, config)
    micro_batches_per_step = processes.count * train.accumulation_steps
    current = current or first_round(train)
    total_steps = end_of(current, train, sampler, micro_batches_per_step)
    return TrainingData(
        cache,
        sampler,
        micro_batches_per_step,
        total_steps,
        current,
        repeats=train.rounds_draws == "same",
    )
