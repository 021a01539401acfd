"""The long form of the fault tests: every durable step, many random moments, 100,000 fuzz cases.

    python -m tests.faults.long_form WORK --minutes 60
    python scripts/update_reliability.py

WORK is a folder for the small world and for what came of each trial; started again, the same
command goes on where it was. At the end it writes docs/reliability.json.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from fastpo.selftest.run import Result, all_trials, make_bench, run_trials, spread
from fastpo.selftest.trials import GOOD, Bench
from fastpo.selftest.world import World
from fastpo.system.progress import progress_bar
from tests.faults.long_form import fuzz, mounts, ranks

ROOT = Path(__file__).parents[3]
# How many trials of each test, where there is time for no more.
TARGETS = {
    "kill": 420,  # a fifth of them of one of two processes
    "power cut": 125,
    "flipped bit": 160,
    "truncated file": 160,
    "zeroed block": 25,
    "signal": 30,
    "two writers": 10,
    "read error": 25,
    "write error": 40,
    "few descriptors": 12,
}
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pyarrow")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fuzz", type=int, default=100_000, help="cases in all")
    parser.add_argument("--fuzz-share", type=float, default=0.35, help="of the time")
    parser.add_argument("--ranks", type=int, default=96, help="kills of one of two processes")
    parser.add_argument(
        "--only", default="", help="trials whose name holds this; others' counts stay"
    )
    parser.add_argument("--tests", action="store_true", help="run pytest tests/faults as well")
    parser.add_argument("--again", choices=("flaws", "none"), default="flaws")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    seconds = 60 * options.minutes
    log = Log(options.work / "results.jsonl")
    run_faults(options, log, (1 - options.fuzz_share) * seconds)
    run_fuzz(options, log, options.fuzz_share * seconds)
    if options.tests:
        run_tests(options.work / "tests.xml")
    summary = summarize(log) | {"files": count_tests(options.work / "tests.xml")}
    target = ROOT / "docs" / "reliability.json"
    if options.only:
        summary = merged(json.loads(target.read_text()), summary, log)
    target.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{target}: {len(summary['flaws'])} flaws")


class Log:
    """What came of each trial and fuzz chunk, one JSON object a line; the last of a name counts."""

    def __init__(self, path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries = {entry["name"]: entry for entry in map(json.loads, lines)}
        self.commit = git("rev-parse", "--short=7", "HEAD")

    def add(self, entry):
        entry = {**entry, "commit": self.commit}
        self.entries[entry["name"]] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def of_trials(self):
        return [entry for entry in self.entries.values() if "outcome" in entry]

    def of_fuzz(self):
        return [entry for entry in self.entries.values() if "counts" in entry]


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def open_bench(work, commit):
    """The small world, made anew for each commit."""
    folder, about = work / f"world-{commit}", work / f"world-{commit}.json"
    if about.exists():
        return Bench(World(folder), **json.loads(about.read_text()))
    folder.mkdir()
    bench = make_bench(folder)
    about.write_text(json.dumps({k: v for k, v in asdict(bench).items() if k != "world"}))
    return bench


def run_faults(options, log, seconds):
    bench = open_bench(options.work, log.commit)
    trials = [*all_trials(bench, repeats=20), *ranks.rank_trials(options.ranks)]
    if (reason := mounts.allowed()) is None:
        trials += mounts.mount_trials(60)
    else:
        print(reason, file=sys.stderr)
    again = {e["name"] for e in log.of_trials() if e["outcome"] not in (*GOOD, "missed")}
    done = {entry["name"] for entry in log.of_trials()}
    if options.again == "flaws":
        done -= again
    trials = [trial for trial in in_proportion(spread(trials)) if options.only in trial.name]
    left = sorted(
        (trial for trial in trials if trial.name not in done),
        key=lambda trial: trial.name not in again,
    )
    with progress_bar("faults (seconds)", int(seconds), show=True) as advance:
        counts, began = Counter(), time.monotonic()

        def on_result(result: Result):
            log.add(asdict(result))
            counts["good" if result.outcome in (*GOOD, "missed") else "flaws"] += 1
            advance(0, note=f"{dict(counts)} after {time.monotonic() - began:.0f} s")

        run_trials(bench, left, seconds=seconds, processes=options.processes, on_result=on_result)


def in_proportion(trials):
    """Orders trials so that any number of the first ones is shared out as `TARGETS` says."""
    counts, places = Counter(), []
    for trial in trials:
        places.append(counts[trial.test] / TARGETS[trial.test])
        counts[trial.test] += 1
    order = sorted(range(len(trials)), key=places.__getitem__)
    return [trials[number] for number in order]


def run_fuzz(options, log, seconds):
    end, done = time.monotonic() + seconds, {entry["name"] for entry in log.of_fuzz()}
    chunks = [chunk for chunk in fuzz.chunks(options.fuzz) if _name(chunk) not in done]

    def run(chunk):
        return (chunk, *fuzz.run_chunk(*chunk)) if time.monotonic() < end else None

    total = sum(cases for _, _, cases in chunks)
    with (
        ThreadPoolExecutor(options.processes) as pool,
        progress_bar("fuzz", total, unit="cases", show=True) as advance,
    ):
        for found in pool.map(run, chunks):
            if found is None:
                continue
            chunk, counts, flaws = found
            log.add({"name": _name(chunk), "kind": chunk[0], "counts": counts, "flaws": flaws})
            advance(chunk[2])


def _name(chunk):
    return f"fuzz {chunk[0]} {chunk[1]} to {chunk[1] + chunk[2]}"


def run_tests(report):
    words = ["-m", "pytest", "-q", "tests/faults", f"--junitxml={report}", "-p", "no:cacheprovider"]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=False)


def count_tests(report):
    """Outcomes and seconds of each file of the CI form, from pytest's report."""
    if not report.exists():
        return {}
    files: dict[str, Counter] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        counts = files.setdefault(case.get("classname").rpartition(".")[2], Counter())
        counts[kinds.pop() if kinds else "passed"] += 1
        counts["seconds"] += round(float(case.get("time")), 1)
    return {name: dict(counts) for name, counts in sorted(files.items())}


