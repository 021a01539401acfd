"""`fastpo convert-args`: from a launch command to a configuration file."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import Reader

from fastpo.config import parse_config
from fastpo.config.load import with_keys
from fastpo.convert import flow_factory, simpletuner, simpletuner_options
from fastpo.convert.launch import Launch, read_launch, read_options, words_of
from fastpo.convert.rules import Draft
from fastpo.convert.scripts import SCRIPTS, Script, convert_script
from fastpo.errors import ConfigError
from fastpo.system.files import make_folder, write_text
from fastpo.system.json_text import read_bounded
from fastpo.system.ownership import check_new

MOST_BYTES = 1 << 20
"""Of a file."""
EXPECTED = "expected a shell script with a launch, SimpleTuner's or Flow-Factory's configuration"
ORDER = ("seed", "model", "data", "prepare", "train", "evaluate")
COMMAND = re.compile(r"^\s*(\S+/)?simpletuner\s+train\b", re.MULTILINE)
NAMES = (*(script.name for script in SCRIPTS), simpletuner_options.NAME, flow_factory.NAME)


def convert(
    text: str,
    out: Path,
    *,
    trainer: str | None = None,
    processes: int | None = None,
    data: str | None = None,
    file: str = "",
) -> Draft:
    """Writes the configuration of another trainer's launch, or of its own configuration.

    Args:
        text: The launch command, or a shell script with it; or the content of SimpleTuner's
            `config.json` or `config.env`, or of Flow-Factory's YAML.
        out: The YAML file to write, which must not exist.
        trainer: One of `NAMES`; default: told by the script's name and options.
        processes: How many processes train; default: as the command says, else one.
        data: The data instead of the command's: a folder, file or hub id with Pick-a-Pic's columns.
        file: Name of the file that the text is from, if it is: its ending tells what it is.

    Returns:
        The keys that were set, and what the reader has to know.

    Raises:
        ConfigError: The command cannot be read, is of no known trainer, or has an option that
            cannot be carried over; or `out` exists.
    """
    check_new(out, ConfigError)
    if Reader.NON_PRINTABLE.search(text):  # which no YAML file can hold
        raise ConfigError(f"{file or 'the launch command'}: it is no text; {EXPECTED}")
    draft = Draft()
    name = trainer or recognize(text, file)
    if name in (simpletuner_options.NAME, flow_factory.NAME):
        command = file or name
        _convert_settings(name, text, file, draft, processes=processes, data=data)
    else:
        name, command = _convert_launch(text, trainer, draft, processes=processes, data=data)
    draft.check(name)
    raw = with_keys({}, draft.keys)
    parse_config(raw, where=name)
    make_folder(out.parent)
    write_text(out, _as_yaml(raw, f"From {name}: {command}", draft))
    return draft


def read_source(command: str) -> tuple[str, str]:
    """Returns the text that a user names, and the name of the file that it is from, else "".

    Args:
        command: A launch command, of any length, or a file's path.

    Raises:
        ConfigError: The file is large, or no text.
        OSError: It cannot be read.
    """
    if not os.path.isfile(command):  # a `Path` says of a long command that no name is as long
        return command, ""
    file = Path(command)
    try:
        return read_bounded(file, MOST_BYTES).decode("utf-8-sig"), file.name
    except ValueError as error:
        why = "it is no text" if isinstance(error, UnicodeDecodeError) else error
        raise ConfigError(f"{file} cannot be read: {why}; {EXPECTED}") from None


def recognize(text: str, file: str) -> str | None:
    """Tells whose settings a text holds, if it is no launch of a script."""
    if file.endswith((".json", ".env")):
        return simpletuner_options.NAME
    if file.endswith((".yaml", ".yml")) or re.search(r"^\s+trainer_type\s*:", text, re.MULTILINE):
        return flow_factory.NAME
    of_options = text.lstrip().startswith("{") or COMMAND.search(text)
    return simpletuner_options.NAME if of_options else None


def _convert_settings(
    name: str, text: str, file: str, draft: Draft, *, processes: int | None, data: str | None
) -> None:
    """Puts a trainer's own configuration into a draft."""
    if name == flow_factory.NAME:
        raw = flow_factory.read_factory(text)
        flow_factory.convert_factory(raw, draft, processes=processes, data=data)
        return
    if text.lstrip().startswith("{"):
        options = simpletuner_options.read_json_options(text)
    elif COMMAND.search(text):
        options = read_options(words_of(text))
    else:
        options = simpletuner_options.read_env_options(text)
    simpletuner.convert_simpletuner(options, draft, processes=processes, data=data)


def _convert_launch(
    text: str, trainer: str | None, draft: Draft, *, processes: int | None, data: str | None
) -> tuple[str, str]:
    """Puts a launch into a draft; returns the trainer's name, and the command in one line."""
    launch = read_launch(text)
    script = find_script(launch, trainer)
    if data is not None:
        launch = Launch(
            launch.command,
            launch.script,
            launch.options,
            {**launch.arguments, "dataset_name": data},
        )
    _require(script, launch)
    convert_script(script, launch, processes=processes, draft=draft)
    return script.name, launch.command


def find_script(launch: Launch, trainer: str | None = None) -> Script:
    """Returns the script that a command starts, by its name and, of `train.py`, its options.

    Raises:
        ConfigError: None is known, or several may be meant.
    """
    if trainer is not None:
        found = [script for script in SCRIPTS if script.name == trainer]
        if not found:
            raise ConfigError(f"--trainer: {trainer!r} is none of {', '.join(NAMES)}")
        return found[0]
    named = [script for script in SCRIPTS if launch.script in script.files]
    if len(named) > 1:
        strange = {s.name: [a for a in launch.arguments if a not in s.rules] for s in named}
        fewest = min(map(len, strange.values()))
        named = [script for script in named if len(strange[script.name]) == fewest]
    if len(named) != 1:
        which = " and ".join(script.name for script in named) or "none of the known trainers"
        raise ConfigError(
            f"{launch.script}: it is {which} by its name and options: name it, --trainer "
            f"{'|'.join(NAMES)}"
        )
    return named[0]


def _require(script: Script, launch: Launch) -> None:
    needed = ("pretrained_model_name_or_path", "dataset_name", "output_dir")
    missing = [
        name for name in needed if not launch.arguments.get(name) and name not in script.defaults
    ]
    if missing:
        raise ConfigError(f"{script.name}: the command lacks --{', --'.join(missing)}")


def _as_yaml(raw: Mapping[str, Any], origin: str, draft: Draft) -> str:
    """The file's text, with where it is from and the notes as comments."""
    head = [origin, *draft.notes]
    comments = "".join(
        textwrap.fill(
            line,
            100,
            initial_indent="# " if i == 0 else "# * ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        + "\n"
        for i, line in enumerate(head)
    )
    ordered = {section: raw[section] for section in ORDER if section in raw}
    return comments + "\n" + yaml.safe_dump(ordered, sort_keys=False, width=100)
