"""Headless Chromium by its own protocol over pipes: real keys, real downloads, no driver."""

import json
import os
import shutil
import subprocess
import time

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
REQUIRED = bool(os.environ.get("FASTPO_REQUIRE_CHROMIUM"))
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED, reason="there is no Chromium (apt install chromium)"
)


def chromium():
    """The program; where it is demanded, as `.ci/run` does, a test fails without it."""
    if CHROMIUM is None:
        pytest.fail("there is no Chromium, and FASTPO_REQUIRE_CHROMIUM is set")
    return CHROMIUM


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, folder, width=1400, height=900):
        program = chromium()
        self._number, self._rest, self._late = 0, b"", []
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def pipes():  # the protocol is spoken over the descriptors 3 and 4
            kept_in, kept_out = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(kept_in, 3)
            os.dup2(kept_out, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += [
            "--remote-debugging-pipe",
            f"--window-size={width},{height}",
            f"--user-data-dir={folder / 'profile'}",
        ]
        self._process = subprocess.Popen(
            [program, *options, "about:blank"],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = None
        page = next(t for t in self._wait_for_targets() if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.call("Page.enable")

    def _wait_for_targets(self):
        for _ in range(1200):
            found = self.call("Target.getTargets")["targetInfos"]
            if any(t["type"] == "page" for t in found):
                return found
            time.sleep(0.05)
        raise TimeoutError("Chromium opened no page")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._late.append(answer)

    def _read(self):
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 16)
            assert more, "Chromium has ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def open(self, path):
        self.call("Page.navigate", url=path.resolve().as_uri())
        for _ in range(1200):
            if self.run("document.readyState") == "complete":
                return
            time.sleep(0.05)
        raise TimeoutError(path)

    def run(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, keys):
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                text = {"text": key} if kind == "keyDown" else {}
                self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def downloaded(self):
        for _ in range(1200):
            done = [p for p in self.downloads.iterdir() if p.suffix != ".crdownload"]
            if done:
                return done[0]
            time.sleep(0.05)
        raise TimeoutError("no file came")

    def screenshot(self, path):
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)
