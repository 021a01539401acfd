"""What a plan counts: against torch's own counter, against arithmetic, against the models."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastpo.config import parse_config
from fastpo.plan.architecture import resolve_architecture
from fastpo.plan.measure import (
    Shapes,
    build_parts,
    measure_forward,
    measure_texts,
    measure_training,
    measure_vae,
    unet_inputs,
)
from fastpo.plan.modes import CudaForward, RepeatedOperators, StorageTracker, flop_counter
from fastpo.plan.planner import make_shapes
from fastpo.train.sharding import count_trained

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CPU = torch.device("cpu")
META = torch.device("meta")


def config(path=SDXL, *, resolution=1024, **train):
    """A configuration; `train` overrides."""
    return parse_config(
        {
            "model": {"path": str(path)},
            "data": {"source": "pickapic", "path": "no-data"},
            "prepare": {"cache_dir": "no-cache", "resolution": resolution},
            "train": {
                "output_dir": "no-run",
                "method": "full",
                "objective": {"name": "dpo"},
                "max_steps": 10,
                **train,
            },
        }
    )


def tiny_unet(folder, *, full=True, precision="fp32", pairs=3):
    """The tiny UNet on the CPU with weights, as training sets it up, and a batch's sizes."""
    from fastpo.models.denoisers import setup_denoisers
    from fastpo.models.unet import SDXL, load_unet

    method = "full" if full else "lora"
    train = config(folder, resolution=32, method=method, precision=precision).train
    unet = setup_denoisers(SDXL(), load_unet(folder), train, needs_reference=False).policy
    return unet, train, Shapes(pairs=pairs, height=8, width=8, vae_factor=4, tokens=77)


# The published models.


@pytest.fixture(scope="module")
def sdxl():
    train = config(precision="bf16").train
    return build_parts(resolve_architecture(config()), train, reference=False)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_packaged_architectures_have_the_published_number_of_weights(sdxl):
    assert count(sdxl.denoisers.policy) == 2_567_463_684
    assert count(sdxl.vae) == 83_653_863
    assert [count(text) for text in sdxl.texts] == [123_060_480, 694_659_840]
    parts = build_parts(resolve_architecture(config(SD15)), config().train, reference=False)
    assert count(parts.denoisers.policy) == 859_520_964
    assert [count(text) for text in parts.texts] == [123_060_480]


def test_sdxl_costs_what_the_published_table_says(sdxl):
    """TFLOP of a pair at 1024 x 1024: 13.5 forward, 40.5 with backward, VAE 9.8, text 0.1."""
    shapes = Shapes(pairs=1, height=128, width=128, vae_factor=8, tokens=77)
    forward, whole, repeated = measure_training(
        sdxl.denoisers.policy, shapes, "bf16", checkpointing=False
    )
    assert forward.flops / 1e12 == pytest.approx(13.5, rel=0.01)
    assert whole.flops / 1e12 == pytest.approx(40.5, rel=0.01)
    assert repeated == 0
    assert measure_vae(sdxl.vae, shapes, "fp32").flops / 1e12 == pytest.approx(9.8, rel=0.01)
    assert measure_texts(sdxl.texts, shapes).flops / 1e12 == pytest.approx(0.1, abs=0.02)


def test_prompts_in_chunks_cost_as_many_prompts(tiny_pipelines):
    own = config(tiny_pipelines["sdxl"], resolution=32)
    architecture = resolve_architecture(own)
    texts = build_parts(architecture, own.train, reference=False).texts
    prepare = own.prepare.model_copy(update={"prompt_chunks": 2})
    one, two = (
        make_shapes(each, architecture)
        for each in (own, own.model_copy(update={"prepare": prepare}))
    )
    assert (one.tokens, two.tokens) == (77, 154)
    assert measure_texts(texts, two).flops == 2 * measure_texts(texts, one).flops


