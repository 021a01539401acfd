"""`fastpo minority`: the table of all pairs, and one page to judge some of them by eye."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from fastpo._version import __version__
from fastpo.errors import DataError, one_line
from fastpo.report.grids import data_url
from fastpo.review.calibration import FEWEST, calibration_error, reliability
from fastpo.review.evidence import Evidence, load_evidence, write_table
from fastpo.review.known import (
    Curves,
    at_thresholds,
    curves,
    precision_figure,
    probability_figure,
    reliability_figure,
    roc_figure,
)
from fastpo.review.pictures import MOST_PAGE, Thumbnail, find_pairs, thumbnail
from fastpo.system.files import write_json, write_text
from fastpo.system.json_text import finite
from fastpo.system.ownership import Kind, check_claim, claim, is_ours
from fastpo.system.storage import storage_errors
from fastpo.system.words import counted
from fastpo.types import PreferencePair

PAGE, TABLE, SUMMARY, TEMPLATE = "gallery.html", "pairs.parquet", "summary.json", "gallery.html"
GALLERY = Kind("a gallery", r"gallery\.html|pairs\.parquet|summary\.json", lambda folder: False)
MOST_HISTORY = 64
"""Points of a pair's history on the page; of more, evenly spread ones."""


@storage_errors()
def write_gallery(run: Path, out: Path, *, pairs: int = 100, side: int = 320) -> Path:
    """Writes `pairs.parquet`, `summary.json` and `gallery.html`, which is complete in itself.

    Args:
        run: The folder of a finished run.
        out: The folder to write.
        pairs: How many of the most suspicious pairs the page shows, and of the most certain.
        side: Pixels to which larger images are reduced.

    Returns:
        The page.

    Raises:
        DataError: The run is not finished, or one of its files is damaged.
        ForeignPathError: `out` holds other things.
    """
    check_claim(out, GALLERY)
    evidence = load_evidence(run)
    seen = evidence.judged
    known = evidence.knows_flips
    curve = curves(evidence.probability[seen], evidence.flipped[seen]) if known else None
    summary = summarize(evidence, curve)
    chosen = choose(evidence, pairs)
    shown, note = _cards(evidence, chosen, side)
    html = _page(evidence, summary, shown, note, diagrams(evidence, curve))
    claim(out, GALLERY)
    write_table(evidence, out / TABLE)
    write_json(out / SUMMARY, summary)
    write_text(out / PAGE, html)
    return out / PAGE


def is_gallery(folder: Path) -> bool:
    """Whether a folder is one that `fastpo minority` made."""
    return is_ours(folder, GALLERY)


def summarize(evidence: Evidence, curve: Curves | None) -> dict[str, Any]:
    """The run's evidence in numbers; what needs labels known to be wrong, only where some are.

    Pairs that the run has not judged are counted, and no more.
    """
    found, seen = evidence.calibration, evidence.judged
    probability = evidence.probability[seen]
    summary: dict[str, Any] = {
        "run": str(evidence.run),
        "pairs": len(evidence.pair_ids),
        "judged": int(seen.sum()),
        "wrong_share": None if found is None else found.share,
        "above_half": int((probability >= 0.5).sum()),
        "calibration": None if found is None else asdict(found),
    }
    if curve is not None:
        wrong = evidence.flipped[seen]
        bins, raw = reliability(probability, wrong), reliability(evidence.minority[seen], wrong)
        summary["known"] = {
            "flipped_share": float(wrong.mean()),
            "auroc": curve.auroc,
            "average_precision": curve.average_precision,
            "thresholds": [asdict(row) for row in at_thresholds(probability, wrong)],
            "reliability": [asdict(one) for one in bins],
            "calibration_error": calibration_error(bins),
            "calibration_error_of_u": calibration_error(raw),
        }
    return summary


