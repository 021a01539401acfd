"""Processes, devices and precision: the only module that knows accelerate."""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from torch import Tensor

from fastpo.config import TrainConfig
from fastpo.errors import ConfigError

PLAIN = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def setup_accelerator(config: TrainConfig) -> Accelerator:
    """Joins the processes that `torchrun`, `accelerate launch` or nobody started.

    Without a GPU, processes talk over gloo.

    Raises:
        ConfigError: fp16 was asked for without a GPU, a tracker is not installed, or the launcher
            asks for sharded training (DeepSpeed, FSDP).
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu and config.precision == "fp16":
        raise ConfigError(
            "train.precision: fp16 needs a CUDA device (its gradients must be scaled); "
            "use bf16 or fp32 here"
        )
    missing = [t for t in config.trackers if not _importable(t)]
    if missing:
        raise ConfigError(
            f"train.trackers: {missing[0]} is not installed; `pip install {missing[0]}`, "
            "or take it out of the list"
        )
    handlers: list[KwargsHandler] = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others wait while the main process saves, which may take long on shared storage.
        backend = "gloo" if on_cpu else "nccl"
        handlers = [InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=30))]
    # A second run in one process may use another precision; accelerate keeps the first one's.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=handlers,
        log_with=list(config.trackers) or None,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type not in PLAIN:
        raise ConfigError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not supported "
            "yet; launch plain data parallelism (torchrun, or accelerate launch --multi_gpu)"
        )
    return accelerator


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def gather(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Returns the rows of all processes, `(P * N, K)`; one collective, nothing with one process."""
    return rows if accelerator.num_processes == 1 else accelerator.gather(rows)  # pyright: ignore[reportReturnType]


def all_reduce_sum(accelerator: Accelerator, vector: Tensor) -> Tensor:
    """Returns the sum of the processes' vectors; one collective, nothing with one process."""
    return vector if accelerator.num_processes == 1 else accelerator.reduce(vector)  # pyright: ignore[reportReturnType]
