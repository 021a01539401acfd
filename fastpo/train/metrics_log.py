"""`metrics.jsonl`: what of it a resumed run keeps."""

from __future__ import annotations

import json
from pathlib import Path

from fastpo.errors import CheckpointError
from fastpo.system.checksums import Checksum, checksum_of

METRICS = "metrics.jsonl"


def kept_metrics(path: Path, start: int) -> bytes:
    """Returns the lines of `metrics.jsonl` up to a step.

    Lines of later steps are left out, and so is what a kill has cut off behind the last line.

    Args:
        path: The file.
        start: Finished optimizer steps.

    Raises:
        CheckpointError: Another line cannot be read; the text gives its number.
    """
    try:
        lines = path.read_bytes().split(b"\n") if start else []
    except FileNotFoundError:
        return b""
    kept: list[bytes] = []
    reached = 0
    for number, line in enumerate(lines[:-1], 1):  # behind the last line's end nothing is whole
        step = _step_of(line)
        if step is None and reached < start:
            raise CheckpointError(
                f"{path}, line {number} is no metrics of a step: take the line out, or restore the "
                f"file, to go on from step {start}"
            )
        reached = max(reached, step or 0)
        if step is not None and step <= start:
            kept.append(line + b"\n")
    return b"".join(kept)


def check_metrics(path: Path, start: int, recorded: Checksum | None) -> str | None:
    """Compares `metrics.jsonl` with what it was when a checkpoint was written.

    Returns:
        A line that tells that it differs; None if it does not, or nothing was recorded.

    Raises:
        CheckpointError: As `kept_metrics`.
    """
    kept = kept_metrics(path, start)
    if recorded is None or checksum_of(kept) == recorded:
        return None
    steps = len(kept.splitlines())
    return (
        f"{path} is not as it was when step {start} was saved: it has {steps} whole lines up to "
        f"there, {len(kept)} bytes of {recorded.bytes}; the run goes on, without what is missing"
    )


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
