"""From what a user asked for to a run, each mistake named."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastpo.bench.cases import DTYPES, LATENTS, grid
from fastpo.bench.run import NAMES, Options, Run, providers_of
from fastpo.errors import ConfigError

OPS = {"loss": "pair_loss", "noise": "pair_noise"}
_DEFAULT_PAIRS = (1, 4, 16)


@dataclass(frozen=True)
class Choice:
    """What a user asked to have timed; None stands for a modest default.

    Attributes:
        op: A key of `OPS`.
        names: Objectives, or predictions for the noise.
        pairs: Pairs in a batch.
        latents: Shapes of the latents, by name.
        dtypes: Names of dtypes.
        quick: One small case, a few seconds.
        budget_seconds: When to stop.
    """

    op: str = "loss"
    names: Sequence[str] | None = None
    pairs: Sequence[int] | None = None
    latents: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    quick: bool = False
    budget_seconds: float = 600.0


def select(choice: Choice) -> Run:
    """A run over the chosen cases.

    Raises:
        ConfigError: a name that is not known, or a number out of range.
    """
    _require_known("op", [choice.op], OPS)
    kind = OPS[choice.op]
    _require_known("objective", choice.names or (), NAMES[kind])
    _require_known("latents", choice.latents or (), LATENTS)
    _require_known("dtype", choice.dtypes or (), DTYPES)
    if choice.pairs and min(choice.pairs) < 1:
        raise ConfigError(f"--pairs must be at least 1, got {min(choice.pairs)}")
    if not choice.budget_seconds > 0:
        raise ConfigError(f"--budget-seconds must be positive, got {choice.budget_seconds}")
    cases = grid(
        kind,
        choice.names or NAMES[kind][: 1 if choice.quick else 2],
        choice.latents or (("sd15",) if choice.quick else ("sdxl", "sd15")),
        choice.dtypes or (("fp32",) if choice.quick else tuple(DTYPES)),
        choice.pairs or ((1,) if choice.quick else _DEFAULT_PAIRS),
    )
    providers = [p for p in providers_of(kind) if not (choice.quick and p.startswith("compile"))]
    seconds = 0.1 if choice.quick else 0.3
    return Run(cases, Options(seconds, choice.budget_seconds, providers))


def _require_known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    for word in given:
        if word not in known:
            near = difflib.get_close_matches(word, list(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--{option} must be one of {', '.join(known)}; got {word}{hint}")
