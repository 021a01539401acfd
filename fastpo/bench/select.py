"""From what a user asked for to a run, each mistake named."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from fastpo.bench.cases import DTYPES, LATENTS, grid
from fastpo.bench.run import NAMES, Options, Run, providers_of
from fastpo.errors import ConfigError

OPS = {"loss": "pair_loss", "noise": "pair_noise"}
_DEFAULT_PAIRS = (1, 4, 16)


def select(
    op: str,
    names: Sequence[str] | None,
    pairs: Sequence[int] | None,
    latents: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    *,
    quick: bool,
    budget_seconds: float,
) -> Run:
    """A run over the chosen cases; what is not chosen takes a modest default.

    Raises:
        ConfigError: a name that is not known, or a number out of range.
    """
    _require_known("op", [op], OPS)
    kind = OPS[op]
    _require_known("objective", names or (), NAMES[kind])
    _require_known("latents", latents or (), LATENTS)
    _require_known("dtype", dtypes or (), DTYPES)
    if pairs and min(pairs) < 1:
        raise ConfigError(f"--pairs must be at least 1, got {min(pairs)}")
    if not budget_seconds > 0:
        raise ConfigError(f"--budget-seconds must be positive, got {budget_seconds}")
    cases = grid(
        kind,
        names or NAMES[kind][: 1 if quick else 2],
        latents or (("sd15",) if quick else ("sdxl", "sd15")),
        dtypes or (("fp32",) if quick else tuple(DTYPES)),
        pairs or ((1,) if quick else _DEFAULT_PAIRS),
    )
    providers = [p for p in providers_of(kind) if not (quick and p.startswith("compile"))]
    seconds = 0.1 if quick else 0.3
    return Run(cases, Options(seconds, budget_seconds, providers))


def _require_known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    for word in given:
        if word not in known:
            near = difflib.get_close_matches(word, list(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--{option} must be one of {', '.join(known)}; got {word}{hint}")
