"""What every section of the configuration is made from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    """YAML's `true` would pass for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number, not true or false")
    return value


Real = Annotated[float, BeforeValidator(_no_truth_value)]
Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Precision = Literal["fp32", "bf16", "fp16"]
Name = Annotated[str, Field(min_length=1)]
Decay = Annotated[Real, Field(ge=0.0, lt=1.0)]
Rate = Annotated[Real, Field(ge=0.0, le=1.0)]
Positive = Annotated[Real, Field(gt=0.0)]
NotNegative = Annotated[Real, Field(ge=0.0)]
PositiveInt = Annotated[Whole, Field(gt=0)]
Count = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Base of all sections: immutable, every key must be known, every number finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )
