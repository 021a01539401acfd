"""Making the cache: exactness, quarantine, interruption, refusals."""

import json
import os
import shutil

import pytest
import torch

import fastpo.data.prepare.latents as prepare_module
from fastpo.data.cache import PairCache
from fastpo.data.images import decode, to_model_range
from fastpo.data.prepare import prepare
from fastpo.errors import CacheError, DataError, ForeignPathError, ModelError
from fastpo.models.encoders import Encoders
from fastpo.testing import pickapic_row, tiny_sdxl_folder, write_folder, write_pickapic

pytestmark = pytest.mark.usefixtures("one_thread")


def content(folder):
    """Everything that the cache holds, by path; but for lock, marker and memo of the weights."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    others = (".claims", ".fastpo", "manifest.json")
    kept = {n: p.read_bytes() for n, p in files.items() if n not in others}
    manifest = json.loads((folder / "manifest.json").read_text())
    return kept | {"manifest": {k: v for k, v in manifest.items() if k != "weights"}}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cache_holds_what_the_encoders_answer(config_for, tmp_path, family, workers):
    data = write_folder(tmp_path / "data", 5, sizes=[(32, 32), (40, 24)])
    config = config_for(family, prepare={"workers": workers})
    cache = prepare(config, progress=False)
    encoders = Encoders.load(config, device="cpu")
    for i in range(5):
        sides = [decode((data / f"{side}{i}.png").read_bytes()) for side in ("winner", "loser")]
        pixels = torch.stack(
            [torch.frombuffer(bytearray(s.tobytes()), dtype=torch.uint8) for s in sides]
        )
        pixels = pixels.view(2, sides[0].height, sides[0].width, 3).permute(0, 3, 1, 2)
        mean, logvar = encoders.encode_images(to_model_range(pixels))
        encoded = encoders.encode_prompts([f"prompt {i % 3}"])
        batch = cache.read([i], 0)
        torch.testing.assert_close(batch.latent_mean, mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.latent_logvar, logvar, atol=1e-5, rtol=1e-5)
        for name, states in encoded.items():
            torch.testing.assert_close(batch.conditions[name], states, atol=1e-6, rtol=1e-5)


def test_pickapic_end_to_end_with_ties(config_for, tmp_path):
    labels = [1.0, 0.5, 0.0, 1.0, 0.5, 0.0]
    rows = [pickapic_row(i, label) for i, label in enumerate(labels)]
    write_pickapic(tmp_path / "data" / "train-0.parquet", rows)
    cache = prepare(config_for(data={"source": "pickapic"}), progress=False)
    assert cache.pair_ids == [f"{1000 + i}:uid-{2 * i}:uid-{2 * i + 1}" for i in (0, 2, 3, 5)]
    assert cache.report == {"rows": 6, "ties": 2, "unlabeled": 0, "pairs": 4, "duplicates": 0}


@pytest.mark.parametrize("workers", [0, 3])
def test_a_corrupt_image_shifts_nothing(config_for, tmp_path, workers):
    write_folder(tmp_path / "data", 7)
    whole = prepare(config_for(prepare={"cache_dir": str(tmp_path / "whole")}), progress=False)
    (tmp_path / "data" / "loser2.png").write_bytes(b"broken")
    (tmp_path / "data" / "winner5.png").write_bytes(
        (tmp_path / "data" / "winner5.png").read_bytes()[:200]
    )
    cache = prepare(config_for(prepare={"workers": workers}), progress=False)
    assert cache.pair_ids == ["p0", "p1", "p3", "p4", "p6"]
    assert cache.quarantined == 2
    lines = (tmp_path / "cache" / "quarantine.jsonl").read_text().splitlines()
    quarantined = [json.loads(line) for line in lines]
    assert [q["pair_id"] for q in quarantined] == ["p2", "p5"]
    assert [q["reason"].split(":")[0] for q in quarantined] == ["loser", "winner"]
    for i, name in enumerate(cache.pair_ids):
        got, expected = cache.read([i], 0), whole.read([whole.pair_ids.index(name)], 0)
        torch.testing.assert_close(got.latent_mean, expected.latent_mean, atol=1e-5, rtol=1e-5)
        for key, rows in expected.conditions.items():
            torch.testing.assert_close(got.conditions[key], rows, atol=1e-6, rtol=1e-5)
        assert cache.prompts[cache.prompt_index[i]] == f"prompt {int(name[1:]) % 3}"
    limited = PairCache.open(config_for(prepare={"workers": workers}, data={"limit": 4}))
    assert limited.pair_ids == ["p0", "p1", "p3"], "the limit counts pairs of the source"


def test_differing_aspect_ratios_are_quarantined(config_for, tmp_path):
    data = write_folder(tmp_path / "data", 3)
    write_folder(tmp_path / "wide", 3, sizes=[(96, 48)])
    (data / "loser1.png").write_bytes((tmp_path / "wide" / "loser1.png").read_bytes())
    assert prepare(config_for(), progress=False).pair_ids == ["p0", "p2"]
    text = (tmp_path / "cache" / "quarantine.jsonl").read_text()
    assert "aspect ratios differ by more than 2 %: 48x48 and 96x48" in text


def test_nothing_usable_is_an_error(config_for, tmp_path):
    write_folder(tmp_path / "data", 2)
    for path in (tmp_path / "data").glob("winner*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 2 rows are bad, .*: p0: winner: .*; p1: winner: "):
        prepare(config_for(), progress=False)


def test_each_prompt_is_encoded_once(config_for, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 9, prompts=4)
    asked = []
    original = Encoders.encode_prompts

    def spy(self, prompts):
        asked.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(Encoders, "encode_prompts", spy)
    prepare(config_for(), progress=False)
    assert asked == ["", "prompt 0", "prompt 1", "prompt 2", "prompt 3"]


def test_a_prompt_that_is_empty_is_the_empty_prompt(config_for, tmp_path):
    write_folder(tmp_path / "data", 1)
    path = tmp_path / "data" / "pairs.jsonl"
    path.write_text(path.read_text().replace("prompt 0", ""))
    cache = prepare(config_for(), progress=False)
    assert cache.prompts == [""]
    assert cache.prompt_index.tolist() == [0]


def test_a_finished_cache_loads_no_model_and_no_data(config_for, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 3)
    first = prepare(config_for(), progress=False)

    def fail(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(Encoders, "load", fail)
    monkeypatch.setattr(prepare_module, "open_source", fail)
    again = prepare(config_for(prepare={"batch_size": 1, "shard_size": 5}), progress=False)
    assert again.fingerprint == first.fingerprint


def test_an_interrupted_preparation_continues_to_the_same_bytes(config_for, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 9, sizes=[(48, 48), (80, 48)], prompts=5)
    (tmp_path / "data" / "loser3.png").write_bytes(b"broken")
    whole = config_for(prepare={"cache_dir": str(tmp_path / "whole")})
    expected = prepare(whole, progress=False)
    original = Encoders.encode_images
    for allowed in (1, 3, 4):
        calls = iter(range(allowed))

        def stop(self, pixels, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(self, pixels)

        monkeypatch.setattr(Encoders, "encode_images", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config_for(), progress=False)
        with pytest.raises(CacheError):
            PairCache.open(config_for())
    monkeypatch.setattr(Encoders, "encode_images", original)
    cache = prepare(config_for(), progress=False)
    assert cache.pair_ids == expected.pair_ids
    assert cache.fingerprint == expected.fingerprint
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


@pytest.mark.parametrize("point", ["shard-00001", "text-00000", "index.arrow", "manifest.json"])
def test_dying_before_a_part_is_in_place(config_for, tmp_path, monkeypatch, point):
    write_folder(tmp_path / "data", 6)
    prepare(config_for(prepare={"cache_dir": str(tmp_path / "whole")}), progress=False)

    def dying(original, wanted):
        def move(source, target):
            if target.name == point and next(wanted):
                raise SystemExit
            original(source, target)

        return move

    wanted = iter([point != "manifest.json", True])  # the first manifest is the plan
    monkeypatch.setattr(os, "rename", dying(os.rename, wanted))
    monkeypatch.setattr(os, "replace", dying(os.replace, wanted))
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # as if killed
    with pytest.raises(SystemExit):
        prepare(config_for(), progress=False)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="unfinished"):
        PairCache.open(config_for())
    prepare(config_for(), progress=False)
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    assert not list((tmp_path / "cache").glob("*.partial*"))


def test_an_unfinished_cache_of_another_vae_is_not_continued(config_for, tmp_path):
    write_folder(tmp_path / "data", 4)
    other = tiny_sdxl_folder(tmp_path / "other", seed=1)
    prepare(config_for(data={"limit": 2}), progress=False)
    with pytest.raises(CacheError, match=r"VAE: the configuration gives sha256 .* was made with"):
        prepare(config_for(model={"vae": str(other)}), progress=False)


def test_another_vae_gives_another_cache(config_for, tmp_path):
    write_folder(tmp_path / "data", 1)
    other = tiny_sdxl_folder(tmp_path / "other", seed=1)
    one = prepare(config_for(), progress=False)
    two = prepare(
        config_for(model={"vae": str(other)}, prepare={"cache_dir": str(tmp_path / "two")}),
        progress=False,
    )
    assert one.fingerprint != two.fingerprint
    assert not torch.allclose(one.read([0], 0).latent_mean, two.read([0], 0).latent_mean)
    for name, states in one.read([0], 0).conditions.items():
        assert torch.equal(states, two.read([0], 0).conditions[name])


def test_a_larger_limit_adds_the_missing_pairs(config_for, tmp_path):
    write_folder(tmp_path / "data", 5)
    assert len(prepare(config_for(data={"limit": 3}), progress=False)) == 3
    with pytest.raises(CacheError, match=r"data\.limit: the configuration gives 5, .* with 3"):
        PairCache.open(config_for(data={"limit": 5}))
    cache = prepare(config_for(), progress=False)
    assert cache.pair_ids == [f"p{i}" for i in range(5)]
    assert len(prepare(config_for(data={"limit": 2}), progress=False)) == 2
    assert len(PairCache.open(config_for())) == 5


def test_flips_write_their_mask(config_for, tmp_path):
    write_folder(tmp_path / "data", 5)
    cache = prepare(config_for(data={"flip_rate": 0.4, "flip_seed": 2}), progress=False)
    lines = (tmp_path / "cache" / "flips-rate0.4-seed2.csv").read_text().splitlines()[1:]
    assert lines == [
        f"{name},{int(flip)}" for name, flip in zip(cache.pair_ids, cache.flipped, strict=True)
    ]


def test_values_beyond_the_stored_dtype_are_refused(config_for, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 1)
    original = Encoders.encode_images
    monkeypatch.setattr(
        Encoders, "encode_images", lambda s, p: tuple(1e6 * x for x in original(s, p))
    )
    with pytest.raises(CacheError, match=r"does not fit into torch\.float16; set prepare.store"):
        prepare(config_for(prepare={"store_precision": "fp16"}), progress=False)


def test_nan_from_the_vae_stops_the_preparation_and_names_the_pair(
    config_for, tmp_path, monkeypatch
):
    write_folder(tmp_path / "data", 4)
    original = Encoders.load
    batches = []

    def spoil(module, inputs, output):
        batches.append(len(output))
        if len(batches) == 2:
            output[1] = float("nan")  # the loser of the fourth pair: three pairs fill a batch

    def broken(config, **options):
        encoders = original(config, **options)
        encoders.vae.quant_conv.register_forward_hook(spoil)
        return encoders

    monkeypatch.setattr(Encoders, "load", broken)
    with pytest.raises(ModelError, match=r"NaN or infinity.*seen in the pairs p3$"):
        prepare(config_for(prepare={"shard_size": 4, "batch_size": 6}), progress=False)
    assert batches == [6, 2]


def test_the_progress_bar_shows_the_speed(config_for, tmp_path, capsys):
    write_folder(tmp_path / "data", 3)
    prepare(config_for(), progress=True)
    text = capsys.readouterr().err
    assert "6/6" in text
    assert "images/s" in text


def test_a_file_in_the_place_of_the_cache_is_an_error(config_for, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ForeignPathError, match="cache is no folder, not a cache"):
        prepare(config_for(), progress=False)
