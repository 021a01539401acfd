"""The run's folder, its metrics, its banner and its progress bar."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from fastpo.config import Config, dump_config
from fastpo.errors import CheckpointError, NonFiniteLossError
from fastpo.ledger import PairLedger
from fastpo.loss import PairLoss
from fastpo.plan.memory import read_sharding
from fastpo.system.files import sweep, write_text
from fastpo.train.objective import describe_slope, initial_loss, needs_reference
from fastpo.train.optimizer import optimizer_bytes
from fastpo.types import PairBatch

if TYPE_CHECKING:
    from fastpo.data.cache import PairCache
    from fastpo.train.loop import Trainer

COLUMNS = (
    "index",
    "timestep",
    "loss",
    "margin",
    "error_winner",
    "error_loser",
    "minority",
    "weight",
)
MINORITY = "minority.csv"
RESULTS = ("metrics.jsonl", "config.yaml", MINORITY)
FOLDERS = ("checkpoints", "final", "ema", "evaluation")


@dataclass(frozen=True)
class StepTable:
    """One row per pair of an optimiser step, on the host.

    Attributes:
        rows: `(N, K)` float64 by `COLUMNS`, without padding.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: The rate this step used.
    """

    rows: Tensor
    grad_norm: float
    learning_rate: float

    @classmethod
    def read(cls, rows: Tensor, grad_norm: Tensor | float, learning_rate: float) -> StepTable:
        """Brings the step's rows and its gradient norm to the host: the step's one wait."""
        norm = torch.as_tensor(grad_norm, dtype=rows.dtype, device=rows.device)
        host = torch.cat((rows, norm.expand(1, rows.shape[1]))).cpu()
        rows, norm = host[:-1], host[-1, 0]
        return cls(rows[rows[:, 0] >= 0], norm.item(), learning_rate)

    def __getitem__(self, column: str) -> Tensor:
        """Returns one column, `(N,)` float64."""
        return self.rows[:, COLUMNS.index(column)]

    @property
    def index(self) -> Tensor:
        """The pairs' positions in the cache, `(N,)` int64."""
        return self["index"].long()

    def non_finite(self) -> list[int]:
        """Returns the positions of the pairs in micro-batches whose loss is NaN or infinite."""
        return self.index[~torch.isfinite(self["loss"])].tolist()

    def metrics(
        self, *, step: int, epoch: float, seconds: float, waited: float = 0.0
    ) -> dict[str, float]:
        """Returns the line of `metrics.jsonl`; keys whose column was not computed are left out.

        Args:
            step: Finished optimiser steps.
            epoch: Finished epochs.
            seconds: What the step took.
            waited: How much of that it waited for data; `data/wait` is the share.
        """
        margin = self["margin"]
        metrics = {
            "step": step,
            "epoch": round(epoch, 6),
            "loss": self["loss"].mean().item(),
            "rewards/margins": margin.mean().item(),
            "rewards/accuracies": (margin > 0).double().mean().item(),
            "error/winner": self["error_winner"].mean().item(),
            "error/loser": self["error_loser"].mean().item(),
            "lr": self.learning_rate,
            "grad_norm": self.grad_norm,
            "pairs_per_second": len(margin) / seconds,
            "data/wait": waited / seconds,
        }
        minority, weight = self["minority"], self["weight"]
        if not minority.isnan().any():
            for q in (0.1, 0.5, 0.9):
                metrics[f"minority/q{round(100 * q)}"] = minority.quantile(q).item()
        if not weight.isnan().any():
            metrics["weight/mean"] = weight.mean().item()
        return metrics


def table_rows(batch: PairBatch, timesteps: Tensor, out: PairLoss, size: int) -> Tensor:
    """One row of `COLUMNS` per pair, padded with index -1 to `size` rows; stays on the device."""
    pairs = len(batch)
    error = out.policy_error.double()
    if out.reference_error is not None:
        error = error - out.reference_error
    nothing = torch.full((pairs,), math.nan, dtype=torch.float64, device=error.device)
    columns = {
        "index": batch.index,
        "timestep": timesteps,
        "loss": out.loss.detach().expand(pairs),
        "margin": out.margin,
        "error_winner": error[:pairs],
        "error_loser": error[pairs:],
        "minority": nothing if out.minority is None else out.minority,
        "weight": nothing if out.weight is None else out.weight,
    }
    rows = torch.stack([columns[name].double() for name in COLUMNS], dim=1)
    return torch.nn.functional.pad(rows, (0, 0, 0, size - pairs), value=-1.0)


