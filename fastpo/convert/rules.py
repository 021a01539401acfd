"""What becomes of another trainer's option: a key of ours, a remark, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError

YES = ("true", "1", "yes")
NO = ("false", "0", "no", "", "none", "null")


@dataclass(frozen=True)
class Rule:
    """What becomes of one option.

    Attributes:
        key: The key that takes its value; None if none does.
        read: Makes the key's value of the option's text.
        switch: Whether the option has no value, and means true.
        note: What to say of it in the file, if it is not as harmless as it looks.
        refuse: Why it cannot be carried over.
        harmless: Texts of its value that change nothing, so that nothing is said or refused.
    """

    key: str | None = None
    read: Callable[[str], Any] = str
    switch: bool = False
    note: str | None = None
    refuse: str | None = None
    harmless: tuple[str, ...] = ()


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


def _value(rule: Rule, text: str | None, shown: str) -> Any:
    if rule.switch:
        if text is None or text.strip().lower() in YES:
            return True
        return False
    if text is None:
        raise ConfigError(f"{shown} has no value")
    try:
        return rule.read(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{shown}: {text!r} is no value of it") from None


def read_data(path: str) -> dict[str, str]:
    """Returns the keys of a data set that `--data` names: a folder, or Pick-a-Pic's hub id."""
    hub = re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]*pick[\w.-]*", path.lower())
    hub = hub and not Path(path).exists()
    return {"data.source": "pickapic" if hub else "folder", "data.path": path}


def truth(text: str | None) -> bool:
    """Whether a switch is on: given without a value, or with one that means yes."""
    return text is None or text.strip().lower() in YES
