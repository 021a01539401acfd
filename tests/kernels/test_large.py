"""Offsets and positions at the edge of 32 bits; only the pages that are touched exist."""

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels._shared.dispatch import MAX_ELEMENTS, MAX_TILE
from fastpo_kernels.pair_noise import noised_pair
from fastpo_kernels.testing import pair_inputs

FAR = 2**30


def apart(t, distance=FAR):
    """The same rows, `distance` elements from one to the next."""
    size = (len(t) - 1) * distance + t[0].numel()
    spread = torch.empty(size, dtype=t.dtype, device=t.device)
    return spread.as_strided(t.shape, (distance, *t[0].contiguous().stride())).copy_(t)


@pytest.mark.parametrize("shared", [True, False], ids=["shared target", "separate targets"])
def test_rows_whose_product_with_the_pairs_passes_32_bits(shared, device):
    """Strides fit 32 bits, strides times pairs do not, forward and backward."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory: there every page exists")
    x = pair_inputs(2, (64,), torch.bfloat16, device, shared_target=shared)
    results = []
    for move in (lambda t: t, apart):
        policy = move(x.policy).requires_grad_()
        out = fl.sdpo(policy, move(x.reference), move(x.target), beta=20.0, mu=0.9, impl="triton")
        results.append((*out[:4], torch.autograd.grad(out.loss, policy)[0]))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


@pytest.mark.parametrize("n_elements", [MAX_ELEMENTS + 1, 2**31 - 1, 2**31])
def test_samples_whose_positions_pass_32_bits_are_refused(n_elements, device):
    """Near 2^31 the number of tiles overflowed, and the error of a row came out as 0."""
    wide = torch.ones(1, device=device).expand(2, n_elements)
    with pytest.raises(ValueError, match=f"at most {MAX_ELEMENTS} .* got 1 of {n_elements}"):
        fl.sft(wide, wide[:1], impl="triton")
    key, table = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(5, device=device)
    with pytest.raises(ValueError, match=f"at most {MAX_ELEMENTS} .* got {n_elements}"):
        noised_pair(wide, key, key, table, table, seed=0, low=0, high=5, impl="triton")


def test_the_last_tile_of_the_largest_sample_fits_32_bits():
    from fastpo_kernels.pair_loss.gpu import launch

    tiles = -(-MAX_ELEMENTS // MAX_TILE)
    assert MAX_ELEMENTS + MAX_TILE - 1 < 2**31 and tiles * MAX_TILE < 2**31
    with pytest.raises(AssertionError, match="32 bits"):
        launch.LaunchConfig(2 * MAX_TILE, 1, 4)
