"""Decoding, buckets and the shared crop."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastpo.data.images import (
    UnusableImageError,
    decode,
    load_pair,
    to_model_range,
)
from fastpo.errors import ConfigError
from fastpo.models.geometry import make_geometry
from fastpo.testing import image_bytes


def encoded(image, encoding="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def load(first, second, geometry):
    return load_pair(lambda: first, lambda: second, geometry)


SDXL = make_geometry(1024, use_buckets=True, vae_factor=8, denoiser_factor=4)
TINY = make_geometry(32, use_buckets=True, vae_factor=4, denoiser_factor=2)
SQUARE = make_geometry(32, use_buckets=False, vae_factor=4, denoiser_factor=2)


def test_sdxl_buckets_have_about_the_resolution_squared_pixels():
    assert (1024, 1024) in SDXL.buckets
    assert SDXL.step == 64
    for height, width in SDXL.buckets:
        assert height % 64 == width % 64 == 0
        assert abs(height * width / 1024**2 - 1) < 0.04
        assert max(height, width) / min(height, width) < 2.1
        assert (width, height) in SDXL.buckets


@settings(deadline=None)
@given(
    resolution=st.integers(1, 200),
    vae_factor=st.sampled_from([2, 4, 8]),
    denoiser_factor=st.sampled_from([1, 2, 4, 8]),
)
def test_every_bucket_suits_the_model(resolution, vae_factor, denoiser_factor):
    unit = vae_factor * denoiser_factor
    geometry = make_geometry(
        resolution * unit, use_buckets=True, vae_factor=vae_factor, denoiser_factor=denoiser_factor
    )
    assert all(side % unit == 0 for bucket in geometry.buckets for side in bucket)
    assert (resolution * unit, resolution * unit) in geometry.buckets


def test_resolution_the_model_cannot_take_is_refused():
    with pytest.raises(ConfigError, match=r"prepare\.resolution: 500 is not a multiple of 32 px"):
        make_geometry(500, use_buckets=True, vae_factor=8, denoiser_factor=4)


def test_sd15_at_512_has_64_pixel_steps():
    assert make_geometry(512, use_buckets=True, vae_factor=8, denoiser_factor=8).step == 64


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(20, 90),
    height=st.integers(20, 90),
    factor=st.sampled_from([1, 1.5, 2]),
)
def test_nothing_depends_on_which_image_won(width, height, factor):
    first = image_bytes(1, (width, height))
    second = image_bytes(2, (round(width * factor), round(height * factor)))
    try:
        one, other = load(first, second, TINY), load(second, first, TINY)
    except UnusableImageError:
        return
    assert one.add_time_ids == other.add_time_ids
    assert torch.equal(one.pixels, other.pixels.flip(0))


@settings(max_examples=25, deadline=None)
@given(width=st.integers(16, 100), height=st.integers(16, 100))
def test_both_images_are_cropped_at_the_same_place(width, height):
    """Equal images stay equal: no crop or flip of one's own."""
    data = image_bytes(3, (width, height))
    pair = load(data, data, TINY)
    assert torch.equal(pair.pixels[0], pair.pixels[1])
    assert pair.pixels.shape[-2:] in TINY.buckets


def test_time_ids_tell_the_true_size_and_crop():
    pair = load(image_bytes(0, (100, 60)), image_bytes(1, (200, 120)), SQUARE)
    height, width = 60, 100  # the smaller image
    left = (round(width * 32 / height) - 32) // 2
    assert pair.add_time_ids == (height, width, 0, left, 32, 32)
    tall = load(image_bytes(0, (60, 100)), image_bytes(1, (60, 100)), SQUARE)
    assert tall.add_time_ids == (100, 60, left, 0, 32, 32)


def test_the_crop_is_where_the_time_ids_say():
    ramp = np.tile(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (32, 1, 3))
    data = encoded(Image.fromarray(ramp))
    pair = load(data, data, SQUARE)
    left = pair.add_time_ids[3]
    assert left == 32
    assert torch.equal(pair.pixels[0], torch.from_numpy(ramp[:, left : left + 32]).permute(2, 0, 1))


def test_sizes_may_differ_but_aspect_ratios_may_not():
    load(image_bytes(0, (512, 512)), image_bytes(1, (768, 768)), TINY)
    load(image_bytes(0, (100, 100)), image_bytes(1, (102, 100)), TINY)
    with pytest.raises(UnusableImageError, match=r"2 %: 100x100 and 103x100"):
        load(image_bytes(0, (100, 100)), image_bytes(1, (103, 100)), TINY)


@settings(deadline=None)
@given(aspect=st.floats(0.3, 3.5))
def test_bucket_is_the_nearest_in_aspect(aspect):
    chosen = SDXL.bucket_for(aspect)
    best = min(abs(math.log(w / h / aspect)) for h, w in SDXL.buckets)
    assert abs(math.log(chosen[1] / chosen[0] / aspect)) == pytest.approx(best)


def test_transparency_is_laid_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255] + [0] * 765)
    assert decode(encoded(palette)).getpixel((0, 0)) == (0, 0, 255)
    assert decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    gray = Image.new("LA", (4, 4), (0, 128))
    assert decode(encoded(gray)).getpixel((0, 0)) == (127, 127, 127)


def test_orientation_and_deep_grays():
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(image, "JPEG", exif=exif)).size == (4, 8)
    deep = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    assert decode(encoded(deep)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("data", [b"", b"not an image", image_bytes(0, encoding="JPEG")[:300]])
def test_broken_bytes_are_unusable_with_a_reason(data):
    with pytest.raises(UnusableImageError, match=r"winner: \w+"):
        load(data, image_bytes(1), TINY)
    with pytest.raises(UnusableImageError, match=r"loser: \w+"):
        load(image_bytes(1), data, TINY)


def test_missing_file_is_unusable(tmp_path):
    with pytest.raises(UnusableImageError, match=r"winner: unreadable: .*gone\.png"):
        load_pair((tmp_path / "gone.png").read_bytes, lambda: image_bytes(1), TINY)


def test_model_range():
    got = to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert got.tolist() == [-1.0, 1.0]
