"""The page of real small runs as headless Chromium lays it out."""

import base64
import json
import re
import subprocess

import pytest

from fastpo.config import parse_config
from fastpo.evaluate import evaluate
from fastpo.report import write_report
from fastpo.testing import tiny_clip_folder
from fastpo.train import train
from tests.conftest import raw_config
from tests.review.browser import chromium, needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]
PROBE = """<script>
const errors = [];
const note = e => errors.push(String(e.message || e.target.outerHTML.slice(0, 200)));
addEventListener("error", note, true);
console.error = (...words) => errors.push(words.join(" "));
addEventListener("load", () => {
  const page = document.documentElement;
  const tables = [...document.querySelectorAll("#results .wide")];
  const wide = tables.map(x => x.scrollWidth - x.clientWidth);
  const broken = [...document.images].filter(x => !x.complete || !x.naturalWidth).length;
  const said = {width: innerWidth, beyond: page.scrollWidth - page.clientWidth, wide, broken,
                images: document.images.length, errors, text: document.body.innerText};
  parent.postMessage(JSON.stringify(said), "*");
});
</script>"""
FRAME = """<!doctype html><pre id="said"></pre><script>
addEventListener("message", e => {{ document.getElementById("said").textContent = btoa(
  String.fromCharCode(...new TextEncoder().encode(e.data))); }});
</script><iframe src="{page}" style="width:{width}px;height:2000px;border:0"></iframe>"""


@pytest.fixture(scope="module")
def page(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """A run with scores of an earlier step, one of MaPO without any, and one as it should be."""
    base = tmp_path_factory.mktemp("runs")
    clip = tiny_clip_folder(base / "clip")

    def config(name, **changes):
        folder = base / name
        raw = raw_config("sd15", light_pipelines["sd15"], tiny_data, tiny_caches, folder)
        raw["evaluate"] |= {"seeds_per_prompt": 2, "scorers": [f"clip:{clip}"]}
        raw["train"] |= changes
        return parse_config(raw)

    earlier = config("earlier", max_steps=8)
    train(earlier, progress=False)
    evaluate(earlier)
    train(config("earlier", max_steps=12), resume=True, progress=False)
    train(config("mapo", objective={"name": "mapo"}), progress=False)
    judged = config(
        "adaptive_dpo-with-a-long-name-for-its-folder",
        objective={"name": "adaptive_dpo"},
        annotators={"kind": "ledger"},
    )
    train(judged, progress=False)
    evaluate(judged)
    folders = [base / "earlier", base / "mapo", judged.train.output_dir]
    return write_report(folders, base / "report", title="Small runs")


def look(page, width, tmp_path):
    """What the page says of itself in a frame of some width, once everything is loaded."""
    copy, frame = tmp_path / "page.html", tmp_path / "frame.html"
    copy.write_text(page.read_text().replace("<head>", f"<head>{PROBE}", 1))
    frame.write_text(FRAME.format(page=copy.name, width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options.append("--virtual-time-budget=20000")
    done = subprocess.run(
        [chromium(), *options, f"--user-data-dir={tmp_path}/profile", "--dump-dom", str(frame)],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    said = re.search(r'<pre id="said">([^<]+)</pre>', done.stdout)
    assert said is not None, done.stderr[-2000:]
    return json.loads(base64.b64decode(said[1]))


@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_scrolls_sideways_and_every_image_is_there(page, width, tmp_path):
    """On a telephone the table may scroll inside of its frame; the page never does."""
    said = look(page, width, tmp_path)
    assert said["width"] == width and said["errors"] == []
    assert said["beyond"] <= 0
    assert said["images"] > 8 and said["broken"] == 0
    assert width < 1000 or said["wide"] == [0]


def test_it_says_of_each_run_what_was_evaluated(page, tmp_path):
    text = " ".join(look(page, 1400, tmp_path)["text"].split())
    assert re.search(r"mapo.{0,80}not evaluated yet", text, re.IGNORECASE)
    assert "of step 8" in text
    diagrams = re.findall(r'alt="([^"]*margin[^"]*)"', page.read_text(), re.IGNORECASE)
    assert diagrams == ["Implicit margin", "Margin where there is no reference"]
