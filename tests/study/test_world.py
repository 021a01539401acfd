"""The digits as a world: whose labels are wrong, what is sampled, and what is scored."""

import io

import numpy as np
import pytest
from PIL import Image

from fastpo.config import parse_config
from fastpo.data.sources import open_source
from fastpo.study.digits import darkness, lower_surplus
from fastpo.study.world import Places, World
from fastpo.study.worlds import WORLDS, build_world


def written(tmp_path, labels):
    """A short set's config, its pairs, and what is to be found in it."""
    world = build_world({"name": "digits", "labels": labels})
    places = Places(*(tmp_path / name for name in ("base", labels, "cache", "run")))
    found = world.write_preferences(places.preferences, base=places.base, seed=0, short=True)
    config = parse_config(world.plain(places, seed=0, short=True))
    return config, list(open_source(config.data)), found


def grays(pair):
    images = (Image.open(io.BytesIO(read())) for read in (pair.winner, pair.loser))
    return [np.asarray(image.convert("L")) for image in images]


def test_each_world_has_what_a_study_asks_for():
    for name in WORLDS:
        world = build_world(name)
        assert isinstance(world, World) and {"reward", "legible"} <= world.columns.keys()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("moon", "world: expected one of digits.*got 'moon'"),
        ({"labels": "subtle"}, "got None"),
        ({"name": "digits", "label": "subtle"}, "world digits: unknown key label.*labels"),
        ({"name": "digits", "minority": 1.5}, "world digits: minority: "),
    ],
)
def test_what_no_world_knows_is_refused_in_a_line(given, text):
    with pytest.raises(ValueError, match=text):
        build_world(given)


def test_the_bolder_is_preferred_and_nothing_is_wrong(tmp_path):
    config, pairs, found = written(tmp_path, "ink")
    assert not found and len(pairs) > 50
    assert all(darkness(w) > darkness(x) for w, x in map(grays, pairs))
    assert config.prepare.cache_dir == tmp_path / "cache"
    assert config.train.output_dir == tmp_path / "run" and config.data.flip_rate == 0.0


def test_subtle_pairs_differ_little_and_are_all_right(tmp_path):
    _, pairs, found = written(tmp_path, "subtle")
    gaps = [darkness(w) - darkness(x) for w, x in map(grays, pairs)]
    assert not found and len(gaps) > 10 and 0.0 < min(gaps) and max(gaps) < 0.02


def test_errors_of_bradley_terry_are_the_pairs_whose_winner_is_fainter(tmp_path):
    _, pairs, found = written(tmp_path, "bradley_terry")
    fainter = {p.pair_id for p in pairs if darkness(grays(p)[0]) < darkness(grays(p)[1])}
    assert found == fainter and 0 < len(found) < len(pairs) / 3


def test_of_two_tastes_the_minority_prefers_the_lower_half(tmp_path):
    _, pairs, found = written(tmp_path, "two_tastes")
    assert 0.15 < len(found) / len(pairs) < 0.45
    for pair in pairs:
        value = lower_surplus if pair.pair_id in found else darkness
        winner, loser = map(value, grays(pair))
        assert winner >= loser


def test_the_minority_is_scored_by_its_own_taste(tmp_path):
    world = build_world("digits")
    gray = np.full((32, 32), 255, np.uint8)
    gray[20:24] = 0
    assert lower_surplus(gray) == pytest.approx(0.25) and lower_surplus(gray[::-1]) == -0.25
    names = [s.score([Image.fromarray(gray)], ["the digit one"]) for s in world.scorers(tmp_path)]
    assert set(world.columns.values()) <= set().union(*names)
