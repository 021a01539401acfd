"""Writes docs/reliability.md from docs/reliability.json, made by the long form of the fault tests.

python scripts/update_reliability.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
OUTCOMES = {
    "equal": "went on, equal",
    "older": "from an older checkpoint, said so",
    "said": "log damaged, said so",
    "refused": "refused, named",
}
FLAWS = ("unclear", "different", "lost", "failed", "hung")
# What was counted before the work on these faults, with a harness that was less thorough.
BEFORE = {
    "kill": "178 kills: all equal",
    "power cut": "28: 11 equal, 17 lost",
    "flipped bit": "90: 36 harmless, 22 refused, 30 silently other results, 2 other exceptions",
    "truncated file": "90: 6 harmless, 78 refused, 6 silently other results",
    "zeroed block": "not tried",
    "signal": "32: nothing saved since the last checkpoint",
    "two writers": "22: 13 with doubled metrics, 4 crashed",
    "read error": "the pair was left out for good, without a word",
    "write error": "22: 18 other exceptions",
    "few descriptors": "not tried",
}
FUZZ_BEFORE = "6,350: 907 other exceptions, 4 crashes in a native reader"
HEAD = """# What faults do

Written by `scripts/update_reliability.py` from `reliability.json`, which the long form of the fault
tests counts (`python -m tests.faults.long_form WORK`); nothing here is typed. `fastpo selftest`
runs a spread of the same trials on your machine and your disk.

Each trial brings a fault about in a command on a tiny SDXL with 24 pairs: `prepare`, `prepare
--reference`, `train` (LoRA with moving average, ledger and cached reference; full fine-tuning with
averages that vote and running statistics), `evaluate`. The same command is then given again, and
everything it makes is compared with what the command makes without a fault: weights, moving
averages, the optimizer's moments, the ledger, metrics, exported files, images, caches.

- *Kill*: before a durable step (flush, rename, removal), and SIGKILL at random moments. With more
  time the long form takes each step of each command; the steps tried so far are spread evenly. And
  of one of two processes that train together, plainly and under ZeRO 1 to 3: the other one must
  end with one line that names it, and both, started again, must make what two make undisturbed.
- *Power cut*: the same steps on a disk that forgets what POSIX lets it forget: the content of files
  that were not flushed, names in folders that were not flushed, both, or each by chance; and an
  ext4 on a loop device, copied in the middle of a run.
- *Flipped bit, truncated file, zeroed block*: in each kind of file, by chance.
- *Write error*: disk full, read-only, input/output error, no descriptor left, at durable steps;
  a real file system that becomes full. *Read error*: one read or opening fails, once.
- *Signal*: SIGTERM, SIGUSR1, SIGHUP, SIGINT at random moments; no finished step may be lost.

*Refused, named* is one line that says which file is damaged or what the disk answered; where a
fault is over, the command then goes on. A flaw is anything else: other results, a finished save
that is lost, an exception that is not FastPO's, no end in time, or a refusal without the file.
A trial that showed a flaw was repeated when it was mended: the last result counts.
"""


def main() -> None:
    """Writes the page."""
    found = json.loads((DOCS / "reliability.json").read_text())
    (DOCS / "reliability.md").write_text("\n".join([HEAD, *page(found)]) + "\n")


def page(found: dict) -> list[str]:
    """Returns the page's lines behind its head."""
    commits = ", ".join(f"`{name}` ({count:,})" for name, count in found["commits"].items())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    flaws = [f"- {flaw.splitlines()[0][:300]}" for flaw in found["flaws"]]
    return [
        f"Python {found['python']} on {found['system']}; {versions}.",
        f"Entries by commit: {commits}.",
        "",
        *_table(found["tests"], BEFORE, "fault"),
        "",
        "## Changed input",
        "",
        *_fuzz_table(found["fuzz"]),
        "",
        *(_short_form(found["files"]) if found["files"] else []),
        "## Flaws",
        "",
        *(flaws or ["None."]),
        "",
        "## In detail",
        "",
        *_table(found["rows"], None, "fault"),
    ]


def _table(counts: dict[str, dict[str, int]], before: dict[str, str] | None, head: str) -> list:
    columns = [head, "tried", *OUTCOMES.values(), "flaws"] + (["before"] if before else [])
    lines = [_line(columns), _line(["---"] * len(columns))]
    for name, found in counts.items():
        bad = sum(found.get(outcome, 0) for outcome in FLAWS)
        numbers = [sum(found.values()), *(found.get(outcome, 0) for outcome in OUTCOMES), bad]
        cells = [name, *(f"{number:,}" for number in numbers)]
        lines.append(_line(cells + ([before.get(name, "not tried")] if before else [])))
    return lines


def _fuzz_table(fuzz: dict[str, dict[str, int]]) -> list[str]:
    columns = ["input", "cases", "read", "refused in one line", "other exceptions", "crashes"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    total = sum((Counter(counts) for counts in fuzz.values()), Counter())
    for name, counts in [*fuzz.items(), ("all", dict(total))]:
        kinds = ("ok", "refused", "failed", "crashed")
        numbers = [sum(counts.values()), *(counts.get(kind, 0) for kind in kinds)]
        lines.append(_line([name, *(f"{number:,}" for number in numbers)]))
    return [*lines, "", f"Before: {FUZZ_BEFORE}."]


def _short_form(files: dict[str, dict[str, float]]) -> list[str]:
    kinds = ("passed", "failure", "error", "skipped")
    lines = [
        "## The short form",
        "",
        "`pytest tests/faults`, which also holds what no table counts: a rank that stops or dies,",
        "commands that would replace foreign folders, checkpoints of strange names.",
        "",
        _line(["file", *kinds, "seconds"]),
        _line(["---"] * 6),
    ]
    for name, counts in files.items():
        numbers = (f"{counts.get(kind, 0):,}" for kind in kinds)
        lines.append(_line([name, *numbers, f"{counts['seconds']:.0f}"]))
    return [*lines, ""]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
