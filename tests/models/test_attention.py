"""The attention asked for is the one that runs, or is refused with a way out."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpo.models.attention
from fastpo.errors import ConfigError
from fastpo.models.attention import check_attention, head_sizes, use_processors
from fastpo.models.unet import load_unet


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def unet(request, tiny_pipelines):
    return load_unet(tiny_pipelines[request.param])


class Attentions(TorchDispatchMode):
    """Notes for each fused attention whether torch might have run the plain one instead."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.seen.append((str(func), torch.backends.cuda.math_sdp_enabled()))
        return func(*args, **(kwargs or {}))


def attentions(unet, dtype=torch.float32):
    width = unet.config.cross_attention_dim
    added = {"text_embeds": torch.zeros(1, 20), "time_ids": torch.zeros(1, 6)}
    with Attentions() as mode, torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, width), added_cond_kwargs=added)
    return mode.seen


def test_flash_runs_the_flash_kernel_and_nothing_else(unet):
    plain = attentions(unet)
    assert len(plain) == 8  # blocks: one down, one in the middle, two up; two attentions each
    assert all(may_fall_back for _, may_fall_back in plain)
    before = unet.attn_processors
    use_processors(unet, "flash")
    try:
        flash = attentions(unet)
    finally:
        unet.set_attn_processor(before)
    assert len(flash) == len(plain)
    assert all("flash" in name and not may_fall_back for name, may_fall_back in flash)


def test_what_runs_here_passes_the_check(unet):
    assert head_sizes(unet) == {3}  # 24 features in 8 heads
    for name in ("sdpa", "flash"):
        check_attention(unet, name, device="cpu", dtype=torch.float32)


def test_a_kernel_that_torch_does_not_have_is_refused_with_torchs_reason(unet, monkeypatch):
    def no_kernel(*args):
        warnings.warn("Expected query to have dtype Half or BFloat16", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(fastpo.models.attention, "scaled_dot_product_attention", no_kernel)
    with pytest.raises(
        ConfigError,
        match=r"train\.attention: flash does not run on cpu in torch\.float32 with heads of 3 "
        r"\(No available kernel.*dtype Half.*train\.precision: bf16.*train\.attention: sdpa",
    ):
        check_attention(unet, "flash", device="cpu", dtype=torch.float32)


def test_xformers_that_cannot_run_is_refused_with_a_way_out(unet):
    if torch.cuda.is_available():
        pytest.skip("xformers may well work here")
    with pytest.raises(ConfigError, match=r"fastpo\[xformers\].*train\.attention: sdpa"):
        check_attention(unet, "xformers", device="cpu", dtype=torch.float32)
