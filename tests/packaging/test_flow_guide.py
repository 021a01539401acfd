"""The numbers of `docs/flow-models.md`: other trainers' slopes in our unit, and sizes of texts."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "flow-models.md").read_text()


def rows(head):
    """The cells of the table whose first line begins with `head`."""
    table = PAGE[PAGE.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def number(text):
    return float(text.replace(",", ""))


def test_every_slope_is_its_default_times_the_factor_of_its_logit():
    found = rows("trainer")
    assert len(found) == 11
    for name, _, logit, errors, default, factor, ours in found:
        half = 0.5 if logit.startswith("0.5") else 1.0
        if errors == "sum of N":
            assert (number(default), half, factor, ours) == (1.0, 0.5, "0.5 N", "N / 2"), name
            continue
        assert number(factor) == half, name
        assert number(ours) == number(default) * half, name


def test_simple_tuners_sum_is_over_the_elements_of_a_latent():
    elements = 16 * (1024 // 8) ** 2
    assert f"{elements:,} for 16 channels" in PAGE
    assert f"our {elements // 2:,}" in PAGE


BYTES = {
    "SD3.5": [(77 + 256) * 4096 + 2048],
    "FLUX.1-dev": [512 * 4096 + 768],
    "FLUX.2-klein 4B, 9B": [512 * 3 * 2560, 512 * 3 * 4096],
    "FLUX.2-dev": [512 * 3 * 5120],
}
A_TOKEN = {"Qwen-Image": 3584, "Z-Image": 2560, "Sana": 2304}


@pytest.mark.parametrize("model", BYTES)
def test_sizes_of_texts_with_their_padding(model):
    """Two bytes a number, in powers of ten."""
    [(_, prompt, many)] = [row for row in rows("model") if row[0] == model]
    told, all_told = (re.findall(r"([\d.]+) [MT]B", text) for text in (prompt, many))
    for numbers, one, total in zip(BYTES[model], told, all_told, strict=True):
        assert float(one) == pytest.approx(2 * numbers / 1e6, abs=0.06)
        assert float(total) == pytest.approx(2 * numbers * 1e5 / 1e12, rel=0.05)


@pytest.mark.parametrize("model", A_TOKEN)
def test_sizes_of_tokens(model):
    [(_, prompt, _)] = [row for row in rows("model") if row[0] == model]
    told = float(re.match(r"([\d.]+) KB a token", prompt)[1])
    assert told == pytest.approx(2 * A_TOKEN[model] / 1e3, abs=0.06)
