"""Factors of the noise under flow matching: drawn from counters, with the shift asked for."""

import pytest
import torch

from fastpo.config import parse_config
from fastpo.errors import ConfigError
from fastpo.models.folder import ModelFolder
from fastpo.noise import setup_noise
from fastpo.testing import tiny_sd15_folder
from fastpo.testing.flow import tiny_sd3_folder
from fastpo.types import PairBatch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"sd3": tiny_sd3_folder(root / "sd3"), "sd15": tiny_sd15_folder(root / "sd15")}


@pytest.fixture(scope="module")
def noise(folders):
    """`noise(family, key=value of train)`: the noise source of a run."""

    def source(family="sd3", **train):
        raw = {
            "seed": 5,
            "model": {"path": str(folders[family])},
            "data": {"source": "folder", "path": "unused"},
            "prepare": {"cache_dir": "unused", "resolution": 32},
            "train": {"output_dir": "u", "objective": {"name": "dpo"}, "max_steps": 1} | train,
        }
        config = parse_config(raw)
        return setup_noise(config, ModelFolder.resolve(config.model))

    return source


def pairs(count, visit=0, keys=None):
    latents = torch.zeros(2 * count, 16, 1, 1)
    number = torch.arange(count) if keys is None else keys
    visits = torch.full((count,), visit)
    return PairBatch(number, number, visits, number > count, latents, latents, {})


def sigmas(source, batch):
    noised = source.noised_pair(batch)
    sigma = source.schedule.sigma[noised.index]
    assert (sigma.dtype, noised.timesteps.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(noised.timesteps, 1000.0 * sigma)
    return sigma


@pytest.mark.parametrize(
    ("train", "median"),
    [
        ({"flow_shift": 1.0}, 0.5),
        ({}, 0.75),  # the family's shift of 3
        ({"flow_shift": 9.0}, 0.9),
        ({"timesteps": {"kind": "logit_normal"}}, 0.75),
        ({"timesteps": {"kind": "logit_normal", "mean": 1.0}, "flow_shift": 1.0}, 0.731),
    ],
)
def test_half_of_the_draws_lie_on_each_side_of_the_shifted_middle(noise, train, median):
    drawn = sigmas(noise(**train), pairs(20_000))
    assert float(drawn.median()) == pytest.approx(median, abs=0.01)


def test_a_draw_depends_on_seed_pair_and_visit_alone(noise):
    source = noise(timesteps={"kind": "logit_normal"})
    alone = [sigmas(source, pairs(1, visit=2, keys=torch.tensor([key]))) for key in (7, 3, 11)]
    together = sigmas(source, pairs(3, visit=2, keys=torch.tensor([7, 3, 11])))
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(together, sigmas(source, pairs(3, 3, torch.tensor([7, 3, 11]))))


def test_listed_sigmas_are_the_only_ones(noise):
    source = noise(timesteps={"kind": "sigmas", "values": [0.801, 0.694, 0.548, 1.0]})
    found = sigmas(source, pairs(4000)).unique()
    torch.testing.assert_close(found, torch.tensor([0.548, 0.694, 0.801, 1.0]), atol=1e-3, rtol=0.0)
    assert len(found) == 4


@pytest.mark.parametrize(("train", "most"), [({}, 1.5e-3), ({"flow_shift": 1.0}, 5e-4)])
def test_a_listed_sigma_is_met_within_half_a_place_of_the_schedule(noise, train, most):
    """A shift of 3 sets the places near the image 3 times as far apart as they are unshifted."""
    values = torch.linspace(0.02, 1.0, 9801)
    source = noise(timesteps={"kind": "sigmas", "values": values.tolist()}, **train)
    found = source.table.sigma
    assert 0.9 * most < float((found - values).abs().max()) < 1.05 * most


def test_what_moves_sigma_is_in_the_references_identity(noise):
    plain = noise().identity()
    for other in ({"flow_shift": 2.0}, {"timesteps": {"kind": "sigmas", "values": [0.5]}}):
        assert noise(**other).identity() != plain
    same = [{"kind": "sigmas", "values": [value]} for value in (0.5, 0.5001)]
    assert noise(timesteps=same[0]).identity() == noise(timesteps=same[1]).identity()


@pytest.mark.parametrize(
    ("family", "train", "text"),
    [
        ("sd3", {"snr_gamma": 5.0}, "train.snr_gamma: min-SNR .* flow matching, with which sd3"),
        ("sd3", {"guidance": 3.5}, "train.guidance: sd3 is told no guidance scale, got 3.5"),
        ("sd15", {"guidance": 3.5}, "train.guidance: sd15 is told no guidance scale"),
        ("sd15", {"flow_shift": 3.0}, "train.flow_shift: sd15 is not trained with flow matching"),
        (
            "sd15",
            {"timesteps": {"kind": "sigmas", "values": [0.5]}},
            r"kind: sigmas are factors of the noise .* not trained \(epsilon\)",
        ),
    ],
)
def test_keys_that_mean_nothing_for_a_model_are_refused(noise, family, train, text):
    with pytest.raises(ConfigError, match=text):
        noise(family, **train)