def summarize(log):
    """Counts by test, by row and by kind of fuzzed input, with all flaws."""
    trials = [entry for entry in log.of_trials() if entry["outcome"] != "missed"]
    fuzzed: dict[str, Counter] = {}
    for entry in log.of_fuzz():
        fuzzed.setdefault(entry["kind"], Counter()).update(entry["counts"])
    bad = [entry for entry in trials if entry["outcome"] not in GOOD]
    commits = Counter(entry["commit"] for entry in log.entries.values())
    return {
        "commits": dict(commits),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in PACKAGES},
        "tests": _counts(trials, "test"),
        "rows": _counts(trials, "row"),
        "fuzz": {kind: dict(counts) for kind, counts in sorted(fuzzed.items())},
        "flaws": [
            *(f"{entry['outcome']}: {entry['name']}: {entry['detail'][-500:]}" for entry in bad),
            *(flaw for entry in log.of_fuzz() for flaw in entry["flaws"]),
        ],
    }


def merged(before, summary, log):
    """Lays the counts of some rows over earlier ones of all; each row's are of one log."""
    tests, rows = before["tests"], before["rows"]
    for row, test in {entry["row"]: entry["test"] for entry in log.of_trials()}.items():
        if row not in summary["rows"]:  # all of its trials were missed
            continue
        counts = Counter(tests.get(test, {}))
        counts.subtract(rows.get(row, {}))
        counts.update(summary["rows"][row])
        tests[test] = {outcome: count for outcome, count in counts.items() if count}
        rows[row] = summary["rows"][row]
    commits = Counter(before["commits"])
    commits.update(summary["commits"])
    fuzz = before["fuzz"] | summary["fuzz"]
    return before | {
        "commits": dict(commits),
        "tests": tests,
        "rows": dict(sorted(rows.items())),
        "fuzz": fuzz,
        "files": summary["files"] or before["files"],
        "flaws": [*before["flaws"], *summary["flaws"]],
    }


def _counts(trials, key):
    found: dict[str, Counter] = {}
    for entry in trials:
        found.setdefault(entry[key], Counter())[entry["outcome"]] += 1
    return {name: dict(counts) for name, counts in sorted(found.items())}
