"""Optimiser and learning-rate schedule from the configuration."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastpo.config import OptimConfig


def setup_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Optimizer:
    """AdamW, or Adafactor at a fixed rate (no relative step: what SDXL's published DPO uses)."""
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
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def setup_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """diffusers' schedules by name, counted in optimiser steps."""
    return get_scheduler(
        config.schedule,
        optimizer=optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
    )


def optimizer_bytes(parameters: Iterable[nn.Parameter], config: OptimConfig) -> int:
    """Bytes of optimiser state: two float32 per weight for AdamW, factored rows for Adafactor."""
    total = 0
    for p in parameters:
        if config.name == "adamw":
            total += 8 * p.numel()
        elif p.ndim < 2:
            total += 4 * p.numel()
        else:
            total += 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2])
    return total