def choose(evidence: Evidence, pairs: int) -> list[tuple[int, str]]:
    """The pairs of the page: the most suspicious, then the most certain, each at most once."""
    judged = np.flatnonzero(evidence.judged)
    doubt = evidence.probability[judged]
    order = judged[np.lexsort((evidence.mean_vote[judged], -doubt))]
    first = order[: min(pairs, (len(order) + 1) // 2)]
    last = order[len(first) :][::-1][:pairs]
    return [(int(k), "suspicious") for k in first] + [(int(k), "certain") for k in last]


def _cards(
    evidence: Evidence, chosen: Sequence[tuple[int, str]], side: int
) -> tuple[list[dict[str, Any]], str]:
    """What the page shows of each chosen pair, and a line where images are missing."""
    note, found = "", {}
    try:
        found = find_pairs(evidence.config.data, [evidence.pair_ids[k] for k, _ in chosen])
    except DataError as error:
        note = f"No images: the run's data cannot be read here ({one_line(error)})."
    starts, doubts = evidence.histories()
    margins, trend = evidence.margins()[0], evidence.trend()
    left, cards = MOST_PAGE, []
    for k, kind in chosen:
        pair = found.get(evidence.pair_ids[k])
        sides = _sides(pair, bool(evidence.flipped[k]), side if left > 0 else 0)
        left -= sum(len(one.url or "") for one in sides)
        history = doubts[starts[k] : starts[k + 1]]
        places = np.linspace(0, max(len(history) - 1, 0), min(len(history), MOST_HISTORY)).round()
        cards.append(
            {
                "id": evidence.pair_ids[k],
                "kind": kind,
                "prompt": "" if pair is None else pair.prompt,
                "images": [asdict(one) for one in sides],
                "probability": round(float(evidence.probability[k]), 5),
                "minority": round(float(evidence.minority[k]), 5),
                "visits": int(evidence.visits[k]),
                "vote": round(float(evidence.mean_vote[k]), 5),
                "trend": _number(trend[k]),
                "margins": [_number(value) for value in margins[k]],
                "history": [round(float(v), 4) for v in history[places.astype(int)]],
                "flipped": bool(evidence.flipped[k]) if evidence.knows_flips else None,
            }
        )
    if left <= 0:
        note = (
            f"Images beyond {MOST_PAGE >> 20} MiB are left out: show fewer pairs, or a lower side."
        )
    return cards, note


def _sides(pair: PreferencePair | None, turned: bool, side: int) -> list[Thumbnail]:
    """The image that the run's label prefers, and the other."""
    if pair is None:
        return [Thumbnail(None, "not in the data set that is there now")] * 2
    if not side:
        return [Thumbnail(None, "left out: the page would be too large")] * 2
    readers = (pair.loser, pair.winner) if turned else (pair.winner, pair.loser)
    return [thumbnail(read, side) for read in readers]


def _number(value: float) -> float | None:
    return None if value != value else float(f"{value:.4g}")


def diagrams(evidence: Evidence, curve: Curves | None) -> list[tuple[str, bytes]]:
    """PNGs of all judged pairs, by title."""
    seen = evidence.judged
    probability, wrong = evidence.probability[seen], evidence.flipped[seen]
    known = wrong if curve is not None else None
    pictures = [("Probabilities", probability_figure(probability, known))]
    if curve is not None:
        parts = [
            ("calibrated", reliability(probability, wrong)),
            ("the ledger's u", reliability(evidence.minority[seen], wrong)),
        ]
        pictures.append(("Reliability", reliability_figure(parts)))
        pictures.append(("ROC", roc_figure(curve)))
        pictures.append(("Precision and recall", precision_figure(curve)))
    return pictures


def _page(
    evidence: Evidence,
    summary: dict[str, Any],
    cards: list[dict[str, Any]],
    note: str,
    pictures: list[tuple[str, bytes]],
) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    name = evidence.run.resolve().name
    digest = hashlib.blake2b("\n".join([name, *(c["id"] for c in cards)]).encode(), digest_size=8)
    template = files("fastpo.review").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=name,
        version=__version__,
        summary=summary,
        note=note,
        pictures=[(title, data_url(png)) for title, png in pictures],
        data=finite({"id": digest.hexdigest(), "run": name, "pairs": cards}),
        words=words(summary),
    )


def words(summary: dict[str, Any]) -> str:
    """Says in a sentence or two what was found."""
    judged = counted(summary["judged"], "pair", of=summary["pairs"])
    share = summary["wrong_share"]
    if share is not None:
        text = (
            f"{judged} judged. About {share:.1%} of the labels look wrong to this run; "
            f"{summary['above_half']:,} pairs are more likely wrong than right."
        )
    elif summary["judged"] < FEWEST:
        text = f"{judged} judged: too few to learn how many labels are wrong; u is shown as it is."
    else:
        text = (
            f"{judged} judged. How many labels are wrong cannot be learned: the votes are too weak "
            "to tell right labels from wrong ones. The metric u is shown as it is."
        )
    known = summary.get("known")
    if known is None:
        return text
    area, (low, high) = known["auroc"]
    return (
        f"{text} In truth {known['flipped_share']:.1%} were flipped on purpose: AUROC {area:.4f} "
        f"({low:.4f} to {high:.4f}), calibration error {known['calibration_error']:.3f} "
        f"(u alone {known['calibration_error_of_u']:.3f})."
    )
