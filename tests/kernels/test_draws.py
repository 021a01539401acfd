"""The kernels' draws: integers are the reference's bit for bit, normals within their rounding.

Bits of normals are equal between kernels but not to the reference's, whose logarithm, sine and
cosine are the CPU's.
"""

import math

import pytest
import torch
import triton
import triton.language as tl

from fastpo_kernels._shared.philox_triton import normals, words
from fastpo_kernels.pair_noise import Stream, noised_pair, pair_bits, pair_normal

SEED = 2**32 - 1
COUNT = 1000  # of a pair's numbers that are compared; a tile holds 1024


@triton.jit(do_not_specialize=["seed"])
def draws_kernel(
    words_ptr,  # [B, 1024] int32
    normals_ptr,  # [B, 1024]
    pair_key_ptr,  # [B]
    visit_ptr,  # [B]
    seed,
    STREAM: tl.constexpr,
):
    """The first 1024 words of a pair and the normals made of them."""
    pair = tl.program_id(0)
    pair_key, visit = tl.load(pair_key_ptr + pair), tl.load(visit_ptr + pair)
    block = tl.arange(0, 256)
    w0, w1, w2, w3 = words(block, pair_key, visit, seed, STREAM)
    at = words_ptr + pair * 1024 + 4 * block
    tl.store(at, w0.to(tl.int32, bitcast=True))
    tl.store(at + 1, w1.to(tl.int32, bitcast=True))
    tl.store(at + 2, w2.to(tl.int32, bitcast=True))
    tl.store(at + 3, w3.to(tl.int32, bitcast=True))
    made = normals(0, pair_key, visit, seed, STREAM, 1024)
    tl.store(normals_ptr + pair * 1024 + tl.arange(0, 1024), made)


def drawn(device, stream=Stream.NOISE):
    """Keys and visits that need all their bits, and a kernel's words and normals for them."""
    keys = torch.tensor([5, 2**62 + 3, 2**31 + 1, 2**63 - 1], device=device)
    visits = torch.tensor([0, 7, 2**32 - 1, 2**31], device=device)
    found = torch.empty(4, 1024, dtype=torch.int32, device=device)
    made = torch.empty(4, 1024, device=device)
    draws_kernel[(4,)](found, made, keys, visits, SEED, STREAM=int(stream), num_warps=4)
    return keys, visits, found, made


@pytest.mark.parametrize("stream", list(Stream), ids=lambda s: s.name)
def test_words_are_the_references_bit_for_bit(stream, device):
    keys, visits, found, _ = drawn(device, stream)
    expected = pair_bits(keys, visits, 256, seed=SEED, stream=stream)
    assert torch.equal(found.long() & 0xFFFFFFFF, expected)


def test_normals_are_the_words_transformed_within_their_rounding(device):
    """In units of 2^-23: the radius errs by 1 of itself (root) and half (logarithm), the angle's
    sine and cosine by at most 1, and the product is rounded by half of itself.
    """
    keys, visits, found, made = drawn(device)
    exact = pair_normal(keys, visits, (1024,), seed=SEED, dtype=torch.float64)
    word = (found.long() & 0xFFFFFFFF) >> 8
    radius = torch.sqrt(-2 * torch.log((word.double() + 1) * 2.0**-24)).view(4, 512, 2)[..., :1]
    radius = radius.expand(4, 512, 2).reshape(4, 1024)
    error = (made.double() - exact).abs() / (2.0**-23 * (radius + 2 * exact.abs()))
    assert radius.max() <= math.sqrt(48 * math.log(2)) and error.max() < 1, error.max()


def test_a_draw_is_the_same_bits_in_every_kernel(device):
    """Also where it is stored in another order, or is the noise of latents and not the target."""
    keys, visits, _, made = drawn(device)
    table = torch.ones(10, device=device)
    calls = (("epsilon", torch.float32), ("flow", torch.bfloat16), ("v_prediction", torch.float16))
    for prediction, dtype in calls:
        out = noised_pair(
            torch.zeros(8, COUNT, device=device, dtype=dtype), keys, visits, table, table,
            seed=SEED, low=0, high=10, prediction=prediction, impl="triton",
        )  # fmt: skip
        assert torch.equal(out.target[:4], made[:, :COUNT]), prediction
        assert torch.equal(out.noisy_latents[4:], made[:, :COUNT])
