"""Words of messages that depend on numbers."""

from __future__ import annotations


def counted(number: int, noun: str, *, of: int | None = None) -> str:
    """Returns a number with its noun: `1 pair`, `2 pairs`, `1,024 processes`, `1 of 3 pairs`.

    Args:
        number: How many.
        noun: One of them; its plural is made by `s`, `es` behind a hiss, or `ies` for `y`.
        of: Of how many, which the noun then follows.
    """
    told = f"{number:,}" if of is None else f"{number:,} of {of:,}"
    return f"{told} {noun if (number if of is None else of) == 1 else _plural(noun)}"


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
