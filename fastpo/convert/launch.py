"""Reads a launch command: the launcher's options, the script, and the script's arguments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fastpo.convert.rules import read_value, whole
from fastpo.errors import ConfigError

LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "python", "python3", "simpletuner")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_COUNTS = ("num_processes", "nproc_per_node", "num_gpus", "n")
_AS_MANY_AS_GPUS = ("auto", "gpu", "cpu", "-1")


@dataclass(frozen=True)
class Launch:
    """A launch command, taken apart.

    Attributes:
        command: The command in one line, variables put in.
        script: File name of the training script.
        options: The launcher's own options; None for those without a value.
        arguments: The script's, by name without dashes; None for those without a value. Of one
            that is given twice the last counts, as for argparse.
    """

    command: str
    script: str
    options: Mapping[str, str | None] = field(default_factory=dict)
    arguments: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def processes(self) -> int | None:
        """How many processes the launcher starts; None if it does not say.

        Raises:
            ConfigError: It says what is no number, nor that the machine decides.
        """
        for name in _COUNTS:
            if name not in self.options or self.options[name] in _AS_MANY_AS_GPUS:
                continue
            count = read_value(whole, self.options[name], f"--{name}")
            if count < 1:
                raise ConfigError(f"--{name}: {count} processes train nothing")
            return count
        return None


def read_launch(text: str) -> Launch:
    """Takes a launch command apart; lines that set variables may stand before it.

    Args:
        text: As in a shell script: `\\` at the end of a line goes on, `#` begins a comment.

    Raises:
        ConfigError: There is no command that starts a script, or a variable is not set.
    """
    words = words_of(text)
    if not words:
        raise ConfigError("the launch command is empty")
    start = next((i for i, word in enumerate(words) if _name(word) in LAUNCHERS), None)
    script = next(
        (i for i, word in enumerate(words) if word.endswith(".py") and i > (start or 0)), None
    )
    if start is None or script is None:
        raise ConfigError(
            f"no launch of a script in {' '.join(words)!r:.200}; expected such as `accelerate "
            "launch train.py --learning_rate 1e-8 ...`"
        )
    return Launch(
        shlex.join(words[start:]),
        _name(words[script]),
        read_options(words[start + 1 : script]),
        read_options(words[script + 1 :]),
    )


def read_options(words: list[str]) -> dict[str, str | None]:
    """Returns options by name, without dashes and with underscores; words alone are passed over."""
    found: dict[str, str | None] = {}
    for i, word in enumerate(words):
        if not word.startswith("-") or _is_number(word):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        following = words[i + 1] if i + 1 < len(words) else "--"
        alone = following.startswith("-") and not _is_number(following)
        found[name.replace("-", "_")] = value if equals else (None if alone else following)
    return found


def words_of(text: str) -> list[str]:
    """The command's words, with variables put in; those that set variables are left out."""
    variables: dict[str, str] = {}
    command: list[str] = []
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        if line.strip().startswith("#"):
            continue
        try:
            words = shlex.split(_filled(line, variables), comments=True)
        except ValueError as error:
            raise ConfigError(f"the launch command cannot be read: {error}") from None
        while words and (words[0] == "export" or _ASSIGNMENT.fullmatch(words[0])):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        command += words
    return command


def _filled(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise ConfigError(
                f"the launch command uses ${name}, which it does not set: put {name}=... before it"
            )
        return variables[name]

    return _VARIABLE.sub(value, text)


def _name(word: str) -> str:
    return PurePosixPath(word).name


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d*)?([eE][+-]?\d+)?", word) is not None
