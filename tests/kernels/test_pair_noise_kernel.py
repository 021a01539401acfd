"""The noise kernel against the plain PyTorch draws."""

import pytest
import torch

from fastpo_kernels.pair_noise import Stream, noised_pair, ops, pair_integers, pair_normal
from fastpo_kernels.testing import DTYPES

STEPS = torch.linspace(0.99, 0.005, 1000)
PREDICTIONS = ("epsilon", "v_prediction", "flow")


def inputs(device, dims=(4, 9, 11), dtype=torch.float32):
    """Three pairs with keys that need all 63 bits."""
    torch.manual_seed(0)
    keys = torch.tensor([5, 2**62 + 3, 2**31 + 1], device=device)
    visits = torch.tensor([0, 7, 2**32 - 1], device=device)
    latents, logvar = torch.randn(6, *dims), torch.randn(6, *dims) - 3
    tables = STEPS.sqrt().to(device), (1 - STEPS).sqrt().to(device)
    return [latents.to(device, dtype), keys, visits, *tables], logvar.to(device, dtype)


# The reference rounds the angle (up to 2 pi) to float32; the radius (up to 5.8) multiplies that.
TOLERANCE = {"rtol": 2e-6, "atol": 4e-6}


def call(arguments, impl="triton", **options):
    options = {"seed": 2**32 - 1, "low": 10, "high": 990, **options}
    return noised_pair(*arguments, impl=impl, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("posterior", [False, True], ids=["mean", "drawn"])
def test_equals_the_reference(prediction, posterior, dtype, device):
    arguments, logvar = inputs(device, dtype=dtype)
    options = {"prediction": prediction, "logvar": logvar if posterior else None}
    options |= {"shift": 0.1, "scale": 0.13}
    actual, expected = call(arguments, **options), call(arguments, "reference", **options)
    assert torch.equal(actual.timesteps, expected.timesteps)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize("size", [1, 7, 1000, 4097, pytest.param(65537, marks=pytest.mark.long)])
def test_noise_is_the_pairs_own(size, device):
    arguments, _ = inputs(device, (size,))
    out = call(arguments)
    expected = pair_normal(*arguments[1:3], (size,), seed=2**32 - 1)
    torch.testing.assert_close(out.target, expected, **TOLERANCE)
    steps = pair_integers(*arguments[1:3], low=10, high=990, seed=2**32 - 1, stream=Stream.TIMESTEP)
    assert torch.equal(out.timesteps, steps)


def test_sides_share_noise_and_timestep(device):
    arguments, _ = inputs(device)
    arguments[0] = arguments[0][:3].repeat(2, 1, 1, 1)
    winner, loser = call(arguments).noisy_latents.chunk(2)
    assert torch.equal(winner, loser)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_noisy_latents_in_half_precision(dtype, device):
    arguments, _ = inputs(device)
    out, full = call(arguments, dtype=dtype), call(arguments)
    assert out.noisy_latents.dtype == dtype and out.target.dtype == torch.float32
    error = (out.noisy_latents.double() - full.noisy_latents.double()).abs()
    # One unit in the last place: the interpreter truncates where a GPU rounds.
    assert (error <= torch.finfo(dtype).eps * full.noisy_latents.double().abs() + 1e-7).all()


def test_rerun_is_bitwise_equal_and_reads_nothing_unset(device, nan_poisoned):
    arguments, logvar = inputs(device)
    first, again = call(arguments, logvar=logvar), call(arguments, logvar=logvar)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b) and torch.isfinite(a.double()).all()


STRIDED = {
    "channels-last": lambda t: t.to(memory_format=torch.channels_last),
    "sliced": lambda t: t[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_latents_are_read_as_they_are(layout, device):
    arguments, logvar = inputs(device, (4, 6, 10))
    latents = STRIDED[layout](arguments[0])
    logvar = logvar[:, :, : latents.shape[2], : latents.shape[3]]
    arguments[0], options = latents, {"logvar": logvar, "prediction": "flow"}
    actual = call(arguments, **options)
    arguments[0], options["logvar"] = latents.contiguous(), logvar.contiguous()
    expected = call(arguments, **options)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    if layout == "channels-last":
        assert actual.noisy_latents.stride() == latents.stride() == actual.target.stride()


def test_operator_passes_opcheck(device):
    arguments, logvar = inputs(device, (40,))
    latents, *rest = arguments
    for prediction, drawn in (("epsilon", None), ("flow", logvar)):
        options = (prediction, 3, 0, 1000, 0.0, 1.0, torch.float32)
        torch.library.opcheck(ops.noised_pair_op, (latents, drawn, *rest, *options))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_as_one_graph(impl, device):
    arguments, _ = inputs(device, (40,))
    compiled = torch.compile(lambda: call(arguments, impl), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(), call(arguments, impl), strict=True):
        torch.testing.assert_close(a, b)


REFUSED = [
    (TypeError, "latents must be a floating", 0, torch.ones(6, 4, dtype=torch.int32), {}),
    (ValueError, r"for the 3 pairs of pair_key.*got \(5, 4\)", 0, torch.ones(5, 4), {}),
    (TypeError, "pair_key must be a vector of int64", 1, torch.ones(3), {}),
    (ValueError, "of one length, got 3 and 2", 2, torch.zeros(2, dtype=torch.int64), {}),
    (ValueError, "signal and sigma must be", 3, torch.ones(5), {}),
    (ValueError, "low < high <= 1000 must hold, got 10 and 1001", None, None, {"high": 1001}),
    (ValueError, r"seed must lie in \[0, 2\^32\), got -1", None, None, {"seed": -1}),
    (ValueError, "prediction must be one of", None, None, {"prediction": "x0"}),
    (ValueError, "logvar must match", None, None, {"logvar": torch.ones(6, 3)}),
    (TypeError, "dtype must be float32", None, None, {"dtype": torch.float64}),
    (ValueError, "impl must be None", None, None, {"impl": "cuda"}),
    (ValueError, "needs signal contiguous", 3, torch.ones(2000)[::2], {}),
]


@pytest.mark.parametrize(("error", "message", "position", "value", "options"), REFUSED)
def test_refuses(error, message, position, value, options):
    if torch.cuda.is_available() and "contiguous" in message:
        pytest.skip("its tensors are on the CPU")
    arguments, _ = inputs("cpu", (4,))
    if position is not None:
        arguments[position] = value
    with pytest.raises(error, match=message):
        call(arguments, **options)
