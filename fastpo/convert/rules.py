"""What becomes of another trainer's option: a key of ours, a remark, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastpo.config.load import parse_yaml
from fastpo.errors import ConfigError

Value = TypeVar("Value")
MOST = 1e30
"""Sizes of numbers, none of which means anything beyond; their products are finite."""
YES = ("true", "1", "yes")
NO = ("false", "0", "no", "", "none", "null")


def number(text: str) -> float:
    """Reads a finite number of a size that a configuration may hold.

    Raises:
        ValueError: It is none.
    """
    value = float(text)
    if not abs(value) <= MOST:  # NaN is not either
        raise ValueError("not finite, or too large")
    return value


def positive(text: str) -> float:
    """Reads a number that may be divided by; errors as `number`."""
    value = number(text)
    if value < 1.0 / MOST:
        raise ValueError("not positive")
    return value


def whole(text: str) -> int:
    """Reads a whole number, `512` or `512.0`; errors as `number`."""
    value = number(text)
    if not value.is_integer():
        raise ValueError("not whole")
    return int(value)


def numbers(text: str) -> list[float]:
    """Reads a list such as `0.9,0.999` or `[0.9, 0.999]`; errors as `number`."""
    return [number(part) for part in text.strip().strip("[]()").split(",")]


def names(text: str) -> list[str]:
    """Reads a name, or a list of names in YAML, which JSON is.

    Raises:
        ValueError: It is none.
    """
    found = parse_yaml(text)
    listed = found if isinstance(found, list) else [found]
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ValueError("no names")
    return listed


@dataclass(frozen=True)
class Rule:
    """What becomes of one option.

    Attributes:
        key: The key that takes its value; None if none does.
        read: Makes the key's value of the option's text; reads what goes into `sets`, too.
        switch: Whether the option has no value, and means true.
        note: What to say of it in the file, if it is not as harmless as it looks.
        refuse: Why it cannot be carried over.
        harmless: Texts of its value that change nothing, so that nothing is said or refused.
        sets: Keys that it decides together with other options, which the trainer's module does.
        about: What the documentation's table adds to that.
    """

    key: str | None = None
    read: Callable[[str], Any] = str
    switch: bool = False
    note: str | None = None
    refuse: str | None = None
    harmless: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    about: str | None = None


@dataclass
class Draft:
    """A configuration that is being made.

    Attributes:
        keys: Values of our keys, by full names.
        notes: What the reader has to know.
        refused: What cannot be carried over, with reasons.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def check(self, trainer: str) -> None:
        """Refuses the whole if a part cannot be carried over.

        Raises:
            ConfigError: Naming each of them.
        """
        if self.refused:
            raise ConfigError(f"{trainer}: cannot carry over: {'; '.join(self.refused)}")


def apply_rules(
    rules: Mapping[str, Rule], given: Mapping[str, str | None], draft: Draft, *, dashes: str = "--"
) -> None:
    """Puts options into a draft by their rules; an option without a rule is refused."""
    for name, text in given.items():
        rule, shown = rules.get(name), f"{dashes}{name}"
        if rule is None:
            draft.refused.append(f"{shown} (unknown: is it of another version of the trainer?)")
            continue
        if text is not None and text.strip().lower() in rule.harmless:
            continue
        if rule.refuse is not None:
            draft.refused.append(f"{shown} ({rule.refuse})")
            continue
        if rule.note is not None:
            draft.notes.append(f"{shown}: {rule.note}")
        if rule.key is not None:
            draft.keys[rule.key] = _value(rule, text, shown)
        elif rule.read is not str:
            read_value(rule.read, text, shown)  # so that it is refused by this name


def _value(rule: Rule, text: str | None, shown: str) -> Any:
    if rule.switch:
        if text is None or text.strip().lower() in YES:
            return True
        return False
    return read_value(rule.read, text, shown)


def read_value(read: Callable[[str], Value], text: str | None, shown: str) -> Value:
    """Reads an option's text; all that another trainer's options hold is read here.

    Args:
        read: Makes the value, or raises a `ValueError` or `KeyError`.
        text: The text; None if the option has no value.
        shown: What messages call the option.

    Raises:
        ConfigError: It has no value, or none that can be read.
    """
    if text is None:
        raise ConfigError(f"{shown} has no value")
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{shown}: {text!r:.80} is no value of it") from None


def read_option(
    given: Mapping[str, str | None], name: str, default: Value, read: Callable[[str], Value]
) -> Value:
    """Reads one of a command's options, its default where it is not given; as `read_value`."""
    return read_value(read, given[name], f"--{name}") if name in given else default


def read_key(
    given: Mapping[str, str | None], name: str, default: Value, read: Callable[[str], Value]
) -> Value:
    """Reads one of a file's options, as `read_option` those of a command."""
    return read_value(read, given[name], name) if name in given else default


def read_data(path: str) -> dict[str, str]:
    """Returns the keys of a data set that `--data` names: a folder, or Pick-a-Pic's hub id."""
    hub = re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]*pick[\w.-]*", path.lower())
    hub = hub and not Path(path).exists()
    return {"data.source": "pickapic" if hub else "folder", "data.path": path}


def truth(text: str | None) -> bool:
    """Whether a switch is on: given without a value, or with one that means yes."""
    return text is None or text.strip().lower() in YES
