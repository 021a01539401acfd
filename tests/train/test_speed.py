"""What makes a step faster or smaller leaves its results as they are."""

import pytest
import torch
from torch import nn

from fastpo.config import TrainConfig
from fastpo.loss import dpo
from fastpo.models.denoisers import setup_denoisers
from fastpo.models.unet import SDXL, load_unet, predict
from fastpo.train.ema import MovingAverages
from fastpo.types import NoisedPair, PairBatch

POOLED = {"sd15": None, "sdxl": 20}


def make(folder, method="lora", **options):
    """A policy moved away from its reference, the same for all options."""
    adapted = {"lora": {"rank": 2, "target_modules": ["to_q", "to_v", "conv1"]}}
    config = TrainConfig.model_validate(
        {"output_dir": "o", "max_steps": 1, "objective": {"name": "dpo"}, "precision": "fp32"}
        | (adapted if method == "lora" else {})
        | {"method": method}
        | options
    )
    torch.manual_seed(0)
    denoisers = setup_denoisers(SDXL(), load_unet(folder), config, needs_reference=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoisers.trainable.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return denoisers


def inputs(unet, pooled, pairs=2):
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2 * pairs, 4, 8, 8, generator=g)
    index = torch.arange(pairs)
    conditions = {
        "prompt_embeds": torch.randn(pairs, 77, unet.config.cross_attention_dim, generator=g)
    }
    if pooled is not None:
        conditions["pooled"] = torch.randn(pairs, pooled, generator=g)
        conditions["add_time_ids"] = torch.full((pairs, 6), 32.0)
    batch = PairBatch(
        index=index,
        pair_key=index,
        visit=index,
        flipped=index > pairs,
        latent_mean=latents,
        latent_logvar=latents,
        conditions=conditions,
    )
    steps = torch.tensor([10, 900])
    return NoisedPair(latents, steps, steps, latents[:pairs]), batch


def step(denoisers, pooled):
    """The DPO loss of one step and its gradients."""
    noised, batch = inputs(denoisers.policy, pooled)
    with torch.no_grad(), denoisers.shared_modules(), denoisers.reference() as model:
        reference = predict(model, noised, batch.conditions)
    policy = predict(denoisers.policy, noised, batch.conditions)
    loss = dpo(policy, reference, noised.target, beta=10.0).loss
    grads = torch.autograd.grad(loss, list(denoisers.trainable.values()))
    return loss.detach(), grads


OPTIONS = {
    "checkpointing": {"gradient_checkpointing": True},
    "channels-last, flash": {"channels_last": True, "attention": "flash"},
    "checkpointing, flash": {"gradient_checkpointing": True, "attention": "flash"},
    "checkpointing, channels-last": {"gradient_checkpointing": True, "channels_last": True},
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_options_leave_the_loss_and_its_gradients_alone(tiny_pipelines, family, method):
    folder, pooled = tiny_pipelines[family], POOLED[family]
    loss, grads = step(make(folder, method=method), pooled)
    assert abs(loss.item() - 0.6931) > 1e-3  # the policy has moved
    for name, options in OPTIONS.items():
        other, others = step(make(folder, method=method, **options), pooled)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6, msg=name)
        for a, b in zip(grads, others, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_channels_last_reaches_every_convolution_and_its_output(tiny_pipelines, method):
    """Weights of the policy and of the frozen copy, what convolutions give, and the prediction."""
    denoisers = make(tiny_pipelines["sdxl"], method=method, channels_last=True)
    outputs = []
    models = (
        [denoisers.policy] if denoisers.frozen is None else [denoisers.policy, denoisers.frozen]
    )
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
                module.register_forward_hook(lambda m, i, o: outputs.append(o))
    noised, batch = inputs(denoisers.policy, 20)
    with torch.no_grad():
        prediction = predict(models[-1], noised, batch.conditions)
    wide = [o for o in outputs if o.shape[1] > 1 and o.shape[-1] > 1]
    assert len(wide) > 10
    assert all(o.is_contiguous(memory_format=torch.channels_last) for o in [*wide, prediction])


def test_the_loss_takes_channels_last_predictions_as_they_are():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, 4, 6, 5, generator=g).unbind()
    target = torch.randn(2, 4, 6, 5, generator=g)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = policy.contiguous(memory_format=layout).requires_grad_()
        out = dpo(x, reference.contiguous(memory_format=layout), target, beta=5.0)
        (grad,) = torch.autograd.grad(out.loss, x)
        results.append((out.loss, grad))
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_a_compiled_policy_sees_adapters_and_averages_change(tiny_pipelines):
    """Compiled blocks under gradient checkpointing, against the same model without compilation.

    The reference and the averages are asked both as training asks them, without compiled code, and
    through it, where only the compiler's guards notice that an adapter is off.
    """
    folder, pooled = tiny_pipelines["sdxl"], POOLED["sdxl"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = make(folder, gradient_checkpointing=True)
    compiled = make(folder, gradient_checkpointing=True, compile=True)
    noised, batch = inputs(plain.policy, pooled)

    def policies():
        return [predict(d.policy, noised, batch.conditions).detach() for d in (plain, compiled)]

    loss, grads = step(plain, pooled)
    other, others = step(compiled, pooled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)

    on = policies()
    torch.testing.assert_close(on[1], on[0])
    with torch.no_grad(), compiled.shared_modules(), compiled.reference() as model:
        eager = predict(model, noised, batch.conditions)
    with torch.no_grad(), plain.reference() as model:
        assert torch.equal(eager, predict(model, noised, batch.conditions))
    with torch.no_grad(), compiled.reference() as model:
        torch.testing.assert_close(predict(model, noised, batch.conditions), eager)
    assert (on[0] - eager).abs().max() > 1e-3

    averages = [MovingAverages(d.trainable, [0.5]) for d in (plain, compiled)]
    for d in (plain, compiled):
        with torch.no_grad():
            for parameter in d.trainable.values():
                parameter *= 1.5
    moved = policies()
    torch.testing.assert_close(moved[1], moved[0])
    assert (moved[0] - on[0]).abs().max() > 1e-3
    with averages[0].applied(0), averages[1].applied(0):
        swapped = policies()
    for prediction in swapped:
        torch.testing.assert_close(prediction, on[0])
    torch.testing.assert_close(policies()[1], moved[0])
