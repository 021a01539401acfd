"""The color world: pictures from packages, what is preferred, how it is scored."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastpo.config import parse_config
from fastpo.data.sources import open_source
from fastpo.errors import DataError, ForeignPathError
from fastpo.study.config import load_study
from fastpo.study.emoji import packages
from fastpo.study.emoji.grid import grid
from fastpo.study.emoji.pictures import (
    STYLES,
    Variation,
    color,
    read_pictures,
    vary,
    write_pictures,
)
from fastpo.study.emoji.scorer import EmojiScorer, accuracy, nearer
from fastpo.study.emoji.text import HELD_OUT, NAMES, name_of, prompts_of
from fastpo.study.emoji.world import Emoji
from fastpo.study.trials import plan
from fastpo.study.world import Places, World


def picture(style, number):
    """A patchwork of its own on transparent ground; style A is shaded, style B flat."""
    rng = np.random.default_rng(number)
    paint = rng.integers(40, 215, (4, 4, 3)).repeat(16, axis=0).repeat(16, axis=1)
    y, x = np.mgrid[:64, :64]
    if style == "google":
        paint = np.clip(paint + 3 * (y[..., None] - 32), 0, 255)
    alpha = (np.hypot(y - 32, x - 32) < 30)[..., None] * 255
    return Image.fromarray(np.concatenate([paint, alpha], axis=2).astype(np.uint8), "RGBA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both packages in the layout of npm's, with all drawn names and twenty others."""
    root = tmp_path_factory.mktemp("node_modules")
    names = [*NAMES, *(f"thing {k}" for k in range(20)), "only here"]
    for style in STYLES:
        pictures = root / f"emoji-datasource-{style}" / "img" / style / "64"
        pictures.mkdir(parents=True)
        entries = []
        for k, name in enumerate(names):
            has = name != "only here" or style == "google"
            entry = {"name": name.upper(), "short_name": name, "image": f"{k:x}.png"}
            kinds = {"category": "Things", "subcategory": "thing"}
            entries.append({**entry, **kinds, f"has_img_{style}": has})
            if has:
                picture(style, k).save(pictures / f"{k:x}.png")
        (root / f"emoji-datasource-{style}" / "emoji.json").write_text(json.dumps(entries))
    return root


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    """The world's short base, with pictures beside it."""
    root = tmp_path_factory.mktemp("bases")
    return Emoji(packages=folder).build_base(root, short=True)


def test_both_styles_of_the_names_that_both_packages_have(folder, tmp_path):
    out = write_pictures(tmp_path / "out", packages.packages_in(folder), size=64)
    everything, drawn = read_pictures(out, drawn=None), read_pictures(out)
    assert len(everything) == len(NAMES) + 20 and drawn.names == list(NAMES)
    assert read_pictures(out, held_out=True).names == list(HELD_OUT) and len(HELD_OUT) == 25
    for style in STYLES:
        with Image.open(folder / f"emoji-datasource-{style}/img/{style}/64/0.png") as file:
            rgba = np.asarray(file)
        shown = rgba[..., 3:] > 0
        assert (drawn.styles[style][0] == np.where(shown, rgba[..., :3], 255)).all()


def test_pictures_of_half_the_size_are_means_of_four_pixels(folder, tmp_path):
    found = packages.packages_in(folder)
    large = read_pictures(write_pictures(tmp_path / "large", found, size=64)).styles["google"]
    small = read_pictures(write_pictures(tmp_path / "small", found)).styles["google"]
    means = large.reshape(len(large), 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert small.shape[1:] == (32, 32, 3) and np.abs(small - means).max() <= 1.0


def test_what_is_no_package_is_refused_in_a_line(folder, tmp_path):
    with pytest.raises(DataError, match="emoji-datasource-google: no such folder; expected"):
        packages.packages_in(tmp_path)
    found = {style: tmp_path / style for style in STYLES}
    with pytest.raises(DataError, match=r"google.emoji.json is missing: expected the unpacked"):
        write_pictures(tmp_path / "out", found)
    for path in found.values():
        path.mkdir()
        (path / "emoji.json").write_text('[{"name": "ROSE"}]')
    with pytest.raises(DataError, match=r"is no list of emoji .* KeyError 'has_img_google'"):
        write_pictures(tmp_path / "out", found)
    for path in found.values():
        (path / "emoji.json").write_text("[]")
    with pytest.raises(DataError, match=f"no picture in both of .* {len(NAMES) - 1} other names"):
        write_pictures(tmp_path / "out", found)
    with pytest.raises(ValueError, match="32 or 64, got 48"):
        write_pictures(tmp_path / "out", packages.packages_in(folder), size=48)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ForeignPathError, match="a set of emoji pictures"):
        write_pictures(tmp_path / "mine", packages.packages_in(folder))


