"""Which keys decide which results, as stated at the keys (`fastpo.config.fields.decides`)."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from fastpo.config.fields import Result, keys_of
from fastpo.config.load import Config, flatten

# Keys that came later, with the values of what was done before: there they are left out, so that
# earlier work is found again.
_LATER = {
    "prepare.prompt_chunks": 1,
    "prepare.clip_skip": 0,
    "prepare.text_length": None,
    "train.flow_shift": None,
    "train.guidance": None,
    "train.quantize_base": None,
}


def decides_result(key: str, result: Result) -> bool:
    """Whether a result depends on a key of a configuration, given by its full name.

    A section decides what some key in it decides. So does a key that this version does not have
    (the configuration was saved by another one), by the section that it lies in.
    """
    statements = _statements()
    key = ".".join(part for part in key.split(".") if not part.isdecimal())  # one of a list
    if key in statements:
        return result in statements[key]
    section = key
    while section:
        inside = [results for k, results in statements.items() if k.startswith(f"{section}.")]
        if inside:
            return any(result in results for results in inside)
        section = section.rpartition(".")[0]
    return True


def decided_values(config: Config, result: Result, *, named: Collection[str]) -> dict[str, Any]:
    """The values of all keys on which a result depends, by full key.

    Keys that came later are left out where they say what was done before.

    Args:
        config: The configuration.
        result: What depends on them.
        named: Keys, or sections, of which the caller names the content itself.
    """
    return {
        key: value
        for key, value in flatten(config.model_dump()).items()
        if decides_result(key, result)
        and not _lies_in(key, named)
        and not (key in _LATER and value == _LATER[key])
    }


def as_text(value: Any) -> str:
    """A value as fingerprints hold it: truth values in lower case, as in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _lies_in(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


@cache
def _statements() -> dict[str, frozenset[str]]:
    """Every key's results; where several sections of a union have one key, those of all."""
    statements: dict[str, frozenset[str]] = {}
    for key, results in keys_of(Config):
        statements[key] = statements.get(key, frozenset()) | results
    return statements
