"""The fuzz cases of `tests/faults/fuzz` in great number, in processes that may crash."""

from collections import Counter

from fastpo.selftest.child import Call
from tests.faults.fuzz.cases import KINDS, case

CHUNK, LIMIT = 2000, 900.0
# How many of a thousand cases. A look at a listing takes two milliseconds, a page a second.
SHARES = {
    "pairs.jsonl": 190,
    "hpdv2": 190,
    "reference": 150,
    "manifest": 150,
    "config values": 90,
    "part": 60,
    "cache bytes": 40,
    "override": 40,
    "config text": 40,
    "image": 30,
    "parquet": 10,
    "model json": 6,
    "run folder": 3.2,
    "report": 0.8,
}


def chunks(total):
    """Returns `(kind, first seed, cases)` for `total` cases, shared out over the kinds."""
    counts = {kind: round(total * SHARES[kind] / 1000) for kind in KINDS}
    cut = [
        (first / counts[kind], kind, first, min(CHUNK, counts[kind] - first))
        for kind in KINDS
        for first in range(0, counts[kind], CHUNK)
    ]
    return [chunk for _, *chunk in sorted(cut)]


def run_chunk(kind, first, cases):
    """Runs cases in a process of its own.

    Returns:
        How many came to which outcome (`ok`, `refused`, `failed`, `crashed`), and a line for each
        of the last two.
    """
    counts, flaws, stop = Counter(), [], first + cases
    while first < stop:
        ending = Call(_run, kind, first, stop).result(limit=LIMIT)
        counts.update(key for key, _ in ending.notes if key in ("ok", "refused", "failed"))
        flaws += [f"{kind} {seed} failed" for key, seed in ending.notes if key == "failed"]
        if ending.how == "returned":
            break
        first = ending.last("case", first)
        counts["crashed"] += 1
        flaws.append(f"{kind} {first} crashed: {ending.how}, {ending.status}: {ending.text[-300:]}")
        first += 1
    return counts, flaws


def _run(tell, kind, first, stop):
    for seed in range(first, stop):
        tell("case", seed)
        try:
            tell(case(kind, seed), seed)
        except Exception:
            tell("failed", seed)
