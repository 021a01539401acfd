"""The gallery in headless Chromium: keys pressed, a file saved, nothing out of place."""

import json

import pytest

from fastpo.review.gallery import write_gallery
from tests.review.browser import Browser, needs_chromium
from tests.review.world import make_data, make_run

pytestmark = [pytest.mark.slow, needs_chromium]
VISIBLE = "[...document.querySelectorAll('article')].filter(x => x.style.display != 'none').length"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    run = make_run(folder / "a-run", make_data(folder / "data", 60), 60)
    page = write_gallery(run, folder / "out", pairs=8)
    return page


@pytest.fixture
def browser(tmp_path):
    one = Browser(tmp_path)
    yield one
    one.close()


def test_keys_say_right_wrong_and_tie_and_the_file_says_it_too(gallery, browser):
    browser.open(gallery)
    browser.press("wwrjtuw")  # undo takes back nothing here: the mark moves on after each verdict
    browser.press("s")
    file = browser.downloaded()
    assert file.name == "a-run-marks.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = browser.run("[...document.querySelectorAll('article')].map(x => x.dataset.id)")
    said = {row["pair_id"]: row["verdict"] for row in rows}
    expected = dict(zip(names, ["wrong", "wrong", "right", None, "tie", "wrong"], strict=False))
    assert said == {name: verdict for name, verdict in expected.items() if verdict}
    assert all(row["run"] == "a-run" and 0 <= row["probability"] <= 1 for row in rows)


def test_verdicts_outlive_the_page_and_filters_narrow_it(gallery, browser):
    browser.open(gallery)
    assert browser.run(VISIBLE) == 16
    browser.press("wr")
    browser.open(gallery)  # as if it had been closed
    assert "2 of 16 judged" in browser.run("document.getElementById('said').textContent")

    def choose(name, value):
        script = f"document.getElementById('{name}').value = '{value}'"
        browser.run(
            f"{script}; document.getElementById('{name}').dispatchEvent(new Event('change'))"
        )
        return browser.run(VISIBLE)

    assert choose("verdict", "wrong") == 1 and choose("verdict", "") == 16
    assert choose("kind", "certain") == 8
    assert choose("truth", "true") == 0  # none of the most certain labels was flipped
    assert choose("kind", "suspicious") == browser.run("shown.length") > 5
    assert browser.run("document.querySelector('article[data-verdict=wrong] .truth').hidden")
    browser.run("document.getElementById('tell').click()")
    assert not browser.run("document.querySelector('article[data-verdict=wrong] .truth').hidden")


def test_the_labels_that_were_flipped_show_the_dark_image_as_preferred(gallery, browser):
    """The data's winners are light: a person sees at a glance that these labels are wrong."""
    browser.open(gallery)
    dark = browser.run(
        """data.pairs.filter(p => p.kind == "suspicious" && p.flipped).map(p => {
          const image = document.querySelector(`article[data-id=${p.id}] img`);
          const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
          pen.drawImage(image, 0, 0);
          return pen.getImageData(3, 3, 1, 1).data[0];
        })"""
    )
    assert len(dark) > 5 and set(dark) == {40}


@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_scrolls_sideways_and_no_text_is_code(gallery, tmp_path, width):
    browser = Browser(tmp_path, width=width)
    try:
        browser.open(gallery)
        page = "document.documentElement"
        assert browser.run("innerWidth") == width
        assert browser.run(f"{page}.scrollWidth - {page}.clientWidth") <= 0
        assert browser.run("[...document.images].every(x => x.naturalWidth > 0)")
        assert browser.run("document.querySelector('b')") is None
        assert browser.run(
            "[...document.querySelectorAll('.prompt')].some(x => x.textContent.startsWith('<b>'))"
        )
    finally:
        browser.close()
