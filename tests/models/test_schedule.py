"""Schedules against diffusers' own schedulers; places against what the denoiser is told."""

from dataclasses import replace

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from fastpo.errors import ModelError
from fastpo.models.folder import ModelFolder
from fastpo.models.schedule import ddpm_schedule, flow_schedule, read_ddpm_schedule
from fastpo.noise import make_noise

OPTIONS = {"seed": 0, "min_timestep": 0, "max_timestep": None, "sample_latents": False}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_noises_as_diffusers_does(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = flow_schedule(scheduler)
    assert len(schedule) == 1000
    assert schedule.timesteps.dtype == torch.float32
    assert (schedule.sigma.diff() > 0).all(), "from nearly clean to noise"
    g = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 5, 4, 2, 2, generator=g)
    places = torch.tensor([0, 1, 499, 998, 999])
    expected = scheduler.scale_noise(image, schedule.timesteps[places], noise)
    signal, sigma = (t[places].view(-1, 1, 1, 1) for t in (schedule.signal, schedule.sigma))
    torch.testing.assert_close(signal * image + sigma * noise, expected)


def test_a_diffusion_model_is_told_its_place(tiny_pipelines):
    schedule = read_ddpm_schedule(ModelFolder(tiny_pipelines["sdxl"]))
    assert schedule.tells_places
    assert schedule.latent_scale == 0.13025
    told = replace(schedule, timesteps=schedule.timesteps.float())
    assert not told.tells_places
    assert not replace(schedule, timesteps=schedule.timesteps.flip(0)).tells_places


def test_what_the_denoiser_is_told_decides_reference_errors():
    """Where it is the place, the identity is what it was before anything else could be told."""
    plain = ddpm_schedule(DDPMScheduler(100), {})
    half = replace(plain, timesteps=0.5 * plain.timesteps)
    before, after = (make_noise(s, **OPTIONS).identity() for s in (plain, half))
    assert {key for key in before if before[key] != after[key]} == {"schedule"}


def test_a_sampler_that_predicts_the_image_is_refused():
    with pytest.raises(ModelError, match=r"must be 'epsilon' or 'v_prediction', got 'sample'"):
        ddpm_schedule(DDPMScheduler(100, prediction_type="sample"), {})


def test_min_snr_under_flow_matching_weighs_errors_of_the_image():
    """An error d of `noise - x` is one of `sigma d` of the image."""
    schedule = flow_schedule(FlowMatchEulerDiscreteScheduler())
    weight = make_noise(schedule, **OPTIONS).snr_weight(torch.arange(1000), 5.0)
    snr = ((1 - schedule.sigma) / schedule.sigma).square()
    torch.testing.assert_close(weight / schedule.sigma.square(), snr.clamp(max=5.0))
    assert weight.max() <= 1.0
    assert weight[-1] == 0.0
