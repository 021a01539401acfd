"""Packages that hand on names of modules which are costly to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__` (PEP 562) that imports a name when it is first asked for.

    Importing `fastpo.models.folder` runs `fastpo/models/__init__.py` first. Names handed on there
    eagerly would load diffusers for a command that only reads a JSON file.

    Args:
        package: The package's `__name__`.
        modules: The module that defines each public name.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return __getattr__
