"""The columns of Parquet preference data, in every type that people store them in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpo.errors import DataError

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
WEIGHT = "pair_weight"
SOURCE = "source"
"""Of edits, the image that the caption says how to change, or a list of images."""
SCHEMA = "caption string, jpg_0 and jpg_1 binary, label_0 and label_1 number in {0, 0.5, 1}"
TIE, UNLABELED, BAD = -1, -2, -3
"""What stands in the place of the winner's number where there is none."""


def check_schema(path: Path, schema: pa.Schema) -> None:
    """Refuses columns that cannot be read, naming column and type.

    Raises:
        DataError: A column is missing or of another type.
    """
    missing = [name for name in ("caption", *IMAGES, *LABELS) if name not in schema.names]
    if missing:
        raise DataError(
            f"{path}: missing column {', '.join(missing)}; expected {SCHEMA}; "
            f"found {', '.join(schema.names)}"
        )
    expected = {
        "caption": (is_text, "text"),
        **{name: (_is_image, "the image's bytes (binary)") for name in IMAGES},
        **{name: (is_number, "a number in {0, 0.5, 1}") for name in LABELS},
        "has_label": (_is_truth, "true or false"),
        WEIGHT: (is_number, "a number from 0"),
    }
    for name, (fits, words) in expected.items():
        if name in schema.names and not fits(plain_type(schema.field(name).type)):
            kind = schema.field(name).type
            raise DataError(f"{path}: column {name} is {kind!s:.200}; expected {words}")


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a column's values: what a dictionary or a view holds."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column with its dictionary or view undone, so that rows can be taken of it."""
    kind = plain_type(column.type)
    return column if kind == column.type else column.cast(kind)


def winners(labels: pa.Table) -> tuple[np.ndarray, dict[int, str]]:
    """Tells which image won.

    Args:
        labels: The label columns and, where there is one, `has_label`.

    Returns:
        `(rows,)` int8: 0 or 1, `TIE`, `UNLABELED` or `BAD`; and of each bad row why it is.
    """
    values = np.stack([numbers(labels[name]) for name in LABELS])
    if "has_label" in labels.column_names:
        told = numbers(labels["has_label"])
        labeled = np.isnan(told) | (told != 0)
    else:
        labeled = ~np.isnan(values).all(axis=0)
    valid = np.isin(values, (0.0, 0.5, 1.0)).all(axis=0) & (values.sum(axis=0) == 1.0)
    winner = np.where(values[0] == 0.5, TIE, np.where(values[0] == 1.0, 0, 1))
    winner = np.where(labeled, np.where(valid, winner, BAD), UNLABELED).astype(np.int8)
    reasons = {}
    for row in np.flatnonzero(winner == BAD).tolist():
        a, b = (_shown(labels[name][row]) for name in LABELS)
        reasons[row] = (
            f"label_0={a}, label_1={b}: labels must be 0, 0.5 or 1 and sum to 1 (or has_label must "
            "be false)"
        )
    return winner, reasons


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of numbers as float64; NaN where there is none or a text is no number."""
    column = plain(column)
    try:
        return column.cast(pa.float64()).combine_chunks().fill_null(math.nan).to_numpy()
    except pa.ArrowInvalid:
        return np.array([number(value) for value in column.to_pylist()], dtype=np.float64)


def may_have_nulls(file: pq.ParquetFile, group: int, name: str) -> bool:
    """Tells from the statistics whether a plain column may have nulls in a row group."""
    about = file.metadata.row_group(group)
    for place in range(about.num_columns):
        column = about.column(place)
        if column.path_in_schema == name:
            known = column.statistics
            return known is None or not known.has_null_count or known.null_count > 0
    return True


def null_rows(column: pa.ChunkedArray) -> list[int]:
    """Returns the rows in which a column is null."""
    nulls = plain(column).is_null().combine_chunks()
    return np.flatnonzero(nulls.to_numpy(zero_copy_only=False)).tolist()


def number(value: Any) -> float:
    """Returns a label as a float: NaN where there is none, or it is no number."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _shown(value: pa.Scalar) -> str:
    plain_value = value.as_py()
    if plain_value is None:
        return "null"
    return f"{plain_value:g}" if isinstance(plain_value, float) else ascii(plain_value)[:40]


def is_text(kind: pa.DataType) -> bool:
    """Whether a plain type is of text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def holds_sources(schema: pa.Schema) -> bool:
    """Tells whether there is a column of source images, one or a list in each row.

    A column of that name that holds anything else is no business of ours.
    """
    if SOURCE not in schema.names:
        return False
    kind = schema.field(SOURCE).type
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return _is_image(kind.value_type if any(fits(kind) for fits in tests) else kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} >= {*kind.names} and "bytes" in kind.names
    kind = plain_type(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether a plain type is of numbers, truth values, or text that may be of numbers."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    return any(fits(kind) for fits in tests) or _is_truth(kind) or is_text(kind)


def _is_truth(kind: pa.DataType) -> bool:
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)
