"""`fastpo convert-args`: from a launch command to a configuration file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastpo.config import parse_config
from fastpo.config.load import with_keys
from fastpo.convert.launch import Launch, read_launch
from fastpo.convert.rules import Draft
from fastpo.convert.scripts import SCRIPTS, Script, convert_script
from fastpo.errors import ConfigError
from fastpo.system.files import write_text
from fastpo.system.ownership import check_new

ORDER = ("seed", "model", "data", "prepare", "train", "evaluate")
NAMES = tuple(script.name for script in SCRIPTS)


def convert(
    text: str,
    out: Path,
    *,
    trainer: str | None = None,
    processes: int | None = None,
    data: str | None = None,
) -> Draft:
    """Writes the configuration of another trainer's launch.

    Args:
        text: The launch command, or a shell script with it.
        out: The YAML file to write, which must not exist.
        trainer: One of `NAMES`; default: told by the script's name and options.
        processes: How many processes train; default: as the command says, else one.
        data: The data instead of the command's: a folder, file or hub id with Pick-a-Pic's columns.

    Returns:
        The keys that were set, and what the reader has to know.

    Raises:
        ConfigError: The command cannot be read, is of no known trainer, or has an option that
            cannot be carried over; or `out` exists.
    """
    check_new(out, ConfigError)
    launch = read_launch(text)
    script = find_script(launch, trainer)
    draft = Draft()
    if data is not None:
        launch = Launch(
            launch.command,
            launch.script,
            launch.options,
            {**launch.arguments, "dataset_name": data},
        )
    _require(script, launch)
    convert_script(script, launch, processes=processes, draft=draft)
    draft.check(script.name)
    raw = with_keys({}, draft.keys)
    parse_config(raw, where=script.name)
    write_text(out, _as_yaml(raw, launch, script, draft))
    return draft


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


def _as_yaml(raw: Mapping[str, Any], launch: Launch, script: Script, draft: Draft) -> str:
    """The file's text, with the command and the notes as comments."""
    head = [f"From {script.name}: {launch.command}", *draft.notes]
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