def test_a_picture_that_cannot_be_read_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    broken = tmp_path / "copy/emoji-datasource-twitter/img/twitter/64/3.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"twitter/64/3.png: no picture there that can be read"):
        write_pictures(tmp_path / "out", packages.packages_in(tmp_path / "copy"))


def test_an_archive_gives_the_list_and_the_pictures_of_64_pixels(tmp_path):
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("emoji.json", "README.md", "img/google/64/0.png", "img/google/sheets/64.png"):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"data"))
    packages.unpack(archive, tmp_path / "out", "google")
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("out/**/*.*"))
    assert found == ["emoji.json", "img/google/64/0.png"]
    archive.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"package.tgz is no npm package"):
        packages.unpack(archive, tmp_path / "again", "google")


def test_without_npm_the_error_says_what_to_unpack(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"npm is not installed: unpack both .* key packages"):
        packages.fetch_packages(tmp_path)


def test_color_is_the_largest_channel_minus_the_smallest():
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[0] = (255, 0, 128)
    pixels[1] = (90, 90, 90)
    pixels[1, :2] = (90, 141, 90)
    assert color(pixels) == pytest.approx([1.0, 0.1])


def test_a_variant_is_stronger_smaller_and_moved_on_white():
    image = torch.full((1, 3, 32, 32), 1.0)
    image[:, :, 8:24, 8:24] = torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    one = torch.ones(1)
    same = vary(image, Variation(one, one, 0 * one, 0 * one))
    assert torch.allclose(same, image, atol=1e-6)
    other = vary(image, Variation(0.5 * one, 0.5 * one, 0.25 * one, 0 * one))[0]
    colored = other[0] != other[2]
    rows, columns = colored.any(1).nonzero()[:, 0], colored.any(0).nonzero()[:, 0]
    assert (rows.min(), rows.max()) == (12, 19) and (columns.min(), columns.max()) == (20, 27)
    assert other[:, 15, 24].tolist() == pytest.approx([0.25, 0.0, -0.25])


def test_a_prompt_is_read_as_the_longest_name_that_it_ends_with():
    names = ["bird", "black bird", "rose"]
    assert [name_of(p, names) for p in ("an emoji of a black bird", "bird", "A Rose")] == [1, 0, 2]
    assert [name_of(p, NAMES) for p in prompts_of(NAMES)] == 3 * list(range(len(NAMES)))
    with pytest.raises(DataError, match="ends with none of the 3 emoji names: 'primrose'"):
        name_of("primrose", names)


def written(built, tmp_path, mismatch):
    """The winners' and losers' styles and images of a short set, and its captions."""
    world = Emoji(mismatch=mismatch)
    places = Places(built, tmp_path / f"{mismatch}", tmp_path / "cache", tmp_path / "run")
    assert world.write_preferences(places.preferences, base=built, seed=3, short=True) == set()
    pairs = list(open_source(parse_config(world.plain(places, seed=3, short=True)).data))
    rows = pq.read_table(next(places.preferences.rglob("*.parquet"))).to_pylist()
    styles = [[r[f"model_{k}"] for k in ((0, 1) if r["label_0"] == 1.0 else (1, 0))] for r in rows]
    images = [
        [np.asarray(Image.open(io.BytesIO(read()))) for read in (p.winner, p.loser)] for p in pairs
    ]
    return styles, images, [pair.prompt for pair in pairs]


def test_without_mismatch_the_more_colorful_of_two_variants_is_preferred(built, tmp_path):
    styles, images, captions = written(built, tmp_path, 0.0)
    assert len(images) == 24 and all(pair == ["google", "google"] for pair in styles)
    gaps = np.array([np.subtract(*color(np.stack(pair))) for pair in images])
    assert (gaps > 0).all() and gaps.mean() > 0.02
    assert not {NAMES[name_of(c, NAMES)] for c in captions} & set(HELD_OUT)


def test_a_share_of_the_pairs_prefers_the_other_style(built, tmp_path):
    none, half, whole = (written(built, tmp_path, share) for share in (0.0, 0.5, 1.0))
    assert all(pair == ["twitter", "google"] for pair in whole[0])
    for k, pair in enumerate(half[0]):
        like = whole if pair == ["twitter", "google"] else none
        assert half[2][k] == like[2][k] and (np.stack(half[1][k]) == np.stack(like[1][k])).all()
    assert 4 < sum(pair == ["twitter", "google"] for pair in half[0]) < 20


