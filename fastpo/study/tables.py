"""A study's tables, as Markdown, from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from fastpo.review.calibration import calibration_error
from fastpo.study.config import Part, StudyConfig
from fastpo.study.methods import METHODS
from fastpo.study.summary import Row, chosen, column, cost, kept, mean_of, reliability_bins
from fastpo.system.words import counted

NONE = ""


def part_table(part: Part, rows: Sequence[Row]) -> str:
    """The methods of a part, by share of flipped labels and by case; the base first.

    Columns in which nothing is known are left out.
    """
    own = chosen(rows, part=part.name)
    if not own:
        return "No run of this part is made yet."
    lines = [_base_line(part, own)]
    for flip_rate in sorted(part.flips):
        for case in part.cases:
            for method in part.methods:
                found = chosen(own, method=method, case=case, flip_rate=str(flip_rate))
                if found:
                    lines.append(_line(part, found, own))
    names = [name for name in lines[1] if any(line.get(name) for line in lines)]
    head = "| " + " | ".join(names) + " |"
    body = ["| " + " | ".join(line.get(name, NONE) for name in names) + " |" for line in lines]
    return "\n".join([head, "|---" * len(names) + "|", *body])


def _base_line(part: Part, rows: Sequence[Row]) -> dict[str, str]:
    line = {"method": "base"}
    for name, style in (("reward", ".4f"), ("legible", ".1%")):
        line[name] = _text(column(rows, f"base_{name}"), style, plain=True)
    for name in part.columns:
        line[_words(name)] = _text(column(rows, f"base_{name}"), ".4f", plain=True)
    return line


def _line(part: Part, rows: Sequence[Row], own: Sequence[Row]) -> dict[str, str]:
    """One method's cells, by column."""
    times = cost(rows, own)
    gain = column(rows, "gain")
    return {
        "labels wrong": _text(column(rows, "wrong"), ".0%", plain=True),
        "case": rows[0]["case"],
        "method": rows[0]["method"],
        "seeds": "" if gain is None else str(gain.seeds),
        "reward": _text(column(rows, "reward"), ".4f"),
        "gain": _text(gain, ".4f"),
        "of the clean gain": _text(kept(rows, own), ".0%"),
        "better than the base": _text(column(rows, "win_base"), ".1%"),
        "better than DPO": _text(column(rows, "win_dpo"), ".1%"),
        "legible": _text(column(rows, "legible"), ".1%"),
        **{_words(name): _text(column(rows, name), ".4f") for name in part.columns},
        "AUROC": _text(column(rows, "auroc"), ".4f"),
        "compute of DPO": "" if times is None else f"{times:.2f}",
    }


def _text(mean, style: str, *, plain: bool = False) -> str:
    if mean is None:
        return NONE
    return f"{mean.value:{style}}" if plain else mean.text(style)


def _words(name: str) -> str:
    return name.replace("_", " ")


def methods_table(study: StudyConfig) -> str:
    """What each method of a study is."""
    names = dict.fromkeys(name for part in study.parts for name in part.methods)
    lines = [f"| `{name}` | {METHODS[name].about} |" for name in names]
    return "\n".join(["| method | what it is |", "|---|---|", *lines])


def calibration_table(study: StudyConfig, rows: Sequence[Row]) -> str:
    """What the methods of `StudyConfig.calibration` make of the share of wrong labels, and how far.

    `learned in` says in how many of the seeds' runs the share could be learned. The errors are
    those of each run's bins, as means over seeds.
    """
    head = ["labels wrong", "method", "learned in", "learned share", "error of u"]
    head += ["of the probability"]
    lines = []
    for part, method in judged(study, rows):
        for flip_rate in sorted(part.flips):
            own = chosen(rows, part=part.name, method=method, case="", flip_rate=str(flip_rate))
            own = [row for row in own if row.get("reliability")]
            if not own:
                continue
            learned = column(own, "learned_wrong")
            errors = [
                mean_of(calibration_error(reliability_bins([row], name)) for row in own)
                for name in ("reliability_u", "reliability")
            ]
            seeds = f"{0 if learned is None else learned.seeds} of {len(own)}"
            cells = [_text(column(own, "wrong"), ".1%", plain=True), method, seeds]
            cells += [_text(learned, ".1%"), *(_text(error, ".3f") for error in errors)]
            lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return "No run whose probabilities are checked is made yet."
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def judged(study: StudyConfig, rows: Sequence[Row]) -> list[tuple[Part, str]]:
    """Each method of `StudyConfig.calibration`, with the first part that has runs of it."""
    found = []
    for method in study.calibration:
        for part in study.parts:
            own = chosen(rows, part=part.name, method=method, case="")
            if any(row.get("reliability") for row in own):
                found.append((part, method))
                break
    return found


def state_line(rows: Sequence[Row], total: int) -> str:
    """How much of a study is done, on what, and by which versions."""
    if not rows:
        return f"None of {counted(total, 'run')} is made yet."
    seeds = sorted({int(row["seed"]) for row in rows})
    devices, torches, commits = (
        ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))
        for name in ("device", "torch", "commit")
    )
    pairs = sorted({int(row["pairs"]) for row in rows})
    many = f"{pairs[0]:,}" if len(pairs) == 1 else f"{pairs[0]:,} to {pairs[-1]:,}"
    done = f"{len(rows)} of {counted(total, 'run')}" if len(rows) < total else f"All {total} runs"
    one = "one seed, so no intervals" if len(seeds) == 1 else f"seeds {_listed(seeds)}"
    return (
        f"{done}; {one}; {many} pairs a run; {devices}, one thread a run, "
        f"torch {torches}, commit {commits}."
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
