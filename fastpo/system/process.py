"""Which of several processes this one is, as its launcher says; no process group is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from fastpo.errors import ConfigError

if TYPE_CHECKING:
    import torch

_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate launch, deepspeed
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


def started_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch --cpu` was asked for several processes and started this one.

    It then sets the address at which processes meet, and no rank.
    """
    alone = not any(name in environment for names in _LAUNCHERS for name in names[:2])
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    return alone and on_cpu and "MASTER_ADDR" in environment


@dataclass(frozen=True)
class Rank:
    """One process of a launch.

    Attributes:
        rank: From 0 to `world_size` - 1.
        world_size: Processes of the launch.
        local_rank: Its number on its machine; chooses the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def of_launch(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """Reads what torchrun, accelerate, deepspeed or srun set; a single process without them.

        Raises:
            ConfigError: A variable is no number, or the rank is not below the number of processes.
        """
        for names in _LAUNCHERS:
            if names[0] not in environment or names[1] not in environment:
                continue
            values = [environment.get(name, "0") for name in names]
            if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
                shown = ", ".join(f"{n}={v!r}" for n, v in zip(names, values, strict=True))
                raise ConfigError(f"the launcher's environment is wrong: {shown}; expected numbers")
            return cls(*map(int, values))
        return cls()

    def device(self) -> torch.device:
        """Returns this process's GPU, taken in turn on its machine, or the CPU."""
        import torch

        device = default_device()
        if device.type == "cpu":
            return device
        return torch.device(device.type, self.local_rank % torch.cuda.device_count())


def named_ranks(ranks: list[int]) -> str:
    """Returns `rank 3`, or `ranks 0-2, 5`; the numbers must be sorted."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    runs = [[r for _, r in run] for _, run in groupby(enumerate(ranks), lambda k: k[1] - k[0])]
    return "ranks " + ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def default_device() -> torch.device:
    """Returns the current CUDA device if there is one, else the CPU."""
    import torch  # the command line names no device, and starts without it

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
