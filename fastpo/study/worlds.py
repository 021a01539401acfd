"""The worlds that a study's YAML can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fastpo.config import Section
from fastpo.config.messages import explain
from fastpo.study.digits import Digits
from fastpo.study.emoji.world import Emoji
from fastpo.study.world import World

WORLDS: dict[str, type[Section]] = {Digits.name: Digits, Emoji.name: Emoji}
"""By name; each class has what `World` asks for."""


def build_world(given: str | Mapping[str, Any]) -> World:
    """Returns a world by its name, or by a mapping of its name and what differs from its defaults.

    Raises:
        ValueError: There is no such world, or it has no such key or value.
    """
    options = {"name": given} if isinstance(given, str) else dict(given)
    name = options.pop("name", None)
    if name not in WORLDS:
        raise ValueError(f"world: expected one of {', '.join(WORLDS)}, got {name!r}")
    kind = WORLDS[name]
    try:
        world = kind.model_validate(options)
    except ValidationError as error:
        complaints = "; ".join(explain(e, kind) for e in error.errors())
        raise ValueError(f"world {name}: {complaints}") from None
    assert isinstance(world, World)
    return world