class RunFolder:
    """Where a run keeps its results; only the main process writes.

    Args:
        path: The folder.
        main: Whether this is the main process.
    """

    def __init__(self, path: Path, *, main: bool) -> None:
        self.path = path
        self.main = main

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuses to mix two runs.

        Raises:
            CheckpointError: The folder holds a run and neither flag was given.
        """
        if resume or overwrite or not any((self.path / name).exists() for name in RESULTS):
            return
        raise CheckpointError(
            f"{self.path} already holds a run: go on with --resume, replace it with --overwrite, "
            "or set another train.output_dir"
        )

    def clear(self) -> None:
        """Removes an earlier run's results, and nothing else that lies in the folder."""
        if not self.main:
            return
        for name in (*FOLDERS, "tensorboard", "fastpo"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Makes the folder, or tidies up what a killed process left there."""
        if not self.main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.path / "checkpoints"):
            sweep(folder)

    def has_results(self, exports: Iterable[str]) -> bool:
        """Whether all that a run writes at its end is there.

        Args:
            exports: The folders of exported weights.
        """
        return all((self.path / name).exists() for name in (*exports, MINORITY))

    def begin(self, config: Config, start: int) -> None:
        """Saves the resolved configuration and drops what steps that come will write anew."""
        if not self.main:
            return
        (self.path / MINORITY).unlink(missing_ok=True)
        write_text(self.path / "config.yaml", dump_config(config))
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines[:start]))

    def log(self, metrics: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if self.main:
            with (self.path / "metrics.jsonl").open("a") as file:
                # JSON has no infinity; an fp16 gradient norm may be one.
                finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
                file.write(json.dumps(finite) + "\n")

    def write_minority(self, cache: PairCache, ledger: PairLedger, metric: Tensor) -> None:
        """Writes what the run found out about every pair, its last result, for the report."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = ("visits", "ledger_mean", "ledger_minority", "metric_minority")
        writer.writerow(("pair_id", "flipped", *names))
        columns = (cache.flipped.int(), ledger.visits, ledger.mean(), ledger.minority(), metric)
        for pair_id, *values in zip(cache.pair_ids, *(c.tolist() for c in columns), strict=True):
            writer.writerow([pair_id, *("" if v != v else v for v in values)])
        write_text(self.path / MINORITY, text.getvalue())


def check_finite(trainer: Trainer, run: RunFolder, table: StepTable, step: int) -> None:
    """Stops at a NaN or infinite loss or gradient, before anything of this step is kept."""
    bad, what = table.non_finite(), "loss"
    # fp16 gradients overflow now and then; the scaler leaves such a step out.
    if not bad and not math.isfinite(table.grad_norm) and trainer.state.scaler is None:
        bad, what = table.index.tolist(), "gradient"
    if not bad:
        return
    names = [trainer.cache.pair_ids[i] for i in bad[:8]]
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    kept = sorted((run.path / "checkpoints").glob("step-*"))
    raise NonFiniteLossError(
        f"the {what} of step {step + 1} is not finite, in micro-batches with the pairs "
        f"{', '.join(names)}{more}; "
        + (f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet")
        + ". A lower train.optim.lr or slope usually helps."
    )


def show_banner(trainer: Trainer, start: int) -> None:
    """States what is about to run, before it runs."""
    Console(stderr=True).print(Panel(_banner(trainer, start), title="FastPO", expand=False))


def _banner(trainer: Trainer, start: int) -> Table:
    config, accelerator = trainer.config.train, trainer.accelerator
    annotators = config.annotators
    judged = "" if annotators is None else f", annotators: {annotators.kind}"
    pairs = config.micro_batch_size * trainer.group
    first = initial_loss(config.objective)
    flipped = int(trainer.cache.flipped.sum())
    rows = {
        "objective": config.objective.name + judged,
        "slope": describe_slope(config.objective),
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
    if not needs_reference(trainer.config.train):
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


@contextmanager
def progress_bar(
    total: int, start: int, *, enabled: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Shows steps, loss, accuracy, rate and time left; gives a function to call after each step."""
    progress = Progress(
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )
    with progress:
        task = progress.add_task("train", total=total, completed=start, text="")
        recent: list[float] = []

        def advance(metrics: dict[str, Any]) -> None:
            recent.append(metrics["pairs_per_second"])
            del recent[:-20]
            text = (
                f"loss {metrics['loss']:.4f} · accuracy {metrics['rewards/accuracies']:.2f} · "
                f"{np.median(recent):.1f} pairs/s"
            )
            progress.update(task, advance=1, text=text)

        yield advance
