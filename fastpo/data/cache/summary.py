"""What the counts of a cache say, in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fastpo.models.registry import load_family
from fastpo.system.words import counted

CUT_PROMPTS = "cut prompts"
"""In a manifest's report: how many prompts are longer than what was encoded of them."""
_PLURAL = {
    "tie": "ties",
    "bad row or image": "bad rows or images",
    "duplicate": "duplicates",
    "comparison labeled both ways": "comparisons labeled both ways",
}


def told_counts(
    report: Mapping[str, int], *, pairs: int, quarantined: int, family: str
) -> str | None:
    """Says how many pairs are left of a data set, what was left out, and what looks like a mistake.

    Args:
        report: See `Manifest.report`, or of one of several data sets.
        pairs: Usable pairs.
        quarantined: How many pairs and bad rows were left out as unusable.
        family: Name of the model's family, which says with which key prompts are cut later.

    Returns:
        Such as `65 of 75 pairs; left out: 4 ties, 2 bad rows or images`; None where there is
        nothing to say.
    """
    counts = Counter(report)
    left = {
        "tie": counts["ties"],
        "unlabeled": counts["unlabeled"],
        "bad row or image": quarantined - counts["aspect"] - counts["same"],
        "of another aspect ratio than its other image": counts["aspect"],
        "whose winner is its loser": counts["same"],
    }
    kept = {
        "duplicate": counts["duplicates"],
        "that an earlier data set has too": counts["shared"],
        "comparison labeled both ways": counts["contradictions"],
    }
    sentences = [counted(pairs, "pair", of=pairs + sum(left.values()))]
    sentences += [f"left out: {_listed(left)}"] if any(left.values()) else []
    sentences += [f"kept: {_listed(kept)}"] if any(kept.values()) else []
    if cut := counts[CUT_PROMPTS]:
        many = f"{cut} prompt is" if cut == 1 else f"{cut} prompts are"
        key = load_family(family).text_room
        sentences.append(f"{many} longer than the text encoders read, and cut (see {key})")
    return "; ".join(sentences) if len(sentences) > 1 else None


def _listed(counts: Mapping[str, int]) -> str:
    """Lists what there is of something: `3 ties, 1 duplicate`."""
    return ", ".join(
        f"{count} {name if count == 1 else _PLURAL.get(name, name)}"
        for name, count in counts.items()
        if count
    )
