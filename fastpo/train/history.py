"""`run.json`: how a run was started each time, with what, and which keys were changed since."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fastpo._version import __version__
from fastpo.system.files import write_text
from fastpo.train.changes import Change

RECORD = "run.json"
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "deepspeed",
    "bitsandbytes",
    "prodigyopt",
    "lion-pytorch",
    "schedulefree",
    "xformers",
)


class Start(BaseModel):
    """One start of a run.

    Attributes:
        when: Time in UTC, ISO 8601.
        step: Finished optimizer steps.
        command: The command line.
        folder: The folder that it was given in.
        commit: The git commit of that folder, if it lies in a checkout.
        versions: Of Python, FastPO and the packages that decide what is computed.
        host: The main process's machine.
        device: What it computes on.
        processes: How many there are.
        cache: The prepared cache's fingerprint.
        model: The model's fingerprint, see `fastpo.train.agreement.model_sample`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    when: str
    step: int
    command: str
    folder: str
    commit: str | None
    versions: dict[str, str]
    host: str
    device: str
    processes: int
    cache: str
    model: str


class RunRecord(BaseModel):
    """What `run.json` holds: every start, and every change, oldest first."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    starts: list[Start] = []
    changes: list[Change] = []


def read_record(run: Path) -> RunRecord | None:
    """Returns a run's record; None if it has none, or one that cannot be read."""
    try:
        return RunRecord.model_validate_json((run / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def write_record(run: Path, start: Start, changes: list[Change]) -> None:
    """Notes a start, behind those up to its step if it goes on from there.

    Args:
        run: The run's folder.
        start: The start.
        changes: All changes of the run up to it.
    """
    record = (read_record(run) if start.step else None) or RunRecord()
    whole = RunRecord(starts=[*record.starts, start], changes=changes)
    write_text(run / RECORD, whole.model_dump_json(indent=1) + "\n")


def describe_start(
    *, step: int, device: torch.device, processes: int, cache: str, model: str
) -> Start:
    """Describes this process as the start of a run."""
    return Start(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        step=step,
        command=shlex.join(sys.argv),
        folder=os.getcwd(),
        commit=_commit(),
        versions=_versions(),
        host=socket.gethostname(),
        device=_device_name(device),
        processes=processes,
        cache=cache,
        model=model,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fastpo": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