def test_the_scorer_counts_color_and_style_of_what_it_recognizes(built):
    pictures = read_pictures(built.parent / "pictures")
    scorer = EmojiScorer(pictures, 0.25)
    shown = [Image.fromarray(pictures.styles[s][k]) for s in STYLES for k in (0, 1, 2)]
    right = [f"an emoji of a {NAMES[k]}" for k in (0, 1, 2, 0, 1, 2)]
    amount = color(np.stack([pictures.styles[s][k] for s in STYLES for k in (0, 1, 2)]))
    scores = scorer.score(shown, right)
    assert (scores["legible"] == 1).all() and scores["color_reward"] == pytest.approx(amount)
    assert scores["style"] == pytest.approx([0, 0, 0, 1, 1, 1], abs=1e-5)
    assert scores["emoji_reward"] == pytest.approx(0.75 * amount + 0.25 * scores["style"])
    blank = scorer.score([Image.new("RGB", (32, 32), "white")], [right[0]])
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    noisy = scorer.score([Image.fromarray(n) for n in noise], [right[0]] * 50)
    assert blank["color"] == 0.0 and noisy["legible"].mean() < 0.1
    assert noisy["style_reward"] == pytest.approx(noisy["style"] * noisy["legible"])
    with pytest.raises(ValueError, match="one prompt per image, got 6 images, 1 prompts"):
        scorer.score(shown, right[:1])
    assert all(values.shape == (0,) for values in scorer.score([], []).values())


def test_the_style_is_the_share_of_the_way_from_one_picture_to_the_other():
    assert nearer(np.array([[0.9, 0.7], [0.7, 0.9], [0.8, 0.8]])) == pytest.approx(
        [0.25, 0.75, 0.5]
    )


def test_a_name_is_recognized_among_three_by_the_best_of_both_styles(built, monkeypatch):
    scorer = EmojiScorer(read_pictures(built.parent / "pictures"), 0.0)
    prompts = [f"an emoji of a {NAMES[0]}"] * 2
    likeness = np.zeros((2, 2, len(NAMES)))
    likeness[:, :, 0] = (0.2, 0.5)
    likeness[:, 0, 1:3] = 0.6
    likeness[1, 1, 3] = 0.6
    monkeypatch.setattr(scorer, "likeness", lambda pixels: likeness)
    scores = scorer.score([Image.new("RGB", (32, 32))] * 2, prompts)
    assert scores["legible"].tolist() == [1.0, 0.0]


def test_styles_are_told_apart_and_names_recognized(built):
    class Copy:
        """An autoencoder that loses nothing."""

        def encode(self, images):
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=images))

        def decode(self, latents):
            return SimpleNamespace(sample=latents)

    found = accuracy(built.parent / "pictures", Copy(), draws=1)
    assert found["pictures"] == found["decoded"] > 0.8 and found["legible"] > 0.9


def test_the_base_is_found_again(built):
    about = (built / "emoji_base.json").stat().st_mtime_ns
    assert Emoji(mismatch=1.0).build_base(built.parent.parent, short=True) == built
    assert (built / "emoji_base.json").stat().st_mtime_ns == about


def test_it_is_a_world_and_the_packages_folder_decides_nothing(folder):
    world = Emoji(packages=folder, mismatch=0.5)
    assert isinstance(world, World)
    assert world.model_dump(mode="json", exclude_defaults=True) == {"mismatch": 0.5}


def test_the_picture_has_a_row_for_the_base_and_each_run_that_is_there(tmp_path):
    trials = plan(load_study(Path("emoji")), short=False)
    with pytest.raises(DataError, match="none of the study's runs is there"):
        grid(trials, tmp_path)
    heights = []
    same = next(t for t in trials if t.seed == 1)
    for trial in (*trials[:2], same):
        assert trial.part.name == trials[0].part.name
        folder = trial.folder(tmp_path) / "run" / "evaluation"
        folder.mkdir(parents=True)
        samples = []
        for k in range(4):
            for model in ("base", "aligned"):
                Image.new("RGB", (32, 32), (60 * k, 0, 0)).save(folder / f"{model}-{k}.png")
            files = {"base": f"base-{k}.png", "aligned": f"aligned-{k}.png"}
            samples.append({"prompt": f"an emoji of a {NAMES[k // 2]}", **files})
        (folder / "samples.json").write_text(json.dumps({"samples": samples}))
        heights.append(Image.open(io.BytesIO(grid(trials, tmp_path))).height)
    assert heights[1] == pytest.approx(1.5 * heights[0], abs=2)  # 3 rows, after 2
    assert heights[2] == heights[1], "the same run with another seed has no row"
