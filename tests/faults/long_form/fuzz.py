"""The fuzz cases of `tests/faults/fuzz` in great number, in processes that may crash."""

from collections import Counter

from fastpo.selftest.child import Call
from tests.faults.fuzz.cases import KINDS, case

CHUNK, LIMIT = 250, 900.0
# How many of a thousand cases; one of these kinds takes as long as a hundred others.
SHARES = {"report": 1, "model json": 10, "run folder": 15, "manifest": 25, "cache bytes": 25}


def chunks(total):
    """Returns `(kind, first seed, cases)` for `total` cases, shared out over the kinds."""
    others = (1000 - sum(SHARES.values())) / (len(KINDS) - len(SHARES))
    counts = {kind: round(total * SHARES.get(kind, others) / 1000) for kind in KINDS}
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
