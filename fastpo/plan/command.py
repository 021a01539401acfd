"""`fastpo init` on the command line: what it asks for, and what it says at the end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console

from fastpo.config import OBJECTIVES
from fastpo.errors import ConfigError
from fastpo.plan.gpus import GPUS
from fastpo.plan.init import Wanted, write_config


def init(
    out: Path | None,
    *,
    model: str | None,
    data: str | None,
    gpu: str | None,
    objective: str,
    method: Literal["lora", "full"] | None,
) -> None:
    """Writes a configuration; what is missing is asked for on a terminal.

    Raises:
        ConfigError: Something is missing and there is no terminal, or no such objective.
        FastPOError: As `write_config`.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"--objective: {objective!r} is none of {', '.join(OBJECTIVES)}")
    path = out or Path(_asked("OUT", "File to write", "run.yaml"))
    wanted = Wanted(
        model=model or _asked("--model", "Model (folder, .safetensors file or hub id)"),
        data=data or _asked("--data", "Preference data (folder, file or hub id)"),
        gpu=gpu or _gpu(),
        objective=objective,
        method=method,
    )
    with Console(stderr=True).status("planning") as spinner:
        config = write_config(path, wanted, status=spinner.update)
    train = config.train
    print(
        f"{path}: {train.method}, {train.micro_batch_size} x {train.accumulation_steps} pairs a "
        f"step for {wanted.gpu}; the file says why. Next: fastpo plan {shlex.quote(str(path))} "
        f"--gpu {wanted.gpu}"
    )


def _asked(option: str, question: str, default: str | None = None) -> str:
    """Asks on a terminal.

    Raises:
        ConfigError: There is none.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(f"fastpo init: {option} is missing, and there is no terminal to ask on")
    return typer.prompt(question, default=default)


def _gpu() -> str:
    """This machine's GPU, if its name is in the table; else the one that most people rent."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [key for key, gpu in GPUS.items() if gpu.name.split(" ", 1)[1].split(" (")[0] in name]
    return max(known, key=lambda key: len(GPUS[key].name)) if known else "rtx4090"
