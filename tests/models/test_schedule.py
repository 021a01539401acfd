"""Schedules against diffusers' own schedulers; places against what the denoiser is told."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from fastpo.errors import ModelError
from fastpo.models.folder import ModelFolder
from fastpo.models.schedule import ddpm_schedule, flow_schedule, read_ddpm_schedule, with_shift
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


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_shift_by_the_resolution_is_the_pipelines(tokens):
    """As FLUX.1 calls its scheduler, with as many sampling steps as the schedule has places."""
    options = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = FlowMatchEulerDiscreteScheduler(**options, shift_terminal=0.02)
    found = flow_schedule(scheduler, tokens=tokens)
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 1000, 1000), mu=mu)
    torch.testing.assert_close(found.sigma, scheduler.sigmas[:-1].flip(0))
    torch.testing.assert_close(found.timesteps, scheduler.timesteps.flip(0))
    assert float(found.sigma[0]) == pytest.approx(0.02, abs=1e-6)


def test_another_shift_takes_the_place_of_the_models_own():
    own = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    backward = replace(own, timesteps=1.0 - own.sigma)
    for shift in (1.0, 5.0):
        expected = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=shift))
        torch.testing.assert_close(with_shift(own, shift).sigma, expected.sigma)
        torch.testing.assert_close(with_shift(own, shift).timesteps, expected.timesteps)
        torch.testing.assert_close(with_shift(own, shift).signal, 1.0 - expected.sigma)
        told = with_shift(backward, shift).timesteps
        assert told.dtype == torch.float32
        torch.testing.assert_close(told, 1.0 - expected.sigma)
