"""What every section of the configuration is made from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    """YAML's `true` would pass for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number, not true or false")
    return value


def _of_percent(value: Any) -> Any:
    """`1%` and `1 %` are 0.01."""
    if isinstance(value, str) and value.rstrip().endswith("%"):
        try:
            return float(value.rstrip()[:-1]) / 100
        except ValueError:
            return value
    return value


def _expanded(path: Path) -> Path:
    """`~` is the user's folder, as in a shell; one of an unknown user stays."""
    return Path(os.path.expanduser(path))


UserPath = Annotated[Path, AfterValidator(_expanded)]


def _not_always(value: float) -> float:
    """1 would be all of them: nothing is left of what is to be learned."""
    if value == 1.0:
        raise PydanticCustomError("rate", "input should be less than 1, which is all of them")
    return value


Real = Annotated[float, BeforeValidator(_no_truth_value)]
Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Precision = Literal["fp32", "bf16", "fp16"]
Name = Annotated[str, Field(min_length=1)]
Decay = Annotated[Real, Field(ge=0.0, lt=1.0)]
Rate = Annotated[Real, Field(ge=0.0, le=1.0)]
Chance = Annotated[Rate, AfterValidator(_not_always)]
Share = Annotated[Real, Field(ge=0.0, le=1.0), BeforeValidator(_of_percent)]
SomeShare = Annotated[Share, AfterValidator(_not_always)]
Fraction = Annotated[Real, Field(gt=0.0, lt=1.0)]
Positive = Annotated[Real, Field(gt=0.0)]
NotNegative = Annotated[Real, Field(ge=0.0)]
PositiveInt = Annotated[Whole, Field(gt=0)]
Count = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]

Result = Literal["cache", "reference", "run", "images", "nothing"]


@dataclass(frozen=True)
class Decides:
    """The results that depend on a key, as metadata of the key's type; see `decides`."""

    results: frozenset[str]


def decides(*results: Result) -> Decides:
    """States which results of earlier commands another value of a key makes useless.

    Every key carries it: `precision: Annotated[Precision, decides("reference", "run")] = "bf16"`.

    * `cache`: the prepared latents and texts, and with them everything that is computed from them.
    * `reference`: the reference's errors, if the prepared latents stay the same.
    * `run`: the training; a checkpoint is resumed with the same value only.
    * `images`: what `fastpo evaluate` samples, if the weights stay the same.
    * `nothing`: none of these; the key says where results are kept, how fast they are computed, or
      decides what is computed anew each time.

    Raises:
        ValueError: A word is none of these, or `nothing` is given beside another one.
    """
    unknown = set(results) - set(get_args(Result))
    if unknown or not results or ("nothing" in results and len(results) > 1):
        raise ValueError(f"decides takes {get_args(Result)}, `nothing` alone; got {results}")
    return Decides(frozenset(results) - {"nothing"})


class Section(BaseModel):
    """Base of all sections: immutable, every key must be known, every number finite.

    Every key that holds no section says what it decides; a class whose key does not raises
    `TypeError` where it is defined.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Checks that every key says what it decides."""
        super().__pydantic_init_subclass__(**options)
        for name, field in cls.model_fields.items():
            if not sections_of(field) and _statement(field) is None:
                raise TypeError(
                    f"{cls.__name__}.{name} does not say what it decides; write "
                    f"{name}: Annotated[..., decides(...)] (see fastpo.config.fields.decides)"
                )


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """The sections that a key may hold; empty for a plain value."""
    inner = [field.annotation, *_nested(field.annotation)]
    return [part for part in inner if isinstance(part, type) and issubclass(part, Section)]


def with_words(given: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """Returns a section's values with plain words where more is meant.

    `objective: dpo` stands for `objective: {name: dpo}`, wherever a key tells sections apart, and
    `scorers: clip` for a list of one; also in the sections below.
    """
    taken = dict(given)
    for name, value in given.items():
        field = section.model_fields.get(str(name))
        if field is None or isinstance(value, bool):
            continue
        tag, inner = discriminator_of(field), sections_of(field)
        if isinstance(value, Mapping) and len(inner) == 1:
            taken[name] = with_words(value, inner[0])
        elif isinstance(value, str) and tag is not None:
            taken[name] = {tag: value}
        elif isinstance(value, str | int | float) and _is_list(field):
            taken[name] = [value]
    return taken


def _is_list(field: FieldInfo) -> bool:
    """Whether a key holds any number of values."""
    inner = [field.annotation, *_nested(field.annotation)]
    return any(get_origin(part) is tuple and get_args(part)[-1] is Ellipsis for part in inner)


def discriminator_of(field: FieldInfo) -> str | None:
    """The key that tells the sections of a union apart, or None."""
    parts = [field, *field.metadata, *_nested(field.annotation)]
    tags = [part.discriminator for part in parts if isinstance(part, FieldInfo)]
    return next((tag for tag in tags if isinstance(tag, str)), None)


def keys_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, frozenset[str]]]:
    """Every key below a section, `train.optim.lr`, and the results that depend on it.

    A key of several sections of a union comes several times.
    """
    for name, field in section.model_fields.items():
        for inner in sections_of(field):
            yield from keys_of(inner, f"{prefix}{name}.")
        statement = _statement(field)
        if statement is not None:
            yield prefix + name, statement.results


def _statement(field: FieldInfo) -> Decides | None:
    return next((part for part in field.metadata if isinstance(part, Decides)), None)


def _nested(annotation: Any) -> list[Any]:
    """Everything inside a (nested) union or `Annotated`."""
    inner = list(get_args(annotation))
    return inner + [deep for part in inner for deep in _nested(part)]
