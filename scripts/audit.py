"""Known holes and licenses of everything that FastPO needs at run time, written to docs/audit.md.

python scripts/audit.py --tools FOLDER      # of pip-audit and pip-licenses; `make audit` makes it

Ends with 1 at a known hole or a license that cannot be accepted, with 2 where the advisories could
not be asked for every package: no answer is no clean bill.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT, TARGET = ROOT / "pyproject.toml", ROOT / "docs" / "audit.md"
DEVELOPMENT = "dev"  # the one extra that no run needs
SERVICES = ("pypi", "osv")
# Licenses whose terms reach a program that imports the package, or that forbid some use of it.
REFUSED = re.compile(
    r"\b(A?GPL|GNU (Affero )?General Public)|SSPL|Server Side Public"
    r"|Commons Clause|BUSL|Business Source|Non-?Commercial|\bNC\b|^UNKNOWN$",
    re.IGNORECASE,
)


def own_requirements() -> list[Requirement]:
    """Returns what pyproject.toml asks for at run time; installed metadata may be older."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [project["dependencies"], *(extras[name] for name in extras if name != DEVELOPMENT)]
    wanted = [Requirement(text) for texts in listed for text in texts]
    return [need for need in wanted if need.name != project["name"]]


def run_time_packages() -> tuple[dict[str, str], list[str]]:
    """Returns what the extras need: versions of what is installed, names of what is not."""
    found: dict[str, str] = {}
    absent: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(need, "") for need in own_requirements()]
    while waiting:
        need, extra = waiting.pop()
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(need.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            absent.add(name)
            continue
        found[name] = package.version
        for part in {"", *need.extras} - {p for n, p in seen if n == name}:
            seen.add((name, part))
            waiting += [(Requirement(text), part) for text in package.requires or ()]
    return dict(sorted(found.items())), sorted(absent)


def refused_licenses(licenses: Mapping[str, str]) -> list[str]:
    """Returns `package: license` for each not accepted; of alternatives one is enough."""
    return [
        f"{name}: {text}"
        for name, text in licenses.items()
        if all(REFUSED.search(part.strip(" ()")) for part in re.split(r"\bOR\b", text))
    ]


def read_audit(report: Mapping, packages: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Reads pip-audit's JSON.

    Args:
        report: What it printed.
        packages: The packages that must be in it.

    Returns:
        The known holes, and the packages for which the service had no answer: pip-audit skips
        them, and ends as if nothing were known of them.
    """
    entries = {canonicalize_name(entry["name"]): entry for entry in report["dependencies"]}
    holes, unasked = [], []
    for name in packages:
        entry = entries.get(name)
        if entry is None or "vulns" not in entry:
            unasked.append(name)
            continue
        for hole in entry["vulns"]:
            fixed = ", ".join(hole["fix_versions"]) or "no version yet"
            holes.append(f"{name} {entry['version']}: {hole['id']}, fixed in {fixed}")
    return holes, unasked


def ask_advisories(tools: Path, packages: Mapping[str, str]) -> tuple[str, list[str], list[str]]:
    """Asks one service after the other until one knows most packages.

    Returns:
        The service, the holes, and the packages that it did not know; all where none answers.
    """
    best: tuple[str, list[str], list[str]] = ("none", [], list(packages))
    for service in SERVICES:
        command = [tools / "pip-audit", "--path", sysconfig.get_path("purelib"), "-f", "json"]
        command += ["-s", service, "--progress-spinner", "off", "--timeout", "10"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
            holes, unasked = read_audit(json.loads(done.stdout), packages)
        except (ValueError, KeyError, subprocess.TimeoutExpired):
            continue
        if len(unasked) < len(best[2]):
            best = (service, holes, unasked)
        if len(best[2]) < len(packages) / 2:
            break
    return best


def read_licenses(tools: Path, packages: Mapping[str, str]) -> dict[str, str]:
    """Returns each package's license as pip-licenses finds it."""
    command = [tools / "pip-licenses", "--python", sys.executable, "--format", "json"]
    done = subprocess.run(
        [*command, "--from", "mixed", "--with-system"], capture_output=True, text=True, check=True
    )
    rows = {canonicalize_name(row["Name"]): row["License"] for row in json.loads(done.stdout)}
    return {name: " ".join(rows.get(name, "UNKNOWN").split()) for name in packages}


def page(
    packages: Mapping[str, str],
    absent: Sequence[str],
    licenses: Mapping[str, str],
    advisories: tuple[str, list[str], list[str]],
    when: str,
) -> str:
    """Returns the page."""
    service, holes, unasked = advisories
    lines = ["# Dependencies: known holes and licenses", ""]
    lines += [f"Written by `make audit` on {when}, never by hand.", "", "## Known holes", ""]
    if len(unasked) == len(packages):
        lines.append(
            f"**Not known.** No advisory service ({', '.join(SERVICES)}) answered for any of the "
            f"{len(packages)} packages where this last ran. Run `make audit` where one can be "
            "reached."
        )
    else:
        asked = len(packages) - len(unasked)
        lines.append(f"{asked} of {len(packages)} packages were looked up at {service}.")
        lines += ["", *(f"- {hole}" for hole in holes)] if holes else ["None of them has one."]
        if unasked:
            lines += ["", f"**Without an answer**: {', '.join(unasked)}."]
    refused = refused_licenses(licenses)
    lines += ["", "## Licenses", ""]
    lines.append(
        "Refused are licenses that reach programs which import the package (GPL, AGPL, SSPL), that "
        "forbid commercial use, and unknown ones. Packages of all run-time extras, with what these "
        "need."
    )
    lines += ["", "Refused: " + ("; ".join(refused) if refused else "none") + "."]
    if absent:
        lines += ["", f"Not installed where this ran, so not looked at: {', '.join(absent)}."]
    lines += ["", "| package | version | license |", "|---|---|---|"]
    lines += [f"| {name} | {packages[name]} | {licenses[name]} |" for name in packages]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", type=Path, required=True)
    tools = parser.parse_args().tools
    packages, absent = run_time_packages()
    licenses = read_licenses(tools, packages)
    advisories = ask_advisories(tools, packages)
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    TARGET.write_text(page(packages, absent, licenses, advisories, when), encoding="utf-8")
    _, holes, unasked = advisories
    refused = refused_licenses(licenses)
    for text in (*holes, *refused):
        print(f"refused: {text}")
    if unasked:
        print(f"no advisory service answered for {len(unasked)} of {len(packages)} packages")
    print(f"written: {TARGET}")
    return 1 if holes or refused else 2 if unasked else 0


if __name__ == "__main__":
    sys.exit(main())
