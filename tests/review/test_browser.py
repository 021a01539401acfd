"""Where Chromium is demanded, a test without it fails instead of being skipped."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.review import browser

CI = Path(__file__).parents[2] / ".ci" / "run"


def functions():
    """What `.ci/run` defines to find and fetch Chromium."""
    text = CI.read_text()
    return text[text.index("has_chromium() {") : text.index("get_chromium >")]


def run(tmp_path, programs, call):
    """Runs a function of `.ci/run` where only some programs are there; returns what was called."""
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $* >> {tmp_path}/called\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": str(tmp_path)}
    script = f"set -euo pipefail\n{functions()}\n{call}"
    done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True)
    called = tmp_path / "called"
    return done.returncode, called.read_text().splitlines() if called.exists() else []


def test_without_chromium_a_demanded_test_fails(monkeypatch):
    monkeypatch.setattr(browser, "CHROMIUM", None)
    with pytest.raises(pytest.fail.Exception, match="FASTPO_REQUIRE_CHROMIUM is set"):
        browser.chromium()
    monkeypatch.setattr(browser, "CHROMIUM", "/usr/bin/chromium")
    assert browser.chromium() == "/usr/bin/chromium"
    assert "export FASTPO_REQUIRE_CHROMIUM=1" in CI.read_text()


def test_chromium_is_installed_once_where_that_is_possible(tmp_path):
    apt = {"apt-get": "", "id": "echo 0", "timeout": 'shift 2; exec /bin/sh "$@"'}
    code, called = run(tmp_path, apt, "get_chromium")
    assert code == 0 and [one for one in called if one.startswith("apt-get")] == [
        "apt-get install -y --no-install-recommends chromium"
    ]


def test_the_package_list_is_fetched_where_it_is_old(tmp_path):
    apt = {"apt-get": '[ "$1" = update ]', "id": "echo 0", "timeout": 'shift 2; exec /bin/sh "$@"'}
    code, called = run(tmp_path, apt, "get_chromium || exit 3")
    asked = [one.split()[1] for one in called if one.startswith("apt-get")]
    assert code == 3 and asked == ["install", "update", "install"]


@pytest.mark.parametrize("programs", [{"id": "echo 1000"}, {"id": "echo 0", "chromium": ""}])
def test_nobody_else_installs_anything(tmp_path, programs):
    code, called = run(tmp_path, {**programs, "apt-get": ""}, "get_chromium")
    assert code == 0 and not any(one.startswith("apt-get") for one in called)


def test_a_chromium_that_does_not_start_is_none(tmp_path):
    assert run(tmp_path, {"chromium": "exit 127"}, "has_chromium")[0] == 1
    assert run(tmp_path, {"google-chrome": "echo 1"}, "has_chromium")[0] == 0
