"""Optimizers: small updates survive bfloat16, states are small, and all of it resumes exactly."""

import io
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastpo.config import OptimConfig
from fastpo.errors import ConfigError
from fastpo.train.bf16_optimizer import RoundedOptimizer, round_stochastically
from fastpo.train.distributed import Processes
from fastpo.train.optimizer import optimizer_bytes, setup_optimizer
from tests.faults.two_ranks import two_ranks

NAMES = ["adamw", "adamw_8bit", "adafactor"]
NAN, INF = float("nan"), float("inf")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(dtype=torch.float32):
    """A matrix that gets 8-bit states, its last block short, a small matrix and a vector."""
    g = generator()
    shapes = (61, 101), (6, 5), (7,)
    return [
        nn.Parameter(torch.randn(s, generator=g).to(dtype if len(s) > 1 else torch.float32))
        for s in shapes
    ]


def give_gradients(parameters, step):
    g = generator(1000 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def train(parameters, optimizer, steps):
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("value", [1.0, -1.0, 3.0e-5, -7e20])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_rounding_is_right_on_average(value, fraction):
    """Between neighbors a and b, P(b) is the fraction of the way; 4 standard errors."""
    low = torch.tensor(value).bfloat16()
    bits = low.view(torch.int16) + 1
    a, b = low.float(), bits.view(torch.bfloat16).float()
    exact = a + fraction * (b - a)
    n = 40000
    rounded = round_stochastically(exact.expand(n).contiguous(), generator()).float()
    assert set(rounded.tolist()) == {a.item(), b.item()}
    share = (rounded == b).float().mean().item()
    true = ((exact - a) / (b - a)).item()
    assert abs(share - true) < 4 * (true * (1 - true) / n) ** 0.5


def test_rounding_leaves_what_bfloat16_can_say_and_what_is_not_finite():
    exact = torch.tensor([0.0, -0.0, 1.5, -(2.0**-130), INF, -INF])
    assert torch.equal(round_stochastically(exact, generator()).float(), exact)
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nans, generator()).isnan().all()


@pytest.mark.parametrize(("passes", "error"), [(16, 0.005), (128, 0.013)])
def test_gradients_of_bfloat16_weights_are_summed_as_stated(passes, error):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    exact = torch.zeros(20_000, dtype=torch.float64)
    for _ in range(passes):
        gradient = torch.randn(20_000, generator=generator).bfloat16()
        (weight * gradient).sum().backward()
        exact += gradient.double()
    off = (weight.grad.double() - exact).norm() / exact.norm()
    assert off == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_updates_too_small_for_bfloat16_add_up_on_average(name):
    """40 updates of 1e-3 move weights of 1 by 0.04; to the nearest each is lost."""
    config = OptimConfig(name=name, lr=1e-3, weight_decay=0.0)
    exact = nn.Parameter(torch.ones(64, 64))
    rounded = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    nearest = torch.ones(64, 64, dtype=torch.bfloat16)
    optimizers = [setup_optimizer([p], config, seed=3) for p in (exact, rounded)]
    for _ in range(40):
        before = exact.detach().clone()
        for p, optimizer in zip((exact, rounded), optimizers, strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()
        nearest += (exact.detach() - before).bfloat16()
    assert (nearest == 1.0).all()
    moved = 1.0 - exact.detach().mean().item()
    assert moved == pytest.approx(0.04, rel=0.05)
    assert 1.0 - rounded.detach().float().mean().item() == pytest.approx(moved, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 8200, 2**26])
