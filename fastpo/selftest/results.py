"""What a command made, as digests: equal ones mean that a fault has changed nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpo.selftest.world import STEPS, TRAININGS, Stage

Results = dict[str, str]
"""The digest of each result by its name."""

# Locks hold nothing, each folder's marker has a number of its own, and the memo of the model's
# digest has its files' times of change. Temporaries of ended processes are swept by the command
# that next writes beside them.
_IGNORED = (".claims", ".writer", ".fastpo", "unet.json")
_TIMES = ("pairs_per_second", "data/wait")


def results(stage: Stage, place: Path) -> Results:
    """Digests what a command must have made in a place.

    Of tensors, names, values, shapes and dtypes count; of metrics, everything but the times.

    Raises:
        OSError, ValueError: A result is missing or cannot be read.
    """
    if stage in TRAININGS:
        return dict(_of_training(place / stage, STEPS[stage]))
    if stage == "evaluate":
        return dict(_of_files(place / "lora" / "evaluation"))
    found = dict(_of_files(place / "cache"))
    reference = {name: digest for name, digest in found.items() if name.startswith("reference/")}
    return reference if stage == "reference" else _without(found, reference)


def differing(expected: Results, found: Results) -> list[str]:
    """Returns the names of the results that differ, or that only one side has."""
    names = expected.keys() | found.keys()
    return sorted(name for name in names if expected.get(name) != found.get(name))


def _without(all_results: Results, some: Results) -> Results:
    return {name: digest for name, digest in all_results.items() if name not in some}


def _of_files(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _IGNORED and ".partial-" not in path.name:
            yield path.relative_to(folder).as_posix(), _digest(path.read_bytes())


def _of_training(run: Path, steps: int) -> Iterator[tuple[str, str]]:
    folders = ["final", f"checkpoints/step-{steps:08d}"]
    folders += ["ema"] if (run / "ema").exists() else []
    for folder in folders:
        files = [path for path in sorted((run / folder).rglob("*")) if path.is_file()]
        tensors = [path for path in files if path.suffix in (".safetensors", ".pt")]
        if not tensors:
            raise FileNotFoundError(f"{run / folder} holds no tensors")
        for path in tensors:
            yield path.relative_to(run).as_posix(), _digest_tensors(path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in line if key not in _TIMES} for line in lines]
    yield "metrics.jsonl", _digest(json.dumps(kept).encode())
    yield "minority.csv", _digest((run / "minority.csv").read_bytes())


def _digest_tensors(path: Path) -> str:
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".pt":
        content = torch.load(path, map_location="cpu", weights_only=True)
    else:
        content = load_file(path)
    return _digest("\n".join(_describe(content)).encode())


def _describe(value: Any, place: str = "") -> Iterator[str]:
    """Yields a line for each leaf of nested mappings and lists."""
    import torch

    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _describe(value[key], f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _describe(item, f"{place}/{number}")
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield f"{place}: {value.dtype} {tuple(value.shape)} {_digest(content)}"
    else:
        yield f"{place}: {value!r}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
