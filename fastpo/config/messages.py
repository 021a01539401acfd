"""Turns pydantic's errors into one line that names the key and the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from fastpo.config.fields import Section, discriminator_of, sections_of


def explain(error: Any, root: type[Section]) -> str:
    """Turns one pydantic error into `key: complaint`, with the nearest valid key if unknown."""
    location = [part for part in error["loc"] if isinstance(part, str | int)]
    names = _strip_tags(location, root)
    key = ".".join(map(str, names)) or "config"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(names[-1]), _valid_keys(location[:-1], root), n=1, cutoff=0.4
        )
        hint = f"; did you mean {'.'.join(map(str, [*names[:-1], near[0]]))}?" if near else ""
        return f"unknown key {key}{hint}"
    if error["type"] == "missing":
        return f"missing key {key}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    got = error.get("input")
    return f"{key}: {message}" + (f", got {got!r}" if not isinstance(got, dict) else "")


def _strip_tags(location: Sequence[str | int], root: type[Section]) -> list[str | int]:
    """Drops the union tags that pydantic puts into a location (`objective.dpo.beta`)."""
    names: list[str | int] = []
    node: Any = root
    for part in location:
        if isinstance(node, dict):
            node = node.get(part)
            continue
        names.append(part)
        node = _child(node, part)
    return names


def _valid_keys(location: Sequence[str | int], root: type[Section]) -> list[str]:
    """Returns the keys that are allowed at a pydantic location."""
    node: Any = root
    for part in location:
        node = node.get(part) if isinstance(node, dict) else _child(node, part)
    return list(node.model_fields) if isinstance(node, type) else []


def _child(node: Any, part: str | int) -> Any:
    """The section, or the sections by tag, that a key holds; None for a plain value."""
    if not (isinstance(node, type) and issubclass(node, Section)):
        return None
    field = node.model_fields.get(str(part))
    if field is None:
        return None
    sections, tag = sections_of(field), discriminator_of(field)
    if tag:
        return {get_args(s.model_fields[tag].annotation)[0]: s for s in sections}
    return sections[0] if sections else None
