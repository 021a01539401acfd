"""Out of memory while training: what to lower for this configuration, and what is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastpo.config import TrainConfig
from fastpo.errors import MemoryShortageError
from fastpo.train.changes import binds
from fastpo.train.checkpoint_folders import list_checkpoints

_CPU = re.compile(r"DefaultCPUAllocator|not enough memory|CUDA out of memory|CUDNN_STATUS_ALLOC")
_AMOUNT = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


@contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Raises what a device or the host refuses to give as a `MemoryShortageError`.

    Raises:
        MemoryShortageError: Memory ran out; the text names the keys that need less of it, in the
            order in which to try them, and the last checkpoint.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise MemoryShortageError(explain_shortage(error, config)) from error


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU.search(str(error)) is not None


def explain_shortage(error: BaseException, config: TrainConfig) -> str:
    """Returns one line: how much was missing, what to lower, where the run goes on."""
    asked = _AMOUNT.search(str(error))
    amount = f" ({asked[1]} more were asked for)" if asked else ""
    where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "the host"
    advised = savings(config)
    own = [text for text in advised if binds(text.partition(":")[0], config)]
    going_on = [text for text in advised if text not in own]
    ways = [f"{'; '.join(going_on)}, also with --resume"] if going_on else []
    ways.append(f"in a run of its own {'; '.join(own)}")
    return (
        f"out of memory on {where}{amount}; needs less: {'; '.join(ways)}; "
        f"{_kept(config.output_dir)}"
    )


def savings(config: TrainConfig) -> list[str]:
    """Names what this configuration can change to need less memory; the mildest first.

    Each begins with its key: see `fastpo.train.changes.binds` for those that --resume refuses.
    """
    found = []
    if config.micro_batch_size > 1:
        half = max(1, config.micro_batch_size // 2)
        steps = -(-config.accumulation_steps * config.micro_batch_size // half)
        found.append(f"train.micro_batch_size: {half} with train.accumulation_steps: {steps}")
    if not config.gradient_checkpointing:
        found.append("train.gradient_checkpointing: true")
    elif config.gradient_checkpointing is True and torch.cuda.is_available():
        found.append("train.gradient_checkpointing: offload")
    if config.runs_reference and config.method == "full":
        found.append("train.reference: cached (after `fastpo prepare CONFIG --reference auto`)")
    if config.precision == "fp32":
        found.append("train.precision: bf16")
    if config.deepspeed is None:
        fp32_layout = config.channels_last and (config.method, config.weights) == ("full", "fp32")
        if config.optim.name == "adamw" and not fp32_layout:
            found.append("train.optim.name: adamw_8bit")
        if config.method == "full" and config.weights == "fp32" and config.precision == "bf16":
            found.append("train.weights: bf16")
        if _suits_deepspeed(config):
            found.append("train.deepspeed: zero2 on several GPUs, or zero3")
    elif not config.deepspeed.endswith("_offload"):
        found.append("train.deepspeed: zero2_offload or zero3_offload")
    if config.method == "full" and config.weights == "fp32":
        found.append("train.method: lora")
    return [*found, "prepare.resolution: a smaller one"]


def _suits_deepspeed(config: TrainConfig) -> bool:
    plain = config.weights == "fp32" and config.optim.name == "adamw" and not config.channels_last
    return plain and config.precision != "fp16"


def _kept(run: Path) -> str:
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return "no checkpoint was written yet"
    return f"the last checkpoint is {checkpoints[-1]}, from which --resume goes on"
