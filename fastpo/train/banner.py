"""What is about to run, stated before it runs."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from fastpo.system.process import started_alone
from fastpo.system.words import counted
from fastpo.train.data import TrainingData
from fastpo.train.sharding import count_trained, held, read_sharding
from fastpo.train.trainer import Trainer


def show_banner(trainer: Trainer, data: TrainingData, start: int) -> None:
    """Prints objective, data, batch, precision, memory and folder.

    Args:
        trainer: What a step uses.
        data: What is read.
        start: Optimizer steps that are done already.
    """
    Console(stderr=True).print(Panel(_banner(trainer, data, start), title="FastPO", expand=False))


def _banner(trainer: Trainer, data: TrainingData, start: int) -> Table:
    config, processes = trainer.config, trainer.processes
    annotators = "" if config.annotators is None else f", annotators: {config.annotators.kind}"
    pairs = config.micro_batch_size * data.micro_batches_per_step
    first = config.objective.first_loss()
    flipped = int(data.cache.flipped[data.sampler.pairs].sum())
    rows = {
        "objective": config.objective.name + annotators,
        "slope": trainer.objective.describe_slope() + _follows(trainer),
        "first loss": "not fixed" if first is None else f"{first:.4f} where policy = reference",
        "reference": _reference(trainer),
        "pairs": f"{len(data.sampler.pairs):,}"
        + (f", {counted(flipped, 'label')} flipped" if flipped else ""),
        "pair weight": _pair_weight(data),
        "held out": _held_out(trainer, data),
        "batch": f"{counted(pairs, 'pair')} = {config.micro_batch_size} x "
        f"{config.accumulation_steps} accumulation x {processes.count} process(es)",
        **_backward(trainer),
        "steps": f"{data.total_steps:,}" + (f", going on after {start:,}" if start else ""),
        "precision": config.precision,
        "device": _device_name(processes.device),
        "memory": _memory(trainer),
        "folder": str(config.output_dir),
    }
    for name in ("pair weight", "held out"):
        if not rows[name]:
            del rows[name]
    if processes.count == 1 and started_alone():
        rows["warning"] = (
            "accelerate launch --cpu was asked for several processes and started one; use "
            "torchrun --nproc_per_node N -m fastpo.train CONFIG"
        )
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    return table


def _follows(trainer: Trainer) -> str:
    """Towards what a slope that is not fixed moves."""
    share = trainer.config.auto_slope
    return "" if share is None else f"; moves until {share:.0%} of the pairs are saturated"


def _backward(trainer: Trainer) -> dict[str, str]:
    """Which pairs get a backward pass, where not all do."""
    config, share = trainer.config, trainer.state.live_share
    if share is None:
        return {}
    which = {
        "alive": "pairs whose gradient is not zero",
        "sampled": f"gradient scales from {config.backward_threshold:g} on, and part of the others",
    }[config.backward]
    late = f"; {share.value:.0%} needed one of late" if share.known else ""
    if late and trainer.processes.count > 1:
        late += " on the process with the most"
    return {"backward": which + late}


def _pair_weight(data: TrainingData) -> str:
    """What the data set's weights are; empty where it has none."""
    if data.cache.pair_weight is None:
        return ""
    weight = data.cache.pair_weight[data.sampler.pairs].double()
    zero = int((weight == 0).sum())
    told = f"; {counted(zero, 'pair')} of weight 0" if zero else ""
    return f"{weight.min():.3g} to {weight.max():.3g}, mean {weight.mean():.3g}{told}"


def _held_out(trainer: Trainer, data: TrainingData) -> str:
    """How much is measured on held-out pairs, and how often; empty without any."""
    held, config = int(data.cache.held_out.sum()), trainer.config
    if not held:
        return ""
    kept = "; the best checkpoint is kept" if config.keep_best else ""
    patience = config.early_stop
    stops = "" if patience is None else f"; stops after {patience} without a higher accuracy"
    draws = counted(config.held_out_draws, "draw")
    every = counted(config.measures_every, "step")
    return f"{counted(held, 'pair')}, {draws} each, every {every}{kept}{stops}"


def _reference(trainer: Trainer) -> str:
    if not trainer.config.needs_reference:
        return "none"
    errors = trainer.reference_errors
    if errors is not None:
        return f"cached, {counted(errors.visits, 'visit')}"
    return "live, " + ("adapters off" if trainer.denoisers.frozen is None else "a frozen copy")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"


def _memory(trainer: Trainer) -> str:
    """What this process holds on its device; activations depend on the kernel."""
    config, denoisers = trainer.config, trainer.denoisers
    sharding = read_sharding(config, trainer.processes.count)
    trained = count_trained(denoisers.policy.parameters(), config)
    averages = sum(len(a.decays) for a in trainer.state.averages.values())
    frozen = [] if denoisers.frozen is None else denoisers.frozen.parameters()
    parts = held(trained, sharding) | {
        "reference": sum(p.numel() * p.element_size() for p in frozen),
        "averages": averages * sharding.part(4 * trained.count, 3),
    }
    host = parts.pop("host")
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    mode = f"; {sharding}" if sharding.stage else ""
    away = f"; {_size(host)} in host memory" if host else ""
    return f"{_size(sum(parts.values()))} + activations ({listed}){mode}{away}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
