"""Whether the trackers of `train.trackers` can be used, asked before anything is written."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from fastpo.errors import ConfigError, one_line
from fastpo.system.process import Rank

_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that could not be started.

    Args:
        names: `tensorboard`, `wandb`.

    Raises:
        ConfigError: One is not installed or cannot be imported, or wandb, online, has no key on the
            process that logs; the text says what to do.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.trackers: {name} is not installed; `pip install {name}`, or take it out of "
                "the list"
            )
    if "wandb" in names and Rank.of_launch().rank == 0:
        _check_wandb()


def _check_wandb() -> None:
    if os.environ.get("WANDB_MODE", "").lower() in _WITHOUT_ACCOUNT:
        return
    try:
        import wandb  # pyright: ignore[reportMissingImports]

        key = wandb.api.api_key
    except Exception as error:
        raise ConfigError(f"train.trackers: wandb cannot be used ({one_line(error)})") from error
    if not key:
        raise ConfigError(
            "train.trackers: wandb has no key; run `wandb login`, set WANDB_API_KEY, or "
            "WANDB_MODE=offline, or take it out of the list (--set train.trackers=[])"
        )
