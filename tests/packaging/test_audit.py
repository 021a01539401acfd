"""The audit of dependencies: no answer is no clean bill, and which licenses are refused."""

import runpy
from pathlib import Path

import pytest

audit = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "audit.py"))


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("MIT", False),
        ("BSD-3-Clause", False),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("LGPL-2.1-or-later", False),
        ("GPL-3.0-or-later", True),
        ("GNU General Public License v3 (GPLv3)", True),
        ("AGPL-3.0", True),
        ("GPL-2.0-only OR MIT", False),
        ("GPL-2.0-only AND MIT", True),
        ("CC-BY-NC-4.0", True),
        ("Server Side Public License", True),
        ("UNKNOWN", True),
    ],
)
def test_licenses_are_judged(text, refused):
    assert audit["refused_licenses"]({"a": text}) == ([f"a: {text}"] if refused else [])


def test_a_package_that_a_service_skips_is_not_free_of_holes():
    report = {
        "dependencies": [
            {"name": "known", "version": "1", "vulns": []},
            {"name": "skipped", "skip_reason": "not found"},
            {"name": "A.Bad", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]},
        ]
    }
    packages = {"known": "1", "skipped": "1", "a-bad": "2", "missing": "1"}
    holes, unasked = audit["read_audit"](report, packages)
    assert holes == ["a-bad 2: X-1, fixed in 3"]
    assert unasked == ["skipped", "missing"]


def test_the_page_does_not_claim_what_nobody_answered():
    page = audit["page"]
    packages, licenses = {"a": "1", "b": "2"}, {"a": "MIT", "b": "MIT"}
    text = page(packages, [], licenses, ("none", [], ["a", "b"]), "2026-01-01")
    assert "**Not known.**" in text and "None of them" not in text
    text = page(packages, [], licenses, ("osv", [], ["b"]), "2026-01-01")
    assert "1 of 2 packages were looked up at osv" in text and "**Without an answer**: b." in text


def test_everything_that_training_needs_is_looked_at():
    found, absent = audit["run_time_packages"]()
    assert {"torch", "diffusers", "xxhash", "numpy", "pyyaml"} <= found.keys()
    assert "pytest" not in found and "pytest" not in absent