@pytest.mark.slow
def test_checkpointing_sdxl_repeats_less_than_the_forward_pass():
    """A whole forward more would be 54.0 TFLOP; torch stops each block's recomputation early."""
    shapes = Shapes(pairs=1, height=128, width=128, vae_factor=8, tokens=77)
    unet = build_parts(
        resolve_architecture(config()), config(precision="bf16").train, reference=False
    ).denoisers.policy
    forward, whole, repeated = measure_training(unet, shapes, "bf16", checkpointing=True)
    assert (whole.flops - repeated) / 1e12 == pytest.approx(40.5, rel=0.01)
    assert 0.7 * forward.flops < repeated < forward.flops
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        _, nominal, _ = measure_training(unet, shapes, "bf16", checkpointing=True)
    assert whole.flops < nominal.flops <= 1.01 * 54.0e12


# Counting, against arithmetic and against torch on real tensors.


def test_a_convolution_and_an_attention_cost_what_arithmetic_says():
    with flop_counter() as counter, torch.device("meta"):
        conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.empty(2, 16, 8, 8, requires_grad=True)
        conv(x).sum().backward()
    forward = 2 * (2 * 8 * 8) * 32 * (16 * 9)
    assert counter.get_total_flops() == 3 * forward
    q, k, v = (torch.empty(2, 4, 64, 16, device="meta", requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        with CudaForward(torch.bfloat16):
            out = F.scaled_dot_product_attention(q, k, v)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    scores = 2 * 4 * 64 * 64
    assert counter.get_total_flops() == 3 * (2 * 2 * scores * 16)


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counts_equal_torch_s_counter_on_real_tensors(tiny_pipelines, full, checkpointing):
    unet, train, shapes = tiny_unet(tiny_pipelines["sdxl"], full=full)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        unet(**unet_inputs(unet, shapes, CPU), return_dict=False)[0].sum().backward()
    architecture = resolve_architecture(config(tiny_pipelines["sdxl"], resolution=32))
    meta = build_parts(architecture, train, reference=False).denoisers.policy
    _, whole, repeated = measure_training(meta, shapes, "fp32", checkpointing=checkpointing)
    assert whole.flops == real.get_total_flops()
    assert (repeated > 0) == checkpointing


class Saved:
    """A tensor that autograd keeps, for as long as it keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(unet, inputs, context):
    """Bytes of the distinct tensors that autograd keeps of a forward pass, beside its inputs."""
    given = [*unet.parameters(), *torch.utils._pytree.tree_leaves(inputs)]
    outside = {t.untyped_storage().data_ptr() for t in given if torch.is_tensor(t)}
    kept = weakref.WeakSet()

    def pack(tensor):
        saved = Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor), context:
        prediction = unet(**inputs, return_dict=False)[0]
    storages = [saved.tensor.untyped_storage() for saved in kept]
    assert prediction.requires_grad
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in outside}.values())


class NormsInFloat32(torch.overrides.TorchFunctionMode):
    """Adds to the CPU's autocast what CUDA's does besides: normalization in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.group_norm, F.layer_norm):
            args = tuple(a.float() if torch.is_tensor(a) else a for a in args)
            kwargs = {k: a.float() if torch.is_tensor(a) else a for k, a in kwargs.items()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_activations_equal_what_autograd_keeps_on_a_cpu(
    tiny_pipelines, precision, checkpointing, full
):
    unet, train, shapes = tiny_unet(tiny_pipelines["sdxl"], full=full, precision=precision)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    context = contextlib.ExitStack()
    if precision == "bf16":
        context.enter_context(torch.autocast("cpu", torch.bfloat16))
        context.enter_context(NormsInFloat32())
    real = saved_bytes(unet, unet_inputs(unet, shapes, CPU), context)
    architecture = resolve_architecture(config(tiny_pipelines["sdxl"], resolution=32))
    meta = build_parts(architecture, train, reference=False).denoisers.policy
    forward, whole, _ = measure_training(meta, shapes, precision, checkpointing=checkpointing)
    answer = 6 * 4 * 8 * 8 * (2 if precision == "bf16" else 4)
    assert forward.kept - answer == pytest.approx(real, rel=2e-3)
    assert whole.peak >= forward.kept


def test_the_tracker_adds_and_takes_away():
    """1 KiB each: x, then y while x lives, then z in y's place."""
    with StorageTracker() as tracker:
        x = torch.empty(256, device="meta")
        y = x * 2
        view = y.view(16, 16)
        assert tracker.live == 2048
        del y, view
        z = x + 1
        assert (tracker.live, tracker.peak) == (2048, 2048)
        del x, z
    assert (tracker.live, tracker.peak) == (0, 2048)


def test_gradients_leave_the_tracker_when_they_are_whole():
    layer = nn.Linear(64, 64, bias=False, device="meta")
    tracker = StorageTracker(layer.parameters())
    with tracker:
        layer(torch.empty(1, 64, device="meta")).sum().backward()
    assert tracker.peak >= 64 * 64 * 4
    assert tracker.live == 0
    assert layer.weight.grad is not None


def test_the_step_under_the_scaler_takes_one_float32_copy(tiny_pipelines):
    unet, train, _ = tiny_unet(tiny_pipelines["sdxl"])
    weights = list(unet.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(weights, foreach=True)
    optimizer.step()
    with StorageTracker(weights) as tracker:
        optimizer.step()
    assumed = count_trained(weights, train.model_copy(update={"precision": "fp16"}))
    assert assumed.step == pytest.approx(tracker.peak, rel=0.02)
    assert assumed.states == 8 * count(unet)


def test_measure_forward_of_the_adapters_off(tiny_pipelines):
    """LoRA's reference is the base: it costs less than the policy with its adapters."""
    chosen = config(tiny_pipelines["sdxl"], resolution=32, method="lora")
    parts = build_parts(resolve_architecture(chosen), chosen.train, reference=False)
    shapes = Shapes(pairs=1, height=8, width=8, vae_factor=4, tokens=77)
    with parts.denoisers.reference() as model:
        off = measure_forward(model, shapes, "bf16").flops
    on = measure_forward(parts.denoisers.policy, shapes, "bf16").flops
    assert 0 < off < on


class CallOnly(RepeatedOperators):
    """Looks nothing up."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_operators_that_are_looked_up_count_as_those_that_are_called(
    tiny_pipelines, monkeypatch, full, checkpointing
):
    method = "full" if full else "lora"
    run = config(tiny_pipelines["sdxl"], resolution=32, method=method, precision="bf16")
    shapes = Shapes(pairs=2, height=8, width=8, vae_factor=4, tokens=77)
    found = []
    for _ in range(2):  # as it is; then with every operator called
        parts = build_parts(resolve_architecture(run), run.train, reference=False)
        unet = parts.denoisers.policy
        found.append(
            [
                measure_training(unet, shapes, "bf16", checkpointing=checkpointing),
                measure_forward(unet, shapes, "bf16"),
                measure_vae(parts.vae, shapes, "fp32"),
                measure_texts(parts.texts, shapes),
            ]
        )
        monkeypatch.setattr("fastpo.plan.measure.RepeatedOperators", CallOnly)
    assert found[0] == found[1]


def test_views_and_writes_are_not_looked_up():
    counter = flop_counter()
    with counter, RepeatedOperators(counter):
        for _ in range(2):
            weight = torch.empty(4, 6, device=META)
            assert weight.t().untyped_storage()._cdata == weight.untyped_storage()._cdata
            total = weight.add_(1.0)
            assert total is weight
            product = weight @ weight.t()
            assert product.shape == (4, 4) and product.is_contiguous()
    assert counter.get_total_flops() == 2 * (2 * 4 * 4 * 6)
    assert torch.ones(3).add(1.0).tolist() == [2.0, 2.0, 2.0]
    with counter, RepeatedOperators(counter):
        sums = [torch.full((3,), value).sum().item() for value in (1.0, 1.0, 2.0)]
    assert sums == [3.0, 3.0, 6.0], "tensors with values are computed"
