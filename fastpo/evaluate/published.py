"""Published scores of SDXL and SD1.5 and of models aligned from them, with their sources."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

FILE = "published.json"


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """One number of a paper or a model card.

    Attributes:
        source: Where it is from.
        caveat: What to know before comparing with it.
        base: What the models were aligned from: `sdxl` or `sd15`.
        set: The prompt set's name here; empty if the source does not say.
        model: The model, as the source calls it.
        metric: The metric's name here.
        value: The number, on the scale of the metric here.
    """

    source: str
    caveat: str
    base: str
    set: str
    model: str
    metric: str
    value: float


@cache
def published_scores() -> tuple[PublishedScore, ...]:
    """Returns all numbers of the data file, in its order."""
    text = files("fastpo.evaluate").joinpath(FILE).read_text(encoding="utf-8")
    return tuple(
        PublishedScore(
            source["source"], source["caveat"], block["base"], block["set"], model, metric, value
        )
        for source in json.loads(text)["sources"]
        for block in source["blocks"]
        for model, values in block["models"].items()
        for metric, value in zip(block["metrics"], values, strict=True)
        if value is not None
    )


def beside(base: str, sets: Sequence[str], metrics: Sequence[str]) -> list[PublishedScore]:
    """Returns the numbers of a base that were published of the same sets and metrics.

    Args:
        base: The base's family.
        sets: Names of prompt sets; numbers whose source does not say its prompts are kept too.
        metrics: Names of metrics.
    """
    return [
        score
        for score in published_scores()
        if score.base == base and score.metric in metrics and score.set in ("", *sets)
    ]
