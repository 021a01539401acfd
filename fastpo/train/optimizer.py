"""Optimizer and learning-rate schedule from the configuration."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fastpo.config import OptimConfig
from fastpo.errors import ConfigError
from fastpo.train.bf16_optimizer import RoundedOptimizer

LIBRARIES = {
    "prodigy": ("prodigyopt", "Prodigy"),
    "lion": ("lion_pytorch", "Lion"),
    "schedule_free": ("schedulefree", "AdamWScheduleFree"),
}
GROUP_STATE = ("d", "d_max", "d_numerator", "k", "weight_sum", "lr_max")
"""What Prodigy and schedule-free AdamW count for all weights together, beside their options."""
STATES = {"prodigy": 4, "lion": 1}
"""float32 states per weight; AdamW's two otherwise."""
BLOCK = 256  # 8-bit states that share one scale, in bitsandbytes
SMALLEST_8BIT = 4096  # it gives smaller tensors float32 states


def setup_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    *,
    seed: int = 0,
    fused: bool = False,
) -> Optimizer:
    """The optimizer of `train.optim.name`; with stochastic rounding where weights are bfloat16.

    Adafactor runs at a fixed rate (no relative step), which SDXL's published DPO uses. 8-bit AdamW
    is bitsandbytes': both moments in 8 bits, with a float32 scale for every 256 of them.

    Args:
        parameters: The trainable weights.
        config: The options.
        seed: The run's seed; keys the rounding.
        fused: Run AdamW as one kernel; it cannot tell the fp16 scaler that it skipped a step. Else
            the choice is torch's.

    Raises:
        ConfigError: Its library is not installed.
    """
    weights = list(parameters)
    build = partial(_build, config=config, fused=fused)
    if any(p.dtype == torch.bfloat16 for p in weights):
        return RoundedOptimizer(weights, build, seed=seed)
    return build(weights)


def warn_of_8bit_on_cpu(config: OptimConfig) -> None:
    """Warns where 8-bit AdamW is to run on a CPU.

    bitsandbytes' CPU kernel stores a moment of exactly zero as 2e-5 of its block's largest, so that
    weights without a gradient move (findings/, bitsandbytes 0.50.2).
    """
    if config.name == "adamw_8bit":
        warnings.warn(
            "train.optim.name: the results of adamw_8bit on a CPU mean nothing: bitsandbytes "
            "moves weights there that have no gradient; use adamw, or a GPU",
            stacklevel=2,
        )


def _build(parameters: list[nn.Parameter], config: OptimConfig, fused: bool) -> Optimizer:
    if config.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    options: Any = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw_8bit":
        return _adamw_8bit()(parameters, **options)
    if config.name in LIBRARIES:
        return _from_library(parameters, config, options)
    return torch.optim.AdamW(parameters, fused=fused or None, **options)


def _from_library(
    parameters: list[nn.Parameter], config: OptimConfig, options: dict[str, Any]
) -> Optimizer:
    """Prodigy, Lion or schedule-free AdamW, by their authors' or usual packages."""
    library, name = LIBRARIES[config.name]
    try:
        kind = getattr(importlib.import_module(library), name)
    except ImportError as error:
        raise ConfigError(
            f"train.optim.name: {config.name} needs {library} ({error}); `pip install "
            "'fastpo[optim]'`, or use adamw"
        ) from None
    if config.name == "lion":
        del options["eps"]
    if config.name == "prodigy":  # as its authors advise where the rate is warmed up
        options["safeguard_warmup"] = config.warmup_steps > 0
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints that its decay is decoupled
        optimizer = kind(parameters, **options)
    if config.name == "schedule_free":
        optimizer.train()
    return optimizer


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Around what looks at the trained weights: schedule-free AdamW's average takes their place.

    Behind the block they are to the bit what they were, so looking changes nothing. Other
    optimizers have no such average: nothing is done.
    """
    groups = optimizer.param_groups
    if not groups[0].get("train_mode", False):
        yield
        return
    weights = [p for group in groups for p in group["params"]]
    kept = [p.detach().clone() for p in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for p, value in zip(weights, kept, strict=True):
                p.copy_(value)


def _adamw_8bit() -> type[Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"train.optim.name: adamw_8bit needs bitsandbytes ({error}); "
            "`pip install fastpo[8bit]`, or use adamw or adafactor"
        ) from None
    return AdamW8bit


def setup_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """diffusers' schedules by name, counted in optimizer steps."""
    return get_scheduler(
        config.schedule,
        optimizer=optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
    )


def has_moved(schedule: LRScheduler) -> bool:
    """Whether an update has changed the weights: a warm-up's first has a rate of zero.

    The schedule counts updates; those that the fp16 scaler left out are not among them. Until then
    policy and reference agree, and a margin is the rounding of cached errors, of another batch or
    of compiled code.
    """
    assert isinstance(schedule, LambdaLR), "diffusers' schedules are factors of the rate"
    factor = schedule.lr_lambdas[0]
    return any(factor(update) > 0.0 for update in range(schedule.last_epoch))


def whole_size(parameter: Any) -> int:
    """Elements of a whole weight, also where this process keeps a part of it (ZeRO-3)."""
    return getattr(parameter, "ds_numel", parameter.numel())


def optimizer_bytes(parameters: Iterable[nn.Parameter], config: OptimConfig) -> int:
    """Bytes of optimizer state, whatever the weights' type.

    AdamW keeps two float32 per weight (Prodigy four, Lion one); 8-bit AdamW two bytes and two
    float32 scales per block; Adafactor the sums over rows and over columns.
    """
    total = 0
    for p in parameters:
        if config.name == "adamw_8bit" and p.numel() >= SMALLEST_8BIT:
            total += 2 * p.numel() + 8 * math.ceil(p.numel() / BLOCK)
        elif config.name != "adafactor":
            total += 4 * STATES.get(config.name, 2) * whole_size(p)
        elif p.ndim < 2:
            total += 4 * p.numel()
        else:
            total += 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2])
    return total