def test_chunks_are_stepped_as_float32_weights_would_be(name, chunk):
    """One step from the same bfloat16 weights: within one unit in the last place, and unequal."""
    config = OptimConfig(name=name, lr=1e-2)
    low, high = (
        weights(torch.bfloat16),
        [nn.Parameter(p.detach().float()) for p in weights(torch.bfloat16)],
    )
    optimizer = RoundedOptimizer(low, lambda p: setup_optimizer(p, config), seed=0, chunk=chunk)
    plain = setup_optimizer(high, config)
    give_gradients(low, 0)
    for a, b in zip(low, high, strict=True):
        b.grad = a.grad.float()
    optimizer.step()
    plain.step()
    for a, b in zip(low, high, strict=True):
        ulp = b.detach().abs().clamp(min=1e-3) * 2.0**-7
        assert ((a.detach().float() - b.detach()).abs() <= ulp).all()
    assert torch.equal(low[2].detach(), high[2].detach())  # float32: not rounded


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_optimizer_goes_on_exactly(name, dtype):
    config = OptimConfig(name=name, lr=1e-2)
    whole = weights(dtype)
    train(whole, setup_optimizer(whole, config, seed=5), range(6))
    parts = weights(dtype)
    first = setup_optimizer(parts, config, seed=5)
    train(parts, first, range(3))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = setup_optimizer(parts, config, seed=5)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(parts, second, range(3, 6))
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def test_another_seed_rounds_otherwise():
    results = []
    for seed in (0, 1):
        parameters = weights(torch.bfloat16)
        train(parameters, setup_optimizer(parameters, OptimConfig(lr=1e-3), seed=seed), range(2))
        results.append(parameters[0].detach())
    assert not torch.equal(*results)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_schedule_and_a_weight_without_gradient_are_respected(name):
    parameters = weights(torch.bfloat16)
    optimizer = setup_optimizer(parameters, OptimConfig(name=name, lr=1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in parameters]
    give_gradients(parameters, 0)
    optimizer.step()  # at rate 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    schedule.step()
    optimizer.param_groups[0]["lr"] = 0.1
    give_gradients(parameters, 0)
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(before[1], parameters[1])
    assert not torch.equal(before[0], parameters[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_states_are_as_large_as_stated(name, dtype):
    """Besides counts of steps, and the 8-bit code book, which all tensors share."""
    parameters = weights(dtype)
    config = OptimConfig(name=name)
    optimizer = setup_optimizer(parameters, config)
    train(parameters, optimizer, range(1))
    inner = optimizer._inner() if isinstance(optimizer, RoundedOptimizer) else [optimizer]
    total = 0
    for state in (s for o in inner for s in o.state.values()):
        for key, value in state.items():
            if (
                key not in ("step", "qmap1", "qmap2")
                and isinstance(value, torch.Tensor)
                and value.ndim
            ):
                total += value.numel() * value.element_size()
    assert total == optimizer_bytes(parameters, config)


def train_on_own_data(words):
    """One of two processes; what it asserts is its exit code."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Linear(128, 64).to(torch.bfloat16)
    start = model.weight.detach().clone()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = setup_optimizer(model.parameters(), OptimConfig(name="adamw_8bit", lr=1e-3), seed=1)
    torch.manual_seed(dist.get_rank())  # each has its own data, and its own random state
    for _ in range(3):
        ddp(torch.randn(8, 128).bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [torch.empty_like(start) for _ in range(2)]
    dist.all_gather(found, model.weight.detach())
    assert torch.equal(*found), "the processes' weights differ"
    assert not torch.equal(found[0], start), "nothing was learned"


def test_processes_with_data_of_their_own_keep_equal_weights(tmp_path):
    with two_ranks(tmp_path, lambda _: [], act=train_on_own_data) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)


def test_8bit_without_bitsandbytes_is_refused_with_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install fastpo\[8bit\]"):
        setup_optimizer(weights(), OptimConfig(name="adamw_8bit"))


@pytest.mark.parametrize(
    ("name", "device", "told"),
    [("adamw_8bit", "cpu", 1), ("adamw_8bit", "cuda", 0), ("adamw", "cpu", 0)],
)
def test_8bit_on_a_cpu_says_that_its_results_mean_nothing(name, device, told):
    processes = SimpleNamespace(
        _config=SimpleNamespace(optim=OptimConfig(name=name), precision="fp32"),
        _accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)),
        device=torch.device(device),
    )
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        Processes.choose_optimizer(processes, {"weight": nn.Parameter(torch.zeros(2))}, seed=0)
    texts = [str(record.message) for record in records]  # bitsandbytes has its own as well
    assert sum("results of adamw_8bit on a CPU mean nothing" in text for text in texts) == told
