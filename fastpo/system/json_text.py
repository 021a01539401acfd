"""JSON from files that may hold anything: bounded in size and depth, checked where we wrote it.

A sealed object carries under `checksum` the XXH3 of the rest, so that one wrong bit is noticed even
where it gives valid JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

MOST_DEPTH = 64
"""Lists and mappings within one another."""
SEAL = "checksum"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str | bytes, *, depth: int | None = MOST_DEPTH) -> Any:
    """Parses JSON.

    Args:
        text: The text, bytes in UTF-8; a byte order mark in front is passed over.
        depth: Most lists and mappings within one another; None leaves it to the parser's own bound,
            for listings of many megabytes.

    Raises:
        ValueError: It is no JSON, nested too deeply, or its text is not what UTF-8 can write.
    """
    decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if depth is not None:
        _check_depth(decoded, depth)
    try:
        value = json.loads(decoded)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _HALF.search(decoded):  # an escape may name half a character, which no file can hold
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: Path, *, most_bytes: int, depth: int | None = MOST_DEPTH) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        most_bytes: Larger files are not read.
        depth: As for `parse_json`.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or as `parse_json`.
    """
    return parse_json(read_bounded(path, most_bytes), depth=depth)


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Reads a file that is not larger than a bound.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most_bytes + 1) if size <= most_bytes else b""
    size = max(size, len(content))
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes, at most {most_bytes:,} are read")
    return content


def finite(value: Any) -> Any:
    """Returns lists and mappings with None for NaN and the infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def seal(value: Mapping[str, Any]) -> str:
    """Returns an object as JSON text with its checksum; the text ends with its last brace."""
    return json.dumps({**value, SEAL: _checksum(value)}, indent=1)


def unseal(value: Any) -> dict[str, Any]:
    """Returns a parsed object without its checksum, which must hold where there is one.

    Raises:
        ValueError: It is no object, or was changed after it was sealed.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    plain = dict(value)
    expected = plain.pop(SEAL, None)
    if expected is not None and expected != (found := _checksum(plain)):
        raise ValueError(f"its checksum is {found[:12]}, it says {str(expected)[:12]}")
    return plain


def _checksum(value: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _check_depth(text: str, most: int) -> None:
    if text.count("[") + text.count("{") <= most:
        return
    depth = 0
    for token in _TOKENS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > most:
            raise ValueError(f"it is nested more than {most} levels deep")
