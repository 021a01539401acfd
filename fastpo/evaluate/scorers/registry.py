"""Scorers by name, imported when one is named."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from fastpo.errors import ConfigError
from fastpo.evaluate.scorers.base import BATCH_SIZE, Scorer


@dataclass(frozen=True)
class ScorerEntry:
    """Where a named scorer is defined; it is imported when a configuration names it.

    Attributes:
        target: `module:class`.
        takes_argument: Whether it is built with the text after the colon, a device, a batch size
            and a precision, or with nothing.
    """

    target: str
    takes_argument: bool = True


_HERE = "fastpo.evaluate.scorers"
SCORERS = {
    "pickscore": ScorerEntry(f"{_HERE}.clip:PickScorer"),
    "hpsv2": ScorerEntry(f"{_HERE}.hps:HpsScorer"),
    "hpsv2.1": ScorerEntry(f"{_HERE}.hps:Hps21Scorer"),
    "hpsv3": ScorerEntry(f"{_HERE}.hps3:Hps3Scorer"),
    "imagereward": ScorerEntry(f"{_HERE}.image_reward:ImageRewardScorer"),
    "clip": ScorerEntry(f"{_HERE}.clip:ClipScorer"),
    "aesthetic": ScorerEntry(f"{_HERE}.aesthetic:AestheticScorer"),
    "clip_iqa": ScorerEntry(f"{_HERE}.clip:QualityScorer"),
    "diversity": ScorerEntry(f"{_HERE}.clip:DiversityScorer"),
    "digits": ScorerEntry("fastpo.demo.scorer:DigitScorer", takes_argument=False),
}


def build_scorer(
    text: str,
    *,
    device: torch.device | str | None = None,
    batch_size: int = BATCH_SIZE,
    precision: str = "fp32",
) -> Scorer:
    """Builds a scorer from its name and, after a colon, its argument (`clip:/models/clip-l`).

    Args:
        text: Name, or name and argument.
        device: Where it runs; default CUDA if there is any.
        batch_size: Images of one forward pass.
        precision: `fp32`, `bf16` or `fp16`.

    Raises:
        ConfigError: The name is unknown; the text gives the nearest valid one.
        ModelError: Its model is not available.
    """
    name, colon, argument = text.partition(":")
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"evaluate.scorers: unknown scorer {name!r}{hint} (valid: {', '.join(SCORERS)})"
        )
    if colon and not argument:
        raise ConfigError(f"evaluate.scorers: {text!r} has a colon but nothing after it")
    entry = SCORERS[name]
    if argument and not entry.takes_argument:
        raise ConfigError(f"evaluate.scorers: {name} takes no argument, got {argument!r}")
    module, _, attribute = entry.target.partition(":")
    scorer = getattr(import_module(module), attribute)
    if not entry.takes_argument:
        return scorer()
    options = {"device": device, "batch_size": batch_size, "precision": precision}
    return scorer(*filter(None, [argument]), **options)


def build_scorers(
    names: Sequence[str],
    *,
    device: torch.device | str | None = None,
    batch_size: int = BATCH_SIZE,
    precision: str = "fp32",
) -> list[Scorer]:
    """Builds every scorer of `evaluate.scorers`, in order; errors as in `build_scorer`."""
    return [
        build_scorer(name, device=device, batch_size=batch_size, precision=precision)
        for name in names
    ]
