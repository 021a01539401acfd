"""Every family against diffusers' own pipeline, see `family_cases`."""

import pytest
import torch

from fastpo.models.edits import source_condition
from fastpo.testing.edits import small_sources
from fastpo.types import NoisedPair
from tests.models.family_cases import CASES, EDITING, PROMPTS, Stock, source_image


def only(cases):
    """Runs a test with some of the cases, each beside the other tests of its pipeline."""
    return pytest.mark.parametrize("stock", cases, indirect=True, ids=lambda case: case.name)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def stock(request, tmp_path_factory):
    with small_sources():
        yield Stock(request.param, tmp_path_factory.mktemp(request.param.name))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def answers(stock):
    """Noisy pairs near noise, and what the pipeline's scheduler received for each side."""
    place, winners, losers = 900, stock.draw(1), stock.draw(2)
    sides = [stock.step(latents, place) for latents in (winners, losers)]
    for side, latents in zip(sides, (winners, losers), strict=True):
        close(side.sample, latents)
    noised = stock.noised(winners, losers, place)
    return noised, torch.cat([side.output for side in sides])


def test_predictions_are_those_of_the_pipeline(stock, answers):
    """Sign, scale of the time, packing, ids, masks, guidance and padding, all in one equality."""
    noised, expected = answers
    with torch.no_grad():
        found = stock.family.predict(stock.denoiser.eval(), noised, stock.conditions())
    close(found, expected)
    assert expected.std() > 1e-3, "an answer of nothing would equal anything"


def test_they_are_also_near_the_image(stock):
    place, latents = 40, stock.draw(3)
    noised = stock.noised(latents, latents.flip(0), place)
    with torch.no_grad():
        found = stock.family.predict(stock.denoiser.eval(), noised, stock.conditions())
    close(found[:2], stock.step(latents, place).output)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_and_checkpointing_change_nothing(stock, answers, checkpointing):
    noised, expected = answers
    denoiser = stock.denoiser.train().requires_grad_(True)
    plain = stock.family.predict(denoiser, noised, stock.conditions()).detach()
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        found = stock.family.predict(denoiser, noised, stock.conditions())
        close(found, expected)
        assert torch.equal(found, plain), "cached errors are made without checkpointing"
        found.square().mean().backward()
    finally:
        denoiser.disable_gradient_checkpointing()
        denoiser.eval()
    gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0.0
    denoiser.zero_grad(set_to_none=True)


def test_prompts_matter_each_for_its_own_pair(stock, answers):
    noised, expected = answers
    with torch.no_grad():
        swapped = stock.family.predict(stock.denoiser, noised, stock.conditions(PROMPTS[::-1]))
    assert (swapped - expected).abs().amax(dim=(1, 2, 3)).min() > 1e-5


def leaves(tensors):
    """Copies of what is real among them that ask for gradients."""
    real = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {name: tensor.clone().requires_grad_() for name, tensor in real.items()}


def test_no_operation_mixes_rows(stock):
    """The winner's and the loser's row of two pairs, at unlike places and with unlike prompts.

    A row's prediction has a gradient of exactly zero for all other rows' latents and for the other
    pair's conditions. A pair's gradient for the weights is that of the pair alone, each
    parameter's to 1e-4 of its norm and 1e-6 of the norm of all: a key's bias has none but rounding.
    """
    denoiser = stock.denoiser.train().requires_grad_(True)
    weights, conditions = list(denoiser.parameters()), stock.conditions()
    place = torch.tensor([300, 900])

    def predicted(latents, pairs, conditions):
        times = stock.schedule.timesteps[place[pairs]]
        noised = NoisedPair(latents, place[pairs], times, latents)
        return stock.family.predict(denoiser, noised, conditions)

    given = leaves({"latents": torch.cat((stock.draw(1), stock.draw(2)))} | conditions)
    together = predicted(given["latents"], slice(0, 2), conditions | given)
    weigh = torch.randn(together.shape, generator=torch.Generator().manual_seed(6))
    rows = (together * weigh).flatten(1).sum(1)
    for row in range(4):
        found = torch.autograd.grad(rows[row], list(given.values()), retain_graph=True)
        for (name, tensor), gradient in zip(given.items(), found, strict=True):
            own = torch.arange(len(tensor)) == row % len(tensor)
            assert gradient[own].any(), name
            assert not gradient[~own].any(), name
    for pair in range(2):
        alone = {name: tensor[pair : pair + 1] for name, tensor in conditions.items()}
        prediction = predicted(given["latents"].detach()[pair::2], slice(pair, pair + 1), alone)
        close(together[pair::2], prediction)
        found, expected = (
            torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            for value in (rows[pair::2].sum(), (prediction * weigh[pair::2]).sum())
        )
        assert [g is None for g in found] == [g is None for g in expected]
        both = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
        whole = torch.stack([e.norm() for _, e in both]).norm()
        assert all((f - e).norm() <= 1e-4 * e.norm() + 1e-6 * whole for f, e in both)
    denoiser.eval()


