"""What is about to run, stated before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from fastpo.train.optimizer import optimizer_bytes
from fastpo.train.sharding import read_sharding

if TYPE_CHECKING:
    from fastpo.train.loop import Trainer


def show_banner(trainer: Trainer, start: int) -> None:
    """States what is about to run, before it runs."""
    Console(stderr=True).print(Panel(_banner(trainer, start), title="FastPO", expand=False))


def _banner(trainer: Trainer, start: int) -> Table:
    config, accelerator = trainer.config.train, trainer.accelerator
    annotators = config.annotators
    judged = "" if annotators is None else f", annotators: {annotators.kind}"
    pairs = config.micro_batch_size * trainer.group
    first = config.objective.initial_loss
    flipped = int(trainer.cache.flipped.sum())
    rows = {
        "objective": config.objective.name + judged,
        "slope": config.objective.describe_slope(),
        "first loss": "not fixed" if first is None else f"{first:.4f} where policy = reference",
        "reference": _reference(trainer),
        "pairs": f"{len(trainer.cache):,}" + (f", {flipped:,} labels flipped" if flipped else ""),
        "batch": f"{pairs} pairs = {config.micro_batch_size} x {config.accumulation_steps} "
        f"accumulation x {accelerator.num_processes} process(es)",
        "steps": f"{trainer.total_steps:,}" + (f", going on after {start:,}" if start else ""),
        "precision": config.precision,
        "device": _device_name(accelerator.device),
        "memory": _memory(trainer),
        "folder": str(config.output_dir),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    return table


def _reference(trainer: Trainer) -> str:
    if not trainer.config.train.needs_reference:
        return "none"
    if trainer.reference_errors is not None:
        return f"cached, {trainer.reference_errors.visits} visits"
    return "live, " + ("adapters off" if trainer.denoisers.frozen is None else "a frozen copy")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _memory(trainer: Trainer) -> str:
    """What this process holds on its device; activations depend on the kernel."""
    config, state = trainer.config.train, trainer.state
    sharding = read_sharding(config, trainer.accelerator.num_processes)
    policy, trainable = trainer.denoisers.policy.parameters(), list(state.trainable.values())
    count = sum(map(_numel, trainable))
    gradients = sum(_numel(p) * p.element_size() for p in trainable)
    # DeepSpeed's engine steps on its own copy of the weights, and on AdamW's states alone.
    states = 12 * count if sharding.stage else optimizer_bytes(trainable, config.optim)
    frozen = trainer.denoisers.frozen
    parts = {
        "weights": sharding.part(sum(_numel(p) * p.element_size() for p in policy), 3),
        "gradients": sharding.part(gradients, 2),
        "optimiser": 0 if sharding.offload_optimizer else sharding.part(states, 1),
        "reference": 0
        if frozen is None
        else sum(p.numel() * p.element_size() for p in frozen.parameters()),
        "averages": sharding.part(4 * count, 3)
        * sum(len(a.decays) for a in state.averages.values()),
    }
    if sharding.offload_param:
        parts["weights"] = 0
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    mode = f"; {sharding}" if sharding.stage else ""
    return f"{_size(sum(parts.values()))} + activations ({listed}){mode}"


def _numel(parameter: Any) -> int:
    """Elements of a whole weight, also where this process keeps a part of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
