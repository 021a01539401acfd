"""The section of the data: one data set, or several in one run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fastpo.config.fields import (
    Chance,
    Count,
    Name,
    Positive,
    PositiveInt,
    Section,
    Share,
    SomeShare,
    decides,
)
from fastpo.system.files import user_path

Verify = Literal["always", "first", "never"]
SourceKind = Literal["pickapic", "hpdv2", "pickstyle", "picksafety", "folder"]
SourceName = Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=100)]
OWN_KEYS = ("source", "path", "split", "limit", "allow_outside", "max_bad")
"""Keys that each data set has, and that `data` has itself where there is one alone."""


class SourceConfig(Section):
    """One of several data sets, `data.sources`."""

    name: Annotated[SourceName, decides("cache", "run")]
    """What its pairs are named after, `name/pair`; of letters, digits, `.`, `_` and `-`. Default:
    the last part of its path."""
    source: Annotated[SourceKind, decides("cache", "run")]
    """As `data.source`."""
    path: Annotated[Name, decides("cache", "run")]
    """As `data.path`."""
    split: Annotated[Name, decides("cache", "run")] = "train"
    """As `data.split`."""
    limit: Annotated[PositiveInt | None, decides("cache", "run")] = None
    """As `data.limit`."""
    allow_outside: Annotated[bool, decides("nothing")] = False
    """As `data.allow_outside`."""
    max_bad: Annotated[Share | None, decides("nothing")] = None
    """As `data.max_bad`, of this data set's rows."""
    repeats: Annotated[PositiveInt, decides("run")] = 1
    """How often each of its pairs is visited in an epoch, with fresh noise each time."""
    weight: Annotated[Positive | None, decides("run")] = None
    """Instead of repeats, for all data sets or none: its share of the visits is weight / sum of
    the weights. An epoch ends when every pair was visited; of the other data sets some came more
    often."""


class DataConfig(Section):
    """The preference data and its labels; a list stands for `sources` alone."""

    source: Annotated[SourceKind | None, decides("cache", "run")] = None
    """The format of the data; `folder` is your own: a listing and images, or tar files. Required,
    as path is, unless there are `sources`."""
    path: Annotated[Name | None, decides("cache", "run")] = None
    """Local folder or hub id."""
    split: Annotated[Name, decides("cache", "run")] = "train"
    """The split of a data set that has several."""
    limit: Annotated[PositiveInt | None, decides("cache", "run")] = None
    """Only so many pairs are read, from the start."""
    flip_rate: Annotated[Chance, decides("reference", "run")] = 0.0
    """Share of the labels that are exchanged on purpose, to study noisy labels."""
    flip_seed: Annotated[Count, decides("reference", "run")] = 0
    """Decides which labels these are."""
    held_out: Annotated[SomeShare, decides("run")] = 0.0
    """Share of the pairs that training leaves out, such as 0.01 or 1%, and on which it measures
    (`train.held_out_every`). A hash chooses them: the same in every run, also when data grow."""
    held_out_by: Annotated[Literal["pair", "prompt"], decides("run")] = "pair"
    """What is hashed: the pair's name, or its prompt, so that all pairs of a prompt go together."""
    allow_outside: Annotated[bool, decides("nothing")] = False
    """Whether a listing may name images outside of data.path, by its text or by links."""
    max_bad: Annotated[Share | None, decides("nothing")] = None
    """Share of the rows that may be bad (no caption or label, no or a broken image) before
    `fastpo prepare` stops, such as 0.01 or 1%. Default: 1%, of few rows up to 16 or half."""
    verify: Annotated[Verify, decides("nothing")] = "first"
    """When prepared files are checked: all at the start, a row when it is first read, or sizes
    alone."""
    sources: tuple[SourceConfig, ...] = ()
    """Several data sets in one preparation and one run, instead of source and path."""

    def each(self) -> tuple[SourceConfig, ...]:
        """Returns the data sets; a single one has the name `data`, which is used nowhere."""
        if self.sources:
            return self.sources
        return (SourceConfig(name="data", **self._own()),)

    def with_all_bad(self) -> DataConfig:
        """Returns the same without a limit of bad rows."""
        sources = tuple(one.model_copy(update={"max_bad": 1.0}) for one in self.sources)
        return self.model_copy(update={"sources": sources, "max_bad": 1.0})

    @property
    def title(self) -> str:
        """The data as messages name them: the path, or the paths."""
        return ", ".join(one.path for one in self.each())

    def _own(self) -> dict[str, Any]:
        """What a single data set has, by key."""
        return {key: value for key, value in self if key in OWN_KEYS}

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        """Names the data sets that have no name."""
        raw = {"sources": raw} if isinstance(raw, list) else raw
        if not isinstance(raw, Mapping) or not isinstance(raw.get("sources"), list | tuple):
            return raw
        taken = {one.get("name") for one in raw["sources"] if isinstance(one, Mapping)}
        named = []
        for one in raw["sources"]:
            if isinstance(one, Mapping) and one.get("name") is None:
                one = {**one, "name": _free_name(one.get("path"), taken)}
                taken.add(one["name"])
            named.append(one)
        return {**raw, "sources": named}

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not self.sources:
            missing = [key for key in ("source", "path") if self._own()[key] is None]
            if missing:
                raise ValueError("; ".join(f"missing key data.{key}" for key in missing))
            return self
        fields = type(self).model_fields
        given = [key for key, value in self._own().items() if value != fields[key].default]
        if given:
            raise ValueError(
                f"data.{given[0]}: with data.sources it belongs to each of them, "
                f"data.sources.0.{given[0]} and so on"
            )
        names = [one.name for one in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"data.sources: two are named {twice}; give each a name of its own")
        weighted = [one.weight is not None for one in self.sources]
        if any(weighted) and not all(weighted):
            name = names[weighted.index(False)]
            raise ValueError(f"data.sources: {name} has no weight; give one to all or none")
        both = [one.name for one in self.sources if one.weight is not None and one.repeats > 1]
        if both:
            raise ValueError(f"data.sources: {both[0]} has repeats and a weight; give one of them")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what is not used: `sources`, or the keys of a single data set."""
        left_out = OWN_KEYS if self.sources else ("sources",)
        return {key: value for key, value in handler(self).items() if key not in left_out}


def _free_name(path: Any, taken: set[Any]) -> str:
    """The last part of a path as a name that is not taken."""
    plain = re.sub(r"[^\w.-]+", "-", user_path(str(path)).name)[:90] or "data"
    if plain not in taken:
        return plain
    return next(f"{plain}-{n}" for n in range(2, 1 << 20) if f"{plain}-{n}" not in taken)
