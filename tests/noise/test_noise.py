"""Shared timesteps and noise: what diffusers' scheduler says, and what the pair shares."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import TypeAdapter

from fastpo.config.timesteps import TimestepsConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.schedule import ddpm_schedule
from fastpo.noise import make_noise
from fastpo.types import PairBatch

TIMESTEPS = TypeAdapter(TimestepsConfig)


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
        conditions={"prompt_embeds": torch.zeros(pairs, 1, 1)},
    )


def noise(prediction_type="epsilon", **options):
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
    defaults = dict(seed=0, min_timestep=0, max_timestep=None, sample_latents=False)
    return make_noise(ddpm_schedule(scheduler, {"scaling_factor": 0.5}), **(defaults | options))


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
    signal = noise().schedule.signal[mean.index].repeat(2)[:, None, None, None]
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


def drawn(kind, pairs=20000, **options):
    """Shares of the 100 timesteps among many draws."""
    config = TIMESTEPS.validate_python(kind)
    steps = noise(timesteps=config, **options).noised_pair(small_batch(pairs)).timesteps
    return torch.bincount(steps, minlength=100).double() / pairs


def small_batch(pairs):
    key = torch.arange(pairs)
    mean = torch.zeros(2 * pairs, 1)
    return PairBatch(key, key, 0 * key, key > 0, mean, mean, conditions={})


def test_listed_timesteps_are_drawn_as_often_as_they_are_listed():
    shares = drawn({"kind": "list", "values": [24, 49, 74, 99, 99]})
    assert shares[[24, 49, 74, 99]].sum() == 1.0
    torch.testing.assert_close(
        shares[[24, 49, 74, 99]], torch.tensor([0.2, 0.2, 0.2, 0.4]).double(), atol=0.02, rtol=0
    )


def test_a_logit_normal_draw_follows_its_distribution_within_the_range():
    """P(t < low + k) = Phi((logit(k / span) - mean) / std)."""
    kind = {"kind": "logit_normal", "mean": 0.5, "std": 0.8}
    got = drawn(kind, min_timestep=20, max_timestep=60).cumsum(0)
    edge = torch.arange(1, 40) / 40.0
    expected = torch.special.ndtr((torch.logit(edge.double()) - 0.5) / 0.8)
    assert got[19] == 0.0
    assert got[59].item() == pytest.approx(1.0)
    torch.testing.assert_close(got[20:59], expected, atol=0.015, rtol=0)


def test_bins_are_drawn_in_proportion_to_their_weights():
    shares = drawn({"kind": "bins", "weights": [1, 0, 3, 0]}).reshape(4, 25)
    torch.testing.assert_close(
        shares.sum(1), torch.tensor([0.25, 0.0, 0.75, 0.0]).double(), atol=0.02, rtol=0
    )
    assert (shares[0] > 0.005).all()
    assert (shares[2] > 0.02).all()


def test_equal_bins_are_the_uniform_draw_and_leave_the_noise_alone():
    kind = TIMESTEPS.validate_python({"kind": "bins", "weights": [2.0, 2.0]})
    plain, table = (noise(timesteps=t).noised_pair(batch(64)) for t in (None, kind))
    assert (plain.timesteps - table.timesteps).abs().max() <= 1
    assert torch.equal(plain.target, table.target)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_table_gives_what_the_scheduler_says_at_its_timesteps(prediction):
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction)
    kind = TIMESTEPS.validate_python({"kind": "list", "values": [99, 7]})
    pairs = batch(8)
    noised = noise(prediction, timesteps=kind).noised_pair(pairs)
    shared = noise("epsilon", timesteps=kind).noised_pair(pairs).target.repeat(2, 1, 1, 1)
    steps = noised.timesteps.repeat(2)
    assert set(steps.tolist()) == {99, 7}
    latents = 0.5 * pairs.latent_mean
    torch.testing.assert_close(noised.noisy_latents, scheduler.add_noise(latents, shared, steps))
    if prediction == "v_prediction":
        torch.testing.assert_close(noised.target, scheduler.get_velocity(latents, shared, steps))


def test_the_kernel_draws_from_a_table_what_the_reference_draws(monkeypatch):
    from functools import partial

    import fastpo.noise.pair_noise as module

    kind = TIMESTEPS.validate_python({"kind": "logit_normal"})
    source, pairs = noise(timesteps=kind), batch(5)
    expected = source.noised_pair(pairs)
    triton = partial(module.noised_pair, impl="triton")
    monkeypatch.setattr(module, "noised_pair", triton)
    pairs = replace(pairs, latent_mean=pairs.latent_mean.contiguous())
    got = source.noised_pair(pairs)
    assert torch.equal(got.timesteps, expected.timesteps)
    torch.testing.assert_close(got.noisy_latents, expected.noisy_latents)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper_and_finite_without_signal(kind):
    """Against diffusers' `compute_snr`; a schedule that ends without signal stays finite."""
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=kind)
    steps = torch.arange(100)
    snr = compute_snr(scheduler, steps)
    expected = snr.clamp(max=5.0) / (snr if kind == "epsilon" else snr + 1.0)
    torch.testing.assert_close(noise(kind).snr_weight(steps, 5.0), expected)
    zero = DDPMScheduler(100, prediction_type=kind, rescale_betas_zero_snr=True)
    source = replace(noise(kind), schedule=ddpm_schedule(zero, {}))
    end = source.snr_weight(steps, 5.0)[-1]
    assert end == pytest.approx(1.0 if kind == "epsilon" else 0.0, abs=1e-6)


OTHER_DRAWS = [
    {"seed": 1},
    {"min_timestep": 1},
    {"max_timestep": 99},
    {"sample_latents": True},
    {"timesteps": {"kind": "list", "values": [3]}},
    {"timesteps": {"kind": "list", "values": [4]}},
    {"timesteps": {"kind": "logit_normal"}},
]


@pytest.mark.parametrize("changes", OTHER_DRAWS, ids=str)
def test_the_identity_names_what_differs(changes):
    if "timesteps" in changes:
        changes = {"timesteps": TIMESTEPS.validate_python(changes["timesteps"])}
    same, other = noise().identity(), noise(**changes).identity()
    assert noise().identity() == same
    differing = [key for key in same if same[key] != other[key]]
    assert len(differing) == 1
    assert next(iter(changes)) in differing[0]


def test_the_identity_sees_the_schedule_and_the_scale():
    same = noise().identity()
    assert noise("v_prediction").identity()["prediction_type"] != same["prediction_type"]
    linear = DDPMScheduler(num_train_timesteps=100, beta_end=0.03)
    options = dict(seed=0, min_timestep=0, max_timestep=None, sample_latents=False)
    other = make_noise(ddpm_schedule(linear, {"scaling_factor": 0.25}), **options).identity()
    assert other["schedule"] != same["schedule"]
    assert other["vae.scaling_factor"] != same["vae.scaling_factor"]


def test_a_listed_timestep_beyond_the_schedule_is_refused():
    kind = TIMESTEPS.validate_python({"kind": "list", "values": [99, 100]})
    with pytest.raises(ConfigError, match=r"train\.timesteps\.values must lie below 100.*got 100"):
        noise(timesteps=kind)
