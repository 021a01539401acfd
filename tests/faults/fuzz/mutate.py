"""Small changes to valid input: other types and sizes of a value, keys more or less, wrong bytes.

Nothing here is meant for anybody else's parser: values stay small, and nesting goes little beyond
what the readers under test allow themselves.
"""

import copy
import random

STRANGE = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    -(2**70),
    10**300,
    0.5,
    -0.0,
    1e-300,
    1e308,
    -1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "x",
    "x" * 300,
    "a b\nc",
    "ÄÖ€",
    "\ud800",
    "a\0b",
    "../elsewhere",
    "/nowhere",
    "name/with/parts",
    "12",
    "1e5",
    "$a_{b$",
    [],
    [[]],
    [0],
    ["x", 3],
    {},
    {"x": 1},
    {"name": None},
)


def mutated(value, rng: random.Random):
    """A copy of a JSON value with one to three changes."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _change(changed, rng)
    return changed


def _change(value, rng):
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            del value[key]
        elif action < 0.17:
            value[rng.choice(("", "extra", key + "x", "__metadata__"))] = rng.choice(STRANGE)
        elif action < 0.24:
            value[rng.choice(list(value))] = copy.deepcopy(value[key])
        else:
            value[key] = _change(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        place, action = rng.randrange(len(value)), rng.random()
        if action < 0.15:
            del value[place]
        elif action < 0.3:
            value.insert(place, copy.deepcopy(rng.choice((value[place], rng.choice(STRANGE)))))
        else:
            value[place] = _change(value[place], rng)
        return value
    return strange(value, rng)


def strange(value, rng):
    """Another value in the place of one: of another type, or near it, or nested."""
    action = rng.random()
    if isinstance(value, bool | None) or action < 0.5:
        return copy.deepcopy(rng.choice(STRANGE))
    if isinstance(value, int) and action < 0.8:
        return value + rng.choice((-1, 1, 1000, -(10**6)))
    if isinstance(value, float) and action < 0.8:
        return value * rng.choice((-1, 0, 1e6, 1e-6))
    if isinstance(value, str) and action < 0.8:
        return _changed_text(value, rng)
    for _ in range(rng.choice((1, 3, 30, 70))):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return value


def _changed_text(text, rng):
    place = rng.randrange(len(text) + 1)
    return rng.choice((text[:place], text[place:], text + text, text[:place] + "/" + text[place:]))


def wrong_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a cut, a stretch taken out or twice."""
    if not content:
        return b"\0"
    place = rng.randrange(len(content))
    stop = min(len(content), place + rng.choice((1, 2, 9, 80)))
    action = rng.random()
    if action < 0.5:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if action < 0.7:
        return content[:place]
    if action < 0.85:
        return content[:place] + content[stop:]
    return content[:place] + content[place:stop] + content[place:]