@only(EDITING)
def test_sources_matter_each_for_its_own_pair(stock, answers):
    noised, expected = answers
    for place in range(stock.case.together):
        conditions = stock.conditions()
        name = source_condition(place)
        conditions[name] = conditions[name].flip(0)
        with torch.no_grad():
            swapped = stock.family.predict(stock.denoiser, noised, conditions)
        assert (swapped - expected).abs().amax(dim=(1, 2, 3)).min() > 1e-5


@only([case for case in CASES if case.together > 1])
def test_sources_keep_their_order(stock, answers):
    noised, expected = answers
    turned = stock.conditions()
    names = [source_condition(place) for place in range(2)]
    assert turned[names[0]].shape != turned[names[1]].shape
    turned |= {names[0]: turned[names[1]], names[1]: turned[names[0]]}
    with torch.no_grad():
        found = stock.family.predict(stock.denoiser, noised, turned)
    assert (found - expected).abs().amax(dim=(1, 2, 3)).min() > 1e-5
    if stock.case.seen:
        first, second = (
            stock.encoders.encode_edit(PROMPTS[0], images)["prompt_embeds"]
            for images in (stock.sources[0], stock.sources[0][::-1])
        )
        assert not torch.equal(first, second)


class GivenError(Exception):
    pass


@only([case for case in EDITING if case.together == 1])
@pytest.mark.parametrize("size", [(90, 70), (70, 90), (64, 64), (320, 65), (130, 68)])
def test_a_source_gets_the_size_and_pixels_that_the_pipeline_gives_it(stock, size, monkeypatch):
    def given(image):
        raise GivenError(image)

    image = source_image(7, size)
    monkeypatch.setattr(stock.pipeline, "_encode_vae_image", lambda image, generator: given(image))
    with pytest.raises(GivenError) as caught, torch.no_grad():
        stock.pipeline(
            prompt="a cat",
            num_inference_steps=1,
            **stock.family.edit_arguments([image], *stock.case.size),
        )
    pixels = caught.value.args[0]
    assert torch.equal(stock.encoders.source_pixels(image), pixels.squeeze(2)[0])
    assert pixels.shape[-2:] != stock.case.size


@only([case for case in CASES if not case.seen])
def test_a_prompt_beside_a_longer_one_is_encoded_as_alone(stock):
    both = stock.encoders.encode_prompts(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for name, alone in stock.encoders.encode_prompts([prompt]).items():
            close(both[name][row : row + 1], alone)


def test_latents_are_what_the_pipeline_decodes(stock):
    """`vae.decode(vae.encode(image))`, by way of our latents and the pipeline's last lines."""
    height, width = stock.case.size
    g = torch.Generator().manual_seed(4)
    pixels = torch.rand(2, 3, height, width, generator=g) * 2 - 1
    mean, _ = stock.encoders.encode_images(pixels)
    schedule, vae = stock.schedule, stock.encoders.vae
    latents = (mean - schedule.latent_shift) * schedule.latent_scale
    with torch.no_grad():
        frames = "temperal_downsample" in vae.config  # Qwen-Image's encodes videos
        encoded = vae.encode(pixels.unsqueeze(2) if frames else pixels)
        # Sana's VAE is no distribution.
        there = encoded.latent if "latent" in encoded else encoded.latent_dist.mode()
        decoded = vae.decode(there).sample
        expected = ((decoded.squeeze(2) if frames else decoded) / 2 + 0.5).clamp(0, 1)
    close(stock.step(stock.draw(5), 500, end=latents).image, expected)
    assert expected.std() > 1e-3
