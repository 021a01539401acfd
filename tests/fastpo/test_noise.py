"""Shared timesteps and noise: what diffusers' scheduler says, and what the pair shares."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from fastpo.errors import ConfigError, ModelError
from fastpo.noise import make_noise
from fastpo.types import PairBatch


def batch(pairs=3, first=0, visit=0):
    key = torch.arange(first, first + pairs)
    rows = torch.cat((key, key + 100)).float()[:, None, None, None]
    mean = rows.expand(-1, 4, 6, 4) * 0.01
    return PairBatch(
        index=key,
        pair_key=key,
        visit=torch.full((pairs,), visit),
        flipped=torch.zeros(pairs, dtype=torch.bool),
        latent_mean=mean,
        latent_logvar=torch.zeros_like(mean),
        prompt_embeds=torch.zeros(pairs, 1, 1),
        pooled_prompt_embeds=None,
        add_time_ids=None,
    )


def noise(prediction_type="epsilon", **options):
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
    defaults = dict(seed=0, min_timestep=0, max_timestep=None, sample_latents=False)
    return make_noise(scheduler, {"scaling_factor": 0.5}, **(defaults | options))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noisy_latents_and_target_are_what_the_scheduler_says(kind):
    """One noise serves both sides; diffusers' own scheduler, given it, agrees."""
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=kind)
    pairs, noised = batch(), noise(kind).noised_pair(batch())
    drawn = noise("epsilon").noised_pair(pairs).target
    both, steps, latents = (
        drawn.repeat(2, 1, 1, 1),
        noised.timesteps.repeat(2),
        0.5 * pairs.latent_mean,
    )
    torch.testing.assert_close(noised.noisy_latents, scheduler.add_noise(latents, both, steps))
    if kind == "epsilon":
        assert noised.target.shape == (3, 4, 6, 4)
    else:
        torch.testing.assert_close(noised.target, scheduler.get_velocity(latents, both, steps))


def test_a_pair_gets_the_same_draw_in_any_batch():
    source = noise(sample_latents=True)
    together, alone = source.noised_pair(batch(3)), source.noised_pair(batch(1, first=1))
    assert torch.equal(together.noisy_latents[[1, 4]], alone.noisy_latents)
    assert torch.equal(together.timesteps[1:2], alone.timesteps)


def test_every_visit_and_every_pair_draws_anew():
    source = noise()
    first, second = source.noised_pair(batch(64)), source.noised_pair(batch(64, visit=1))
    assert (first.timesteps == second.timesteps).float().mean() < 0.1
    assert (first.target == second.target).float().mean() < 0.01
    assert not torch.equal(first.target[0], first.target[1])


def test_the_posterior_is_sampled_independently_for_the_two_sides():
    pairs = batch(8)
    sampled, mean = (noise(sample_latents=s).noised_pair(pairs) for s in (True, False))
    signal = noise().signal[mean.timesteps].repeat(2)[:, None, None, None]
    drawn = (sampled.noisy_latents - mean.noisy_latents) / (0.5 * signal)
    winner, loser = drawn.chunk(2)
    assert abs(drawn.std().item() - 1) < 0.05
    assert abs((winner * loser).mean().item()) < 0.1
    tight = replace(pairs, latent_logvar=torch.full_like(pairs.latent_mean, -60.0))
    torch.testing.assert_close(
        noise(sample_latents=True).noised_pair(tight).noisy_latents, mean.noisy_latents
    )


def test_timesteps_stay_in_their_range():
    t = noise(min_timestep=20, max_timestep=30).noised_pair(batch(500)).timesteps
    assert (t.min().item(), t.max().item()) == (20, 29)


def test_captions_are_dropped_at_their_rate():
    dropped = noise().empty_prompts(batch(4000), 0.2)
    assert abs(dropped.float().mean().item() - 0.2) < 0.03


def test_bad_schedules_are_named():
    with pytest.raises(ModelError, match=r"prediction_type.*'sample'"):
        noise("sample")
    with pytest.raises(ConfigError, match=r"seed must be below 2\^32"):
        noise(seed=2**32)
    with pytest.raises(ConfigError, match=r"schedule's length.*got 0 and 101"):
        noise(max_timestep=101)
