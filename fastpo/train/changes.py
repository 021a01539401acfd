"""Which configurations go on from one another, and changes of a run that its user asked for.

`fastpo train CONFIG --resume --change train.optim.lr=1e-6` changes a key from the checkpoint on.
`run.json` and later checkpoints note it; a later `--resume` with the old YAML keeps it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fastpo._version import __version__
from fastpo.config import Config, TrainConfig, decides_result, flatten, parse_config, with_keys
from fastpo.config.sections import CONSTANT_SCHEDULES
from fastpo.errors import ConfigError

LENGTH = ("train.epochs", "train.max_steps")
_CHECKPOINTING = "train.gradient_checkpointing"
CHANGEABLE = (
    "train.optim.lr",
    "train.optim.schedule",
    "train.optim.warmup_steps",
    "train.optim.weight_decay",
    *LENGTH,
    "train.checkpoint_every",
    "train.keep_checkpoints",
    _CHECKPOINTING,
)
"""Keys that say how a run goes on, not what its earlier steps, ledger and averages mean."""
_EMPTY_RATE, _EMPTY = "train.empty_prompt_rate", "train.empty_prompt"


class Change(BaseModel):
    """One key that was changed on resuming.

    Attributes:
        key: Its full name.
        before: Its value in the steps up to `step`.
        after: Its value in the steps behind.
        step: Finished optimizer steps when it was changed.
        when: Time in UTC, ISO 8601.
        version: The version of FastPO.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: str
    before: Any
    after: Any
    step: int
    when: str
    version: str


def resumed_config(
    config: Config,
    saved: dict,
    recorded: Sequence[Change],
    asked: Sequence[str],
    *,
    step: int,
    tell: Callable[[str], None],
) -> tuple[Config, tuple[Change, ...]]:
    """Works out the configuration with which a run goes on.

    Args:
        config: The user's, which may lack the changes that the run has seen.
        saved: The checkpoint's, as nested mappings.
        recorded: Changes up to the checkpoint's step, oldest first.
        asked: New changes, each `key=value`.
        step: The checkpoint's finished steps.
        tell: Called with a line for each recorded change that `config` lacks.

    Returns:
        The configuration, and all changes of the run, the new ones last.

    Raises:
        ConfigError: A change is not possible; the text names the key.
    """
    there, here = flatten(completed(saved)), flatten(config.model_dump(mode="json"))
    current = {**there, **{change.key: change.after for change in recorded}}
    values: dict[str, Any] = {}
    for change in recorded:
        key = change.key
        earlier = [other.before for other in recorded if other.key == key]
        if here.get(key) != current[key] and here.get(key) in earlier and key not in values:
            values[key] = current[key]
            tell(
                f"{key} is {current[key]}, as --change has set it at step {change.step}; "
                f"the configuration says {here.get(key)}"
            )
    for key, value in done_before(saved).items():
        if here[key] != value:
            values[key] = value
            tell(f"{key} is {value}, as the run began under a version without the key")
    new = _read(asked)
    for one, other in (LENGTH, LENGTH[::-1]):
        if one in new and other not in new:
            new[other] = None
    if not values and not new:
        return config, tuple(recorded)
    raw = with_keys(config.model_dump(mode="json"), {**values, **new})
    resumed = parse_config(raw, where=f"--change {' '.join(asked)}".strip())
    now = flatten(resumed.model_dump(mode="json"))
    made = [
        Change(
            key=key,
            before=current.get(key),
            after=now[key],
            step=step,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
        )
        for key in new
        if now[key] != current.get(key)
    ]
    return resumed, (*recorded, *made)


def _read(asked: Sequence[str]) -> dict[str, Any]:
    """The values of `key=value` texts by key."""
    values: dict[str, Any] = {}
    for text in asked:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ConfigError(f"--change takes key.path=value, got {text!r}")
        if key not in CHANGEABLE:
            raise ConfigError(
                f"--change {text}: {key} cannot be changed within a run, only "
                f"{', '.join(CHANGEABLE)}; start a new run with another train.output_dir"
            )
        try:
            values[key] = yaml.safe_load(value) if value else None
        except (yaml.YAMLError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"--change {text}: the value is not valid YAML: {why}") from None
    return values


def differing_keys(saved: dict, config: Config, *, same: Collection[str] = ()) -> list[str]:
    """Returns `key: saved -> current` for every key on which results depend.

    A key that the saved configuration is too old to have counts as its default, and one that is
    gone by now differs.

    Args:
        saved: The checkpoint's configuration, as nested mappings.
        config: This run's.
        same: Keys that may differ: what they name was compared by content, or changed on purpose.
    """
    saved = completed(saved)
    before, now = flatten(saved), flatten(config.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in same and binds(key, config.train)
    ]


def binds(key: str, train: TrainConfig) -> bool:
    """Whether a checkpoint is resumed with the same value of a key only.

    Args:
        key: Its full name.
        train: The run's other settings, on which it depends for some keys.
    """
    # Under these the rate at a step does not depend on the total, so a run may be prolonged.
    if key in LENGTH and train.optim.schedule in CONSTANT_SCHEDULES:
        return False
    # A block's second run repeats the first to the bit; but the dearer backward pass decides how
    # `alive` and `sampled` cut their batches, and compiled code may round otherwise.
    if key == _CHECKPOINTING and train.backward == "all" and not train.compile:
        return False
    return decides_result(key, "run")


def completed(saved: dict) -> dict:
    """Returns a saved configuration with the keys that it lacks: what its version did, or defaults.

    What its version did is no default today where it was found to be wrong.
    """
    saved = with_keys(saved, done_before(saved))
    try:
        return _with_defaults(saved)
    except ValidationError as error:
        extra = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
    known = copy.deepcopy(saved)
    gone = [(path, _section(known, path).pop(path[-1])) for path in extra]
    try:
        filled = _with_defaults(known)
    except ValidationError:
        return saved
    for path, value in gone:
        _section(filled, path)[path[-1]] = value
    return filled


def done_before(saved: dict) -> dict[str, str]:
    """Keys that a saved configuration lacks whose default is another than what its version did."""
    known = flatten(saved)
    return {_EMPTY: "encoded"} if known.get(_EMPTY_RATE) and _EMPTY not in known else {}


def _with_defaults(saved: dict) -> dict:
    return Config.model_validate(saved).model_dump(mode="json")


def _section(tree: dict, path: tuple[int | str, ...]) -> dict:
    """The mapping with a path's last key; a path also names a union's tag, which is no key."""
    for key in path[:-1]:
        tree = tree.get(key, tree)
    return tree
