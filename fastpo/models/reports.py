"""What is wrong with the keys of a component's weights, in one line, and why."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_SHOWN = 3
_WRAPPERS = {
    "_orig_mod.": "they are of a compiled model, save the one that it was compiled from",
    "base_model.model.": "they are of a PEFT model, merge its adapters before saving it",
    "base_layer.": "they are of a PEFT model, merge its adapters before saving it",
    "module.": "they are of a model wrapped by DDP or DeepSpeed, save the one inside",
}


def complain(
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, Any, Any]],
) -> str | None:
    """Says what is wrong with a file's keys, and why if their names tell; None if nothing is.

    Args:
        missing: Keys of the model that no file has.
        unexpected: Keys of the files that the model does not have.
        mismatched: Keys with the shape in the file and that of the model.
    """
    shapes = [f"{k} {list(there)} instead of {list(own)}" for k, there, own in mismatched]
    counts = (
        (missing, "lacks"),
        (unexpected, "has unexpected"),
        (shapes, "has in another shape"),
    )
    parts = [f"{verb} {_some(keys)}" for keys, verb in counts if keys]
    if not parts:
        return None
    return ", ".join(parts) + _cause(set(missing), unexpected)


def _some(keys: Collection[str]) -> str:
    """`2 keys (a, b)`."""
    first = sorted(keys)[:_SHOWN]
    more = ", ..." if len(keys) > _SHOWN else ""
    return f"{len(keys)} key{'s' * (len(keys) != 1)} ({', '.join(first)}{more})"


def _cause(missing: set[str], unexpected: Collection[str]) -> str:
    """What was put around the model's names, if a missing key is an unexpected one without it."""
    for text, why in _WRAPPERS.items():
        if any(text in key and key.replace(text, "") in missing for key in unexpected):
            return f": the names carry {text!r}, {why}"
    for key in sorted(unexpected):
        name = next((m for m in sorted(missing) if key.endswith(f".{m}")), None)
        if name is not None:
            return f": the names carry {key[: -len(name)]!r} in front"
    return ""
