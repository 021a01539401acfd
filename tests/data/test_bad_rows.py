"""Bad rows are left out, counted and told; too many of them stop the work, all told at once."""

import json

import pytest

from fastpo.cli import app
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.errors import DataError, TooManyBadRowsError
from fastpo.testing import image_bytes, pickapic_row, write_folder, write_pickapic

pytestmark = pytest.mark.usefixtures("one_thread")


def entry(number, prompt=None, **changes):
    plain = {
        "id": f"p{number}",
        "prompt": f"prompt {number % 3}" if prompt is None else prompt,
        "winner": f"winner{number}.png",
        "loser": f"loser{number}.png",
    }
    return json.dumps(plain | changes)


@pytest.fixture
def mixed(tmp_path):
    """Twelve lines of which seven are pairs, two of these one comparison labeled both ways."""
    data = write_folder(tmp_path / "data", 12)
    (data / "winner1.png").unlink()
    (data / "loser2.png").write_bytes(b"broken")
    (data / "loser3.png").write_bytes(image_bytes(3, (96, 48)))
    (data / "loser4.png").write_bytes((data / "winner4.png").read_bytes())
    lines = [entry(number) for number in range(10)]
    lines[5] = entry(5, prompt=None).replace('"prompt 2"', "null")
    lines.append(entry(10, "prompt 0", winner="loser6.png", loser="winner6.png"))
    lines.append(entry(11, "prompt 1", winner="winner7.png", loser="loser7.png"))
    (data / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return data


def test_every_reason_is_counted_told_and_listed(config_for, mixed):
    config = config_for()
    cache = prepare(config, progress=False)
    assert cache.pair_ids == ["p0", "p6", "p7", "p8", "p9", "p10", "p11"]
    assert cache.report == {
        "rows": 12,
        "ties": 0,
        "unlabeled": 0,
        "pairs": 11,
        "duplicates": 1,
        "bad": 1,
        "aspect": 1,
        "same": 1,
        "contradictions": 1,
    }
    lines = (cache.folder / "quarantine.jsonl").read_text().splitlines()
    listed = {line["pair_id"]: (line["kind"], line["reason"]) for line in map(json.loads, lines)}
    assert [*listed] == ["p1", "p2", "p3", "p4", "line 6"]
    assert [kind for kind, _ in listed.values()] == ["bad", "bad", "aspect", "same", "bad"]
    assert "No such file" in listed["p1"][1]
    assert listed["p4"][1] == "winner and loser are the same image"
    assert listed["line 6"][1].startswith("prompt is None")
    assert cache.summary().startswith(
        "7 of 12 pairs; left out: 3 bad rows or images, 1 of another aspect ratio than its other "
        "image, 1 whose winner is its loser; kept: 1 duplicate, 1 comparison labeled both ways; "
        f"listed in {cache.folder / 'quarantine.jsonl'}, first reason (p1): winner: unreadable"
    )
    assert PairCache.open(config, verify=True).summary() == cache.summary()


def test_the_limit_stops_before_any_model_is_loaded(config_for, mixed, monkeypatch):
    from fastpo.models.encoders import Encoders

    monkeypatch.setattr(Encoders, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(TooManyBadRowsError) as caught:
        prepare(config_for(data={"max_bad": "10%"}), progress=False)
    words = str(caught.value)
    assert "2 of 12 rows are bad, at most 1 may be (data.max_bad 0.1)" in words
    assert "line 2: winner image not found" in words and "line 6: prompt is None" in words


def test_images_count_for_the_limit_and_what_is_finished_is_kept(config_for, mixed):
    """Shapes and equal images do not: nothing is wrong with them."""
    allowed = {"max_bad": 0.2}
    with pytest.raises(TooManyBadRowsError, match=r"3 of 12 rows are bad, at most 2") as caught:
        prepare(config_for(data=allowed), progress=False)
    for part in ("line 6: prompt is None", "p1: winner: unreadable", "p2: loser: Unidentified"):
        assert part in str(caught.value)
    (mixed / "loser2.png").write_bytes(image_bytes(5))
    (mixed / "winner1.png").write_bytes(image_bytes(2))
    cache = prepare(config_for(data=allowed), progress=False)
    assert "p2" in cache.pair_ids
    again = prepare(config_for(data=allowed), progress=False, retry_quarantined=True)
    assert again.pair_ids[:3] == ["p0", "p1", "p2"]


@pytest.mark.parametrize("retry", [True, False])
def test_parts_of_an_unfinished_cache_are_tried_again(config_for, mixed, monkeypatch, retry):
    from fastpo.data.cache.manifest import load_manifest

    monkeypatch.setattr("fastpo.data.prepare.latents.BadRows.check", lambda *_: None)
    monkeypatch.setattr("fastpo.data.prepare.latents._finish", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_for(), progress=False)
    monkeypatch.undo()
    strict = config_for(data={"max_bad": 0.1})
    (mixed / "loser2.png").write_bytes(image_bytes(5))
    (mixed / "winner1.png").write_bytes(image_bytes(2))
    assert not load_manifest(strict.prepare.cache_dir).complete
    cache = prepare(strict, progress=False, retry_quarantined=retry)
    assert cache.pair_ids[:3] == ["p0", "p1", "p2"]


def stop(*_):
    raise KeyboardInterrupt


def test_more_reasons_than_an_error_tells_are_listed_in_a_file(config_for, tmp_path):
    data = write_folder(tmp_path / "data", 3)
    listing = data / "pairs.jsonl"
    listing.write_text(listing.read_text() + "no JSON\n" * 40)
    with pytest.raises(DataError) as caught:
        prepare(config_for(), progress=False)
    path = tmp_path / "cache" / "quarantine.jsonl"
    assert f"and 20 more (all: {path})" in str(caught.value)
    assert len(path.read_text().splitlines()) == 40
    listing.write_text("".join(listing.read_text().splitlines(keepends=True)[:4]))
    assert len(prepare(config_for(), progress=False)) == 3


def test_null_captions_and_labels_of_parquet_files(config_for, tmp_path):
    rows = [pickapic_row(i, 0.5 if i in (3, 4) else 1.0) for i in range(12)]
    rows[2]["caption"] = None
    rows[7] |= {"label_0": None, "label_1": None}
    rows[8] |= {"jpg_1": None}
    rows[9] |= {"has_label": False}
    write_pickapic(tmp_path / "data" / "train-0.parquet", rows)
    cache = prepare(config_for(data={"source": "pickapic"}), progress=False)
    assert len(cache) == 6
    assert cache.summary().startswith(
        "6 of 12 pairs; left out: 2 ties, 1 unlabeled, 3 bad rows or images; listed in"
    )


def test_the_command_tells_what_was_left_out(config_for, mixed, tmp_path, capsys):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_for().model_dump(mode="json")))
    app(["prepare", str(path)], standalone_mode=False)
    assert "7 of 12 pairs; left out: 3 bad rows or images" in capsys.readouterr().out
