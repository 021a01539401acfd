"""Counter-based noise: known answers, moments, and independence from the batch's make-up."""

import pytest
import torch

from fastpo_kernels.pair_noise import Stream, pair_bits, pair_integers, pair_normal, philox

# The known-answer vectors that Random123 publishes for philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(counter, key)) == expected


def _pairs(*keys, visit=0):
    return torch.tensor(keys), torch.full((len(keys),), visit)


def test_a_pairs_noise_does_not_depend_on_its_neighbors():
    together = pair_normal(*_pairs(5, 2**62 + 1, 9), (4, 8, 8), seed=3)
    alone = pair_normal(*_pairs(2**62 + 1), (4, 8, 8), seed=3)
    assert torch.equal(together[1:2], alone)


def test_a_prefix_of_the_elements_is_the_same_draw():
    long = pair_normal(*_pairs(7), (1001,), seed=1)
    short = pair_normal(*_pairs(7), (13,), seed=1)
    assert torch.equal(long[:, :13], short)


@pytest.mark.parametrize(
    "other",
    [
        dict(seed=1),
        dict(visit=1),
        dict(key=12),
        dict(key=11 + 2**32),
        dict(stream=Stream.POSTERIOR_WINNER),
    ],
)
def test_every_part_of_the_counter_changes_the_draw(other):
    def draw(key=11, visit=0, seed=0, stream=Stream.NOISE):
        return pair_bits(*_pairs(key, visit=visit), 64, seed=seed, stream=stream)

    assert (draw() == draw(**other)).float().mean() < 0.02


def test_normals_have_the_moments_of_a_normal():
    x = pair_normal(*_pairs(*range(16)), (4, 64, 64), seed=0, dtype=torch.float64)
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert x.abs().max() < 5.78
    neighbors = (x.flatten()[:-1] * x.flatten()[1:]).mean()
    assert abs(neighbors) < 4 / n**0.5


def test_integers_cover_the_range_evenly():
    key, visit = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    t = pair_integers(key, visit, low=10, high=20, seed=0, stream=Stream.TIMESTEP)
    counts = torch.bincount(t, minlength=20)
    assert counts[:10].sum() == 0
    assert counts.shape == (20,)
    assert (counts[10:] - 2000).abs().max() < 4 * (20_000 * 0.1 * 0.9) ** 0.5


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="seed must lie"):
        pair_bits(*_pairs(1), 1, seed=2**32)
    with pytest.raises(ValueError, match="one length"):
        pair_bits(torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 1, seed=0)
