"""Checkpoints that wait in host memory: the same gradients to the bit, and room on the device."""

import copy
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpo.config import LoraConfig
from fastpo.models import checkpointing
from fastpo.models.checkpointing import HostMemory, checkpoint_into, enable_checkpointing
from fastpo.models.denoisers import add_lora
from tests.models.family_cases import CASES, Stock

NAMES = ("sd15", "sdxl", "sd3.5-medium", "flux2-klein", "qwen-image", "sana")


class Elsewhere:
    """A place that is not the tensors' own memory, as the host is not a GPU's."""

    def __init__(self):
        self.given, self.back = [], 0

    def pack(self, tensor):
        self.given.append(weakref.ref(tensor.untyped_storage()))
        return tensor.clone()

    def unpack(self, packed):
        self.back += 1
        return packed.clone()

    @property
    def alive(self):
        """Packed tensors that something else still holds."""
        return sum(storage() is not None for storage in self.given)


@pytest.fixture(scope="module", params=[c for c in CASES if c.name in NAMES], ids=lambda c: c.name)
def stock(request, tmp_path_factory):
    return Stock(request.param, tmp_path_factory.mktemp(request.param.name))


def gradients(stock, denoiser, function):
    """Each trained weight's gradient of a pass whose blocks go through a checkpoint function."""
    denoiser.enable_gradient_checkpointing(function)
    noised = stock.noised(stock.draw(1), stock.draw(2), 500)
    stock.family.predict(denoiser, noised, stock.conditions()).square().mean().backward()
    found = {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_are_equal_to_the_bit(stock, method):
    denoiser = copy.deepcopy(stock.denoiser).train().requires_grad_(method == "full")
    if method == "lora":
        add_lora(stock.family, denoiser, LoraConfig(target_modules=stock.family.lora_targets))
        for name, weight in denoiser.named_parameters():
            if "lora_B" in name:  # zeros would hide what lies before them
                torch.nn.init.normal_(weight)
    place = Elsewhere()
    plain = gradients(stock, denoiser, partial(checkpoint, use_reentrant=False))
    away = gradients(stock, denoiser, partial(checkpoint_into, place))
    assert plain.keys() == away.keys()
    assert all(torch.equal(plain[name], away[name]) for name in plain)
    assert len(place.given) == place.back > 0
    assert sum(float(gradient.abs().sum()) for gradient in plain.values()) > 0.0


class Blocks(torch.nn.Module):
    """A stack of checkpointed layers beside a text that has no gradient."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(8))

    def forward(self, states, text, run):
        for layer in self.layers:
            states = run(lambda s, t, layer=layer: layer(s).tanh() + t, states, text)
        return states


def test_what_waits_elsewhere_leaves_its_place_and_what_is_shared_stays():
    model, place = Blocks(), Elsewhere()
    text = torch.randn(2, 4)
    start = torch.randn(2, 4, requires_grad=True)
    states = model(2 * start, text, partial(checkpoint_into, place))
    assert len(place.given) == len(model.layers), "the text is kept by whoever made it"
    assert place.alive == 0
    states.sum().backward()
    assert all(layer.weight.grad is not None for layer in model.layers)


def test_host_memory_is_pinned_where_there_is_a_gpu(monkeypatch):
    asked = []

    class Copies:
        def __init__(self, pin_memory):
            asked.append(pin_memory)

    monkeypatch.setattr(checkpointing, "save_on_cpu", Copies)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        HostMemory()
    assert asked == [False, True]


def test_what_is_in_host_memory_is_not_copied():
    tensor = torch.randn(3)
    assert HostMemory().pack(tensor) is tensor
    assert HostMemory().unpack(tensor) is tensor


@pytest.mark.parametrize("offload", [False, True])
def test_the_setting_reaches_every_block(tmp_path, offload):
    case = next(case for case in CASES if case.name == "z-image")
    denoiser = Stock(case, tmp_path).denoiser
    enable_checkpointing(denoiser, offload=offload)
    blocks = [m for m in denoiser.modules() if getattr(m, "gradient_checkpointing", False)]
    assert blocks
    for block in blocks:
        function = block._gradient_checkpointing_func
        assert (getattr(function, "func", None) is checkpoint_into) == offload
