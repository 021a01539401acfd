"""Policy, reference and moving averages on tiny pipelines of both families."""

import pytest
import torch
from torch import nn

from fastpo.config import LoraConfig, TrainConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.denoisers import (
    setup_denoisers,
    without_dropout,
)
from fastpo.models.export import export_policy
from fastpo.models.unet import SDXL, load_unet, predict
from fastpo.noise import drop_captions
from fastpo.testing import tiny_sd15_folder, tiny_sdxl_folder
from fastpo.train.ema import MovingAverages
from fastpo.types import NoisedPair, PairBatch

FAMILIES = {"sdxl": (tiny_sdxl_folder, 40, 20), "sd15": (tiny_sd15_folder, 16, None)}


@pytest.fixture(scope="module", params=list(FAMILIES))
def pipeline(request, tmp_path_factory):
    build, width, pooled = FAMILIES[request.param]
    return build(tmp_path_factory.mktemp(request.param)), width, pooled


def config(**options):
    return TrainConfig.model_validate(
        {"output_dir": "o", "max_steps": 1, "objective": {"name": "dpo"}, "precision": "fp32"}
        | options
    )


def inputs(width, pooled, pairs=2):
    g = torch.Generator().manual_seed(0)
    zeros = torch.zeros(pairs, dtype=torch.int64)
    latents = torch.randn(2 * pairs, 4, 8, 8, generator=g)
    conditions = {"prompt_embeds": torch.randn(pairs, 77, width, generator=g)}
    if pooled is not None:
        sizes = [[64.0, 48, 0, 3, 32, 32], [1024, 768, 5, 0, 32, 32]]
        conditions["pooled"] = torch.randn(pairs, pooled, generator=g)
        conditions["add_time_ids"] = torch.tensor(sizes)
    batch = PairBatch(
        index=zeros,
        pair_key=zeros,
        visit=zeros,
        flipped=zeros.bool(),
        latent_mean=latents,
        latent_logvar=latents,
        conditions=conditions,
    )
    steps = torch.tensor([10, 900])
    return NoisedPair(latents, steps, steps, latents), batch


def nudge(denoisers):
    with torch.no_grad():
        for parameter in denoisers.trainable.values():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_is_the_untrained_model_bit_for_bit(pipeline, method):
    folder, width, pooled = pipeline
    noised, batch = inputs(width, pooled)
    with torch.no_grad():
        untrained = predict(load_unet(folder), noised, batch.conditions)
        denoisers = setup_denoisers(
            SDXL(), load_unet(folder), config(method=method), needs_reference=True
        )
        nudge(denoisers)
        with denoisers.reference() as reference:
            assert torch.equal(predict(reference, noised, batch.conditions), untrained)
        assert not torch.equal(predict(denoisers.policy, noised, batch.conditions), untrained)


def test_a_frozen_copy_in_bf16_agrees_with_the_policy_before_training(pipeline):
    """Norm weights of a trained model are not representable in bf16; fresh ones (1, 0) are."""
    folder, width, pooled = pipeline
    noised, batch = inputs(width, pooled)
    unet = load_unet(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(0.0, 0.1)
        options = config(method="full", precision="bf16")
        denoisers = setup_denoisers(SDXL(), unet, options, needs_reference=True)
        with torch.autocast("cpu", torch.bfloat16):
            policy = predict(denoisers.policy, noised, batch.conditions)
        with denoisers.reference() as reference, torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(predict(reference, noised, batch.conditions), policy)


def test_bf16_weights_keep_vectors_and_averages_in_float32(pipeline):
    """The policy starts as the frozen copy does, and an average may stand in for it."""
    folder, width, pooled = pipeline
    noised, batch = inputs(width, pooled)
    options = config(method="full", precision="bf16", weights="bf16")
    denoisers = setup_denoisers(SDXL(), load_unet(folder), options, needs_reference=True)
    assert {(p.ndim > 1, p.dtype) for p in denoisers.trainable.values()} == {
        (True, torch.bfloat16),
        (False, torch.float32),
    }
    averages = MovingAverages(denoisers.trainable, [0.5])
    assert all(t.dtype == torch.float32 for t in averages.shadows[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy = predict(denoisers.policy, noised, batch.conditions)
        with denoisers.reference() as reference:
            assert torch.equal(predict(reference, noised, batch.conditions), policy)
        nudge(denoisers)
        with averages.applied(0):
            assert torch.equal(predict(denoisers.policy, noised, batch.conditions), policy)
        assert not torch.equal(predict(denoisers.policy, noised, batch.conditions), policy)
    averages.update(1)
    name, weight = next(iter(denoisers.trainable.items()))
    start = averages.state_dict()[f"0.{name}"]
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(start, start.bfloat16().float())  # more digits than the weights have


def test_a_judge_is_asked_without_dropout(pipeline):
    folder, width, pooled = pipeline
    noised, batch = inputs(width, pooled)
    options = config(lora=LoraConfig(dropout=0.5).model_dump())
    denoisers = setup_denoisers(SDXL(), load_unet(folder), options, needs_reference=True)
    nudge(denoisers)
    with torch.no_grad(), without_dropout(denoisers.policy) as judge:
        assert torch.equal(
            predict(judge, noised, batch.conditions), predict(judge, noised, batch.conditions)
        )
    assert denoisers.policy.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trainable_weights_are_float32_and_lora_trains_adapters_only(pipeline, precision):
    denoisers = setup_denoisers(
        SDXL(), load_unet(pipeline[0]), config(precision=precision), needs_reference=True
    )
    assert denoisers.frozen is None
    assert all("lora" in name for name in denoisers.trainable)
    assert all(p.dtype == torch.float32 for p in denoisers.trainable.values())
    frozen = {p.dtype for p in denoisers.policy.parameters() if not p.requires_grad}
    assert frozen == {torch.float32 if precision == "fp32" else torch.bfloat16}


def test_a_reference_free_objective_keeps_no_copy(pipeline):
    denoisers = setup_denoisers(
        SDXL(), load_unet(pipeline[0]), config(method="full"), needs_reference=False
    )
    assert denoisers.frozen is None


def test_winner_and_loser_get_the_same_conditioning(pipeline):
    folder, width, pooled = pipeline
    noised, batch = inputs(width, pooled)
    twins = torch.cat((noised.noisy_latents[:2], noised.noisy_latents[:2]))
    with torch.no_grad():
        out = predict(
            load_unet(folder),
            NoisedPair(twins, noised.index, noised.timesteps, twins),
            batch.conditions,
        )
    torch.testing.assert_close(out[:2], out[2:])


def test_captions_are_dropped_for_whole_pairs(pipeline):
    _, width, pooled = pipeline
    _, batch = inputs(width, pooled)
    empty = {"prompt_embeds": torch.zeros(1, 77, width)}
    if pooled is not None:
        empty["pooled"] = torch.zeros(1, pooled)
    dropped = drop_captions(batch, torch.tensor([True, False]), empty).conditions
    assert dropped.keys() == batch.conditions.keys()
    for name, given in batch.conditions.items():
        assert torch.equal(dropped[name][1], given[1])
        assert dropped[name][0].any() == (name == "add_time_ids"), "what pairs give stays"


def test_lora_targets_that_match_nothing_are_refused(pipeline):
    with pytest.raises(ConfigError, match="target_modules"):
        setup_denoisers(
            SDXL(),
            load_unet(pipeline[0]),
            config(lora=LoraConfig(target_modules=("nowhere",)).model_dump()),
            needs_reference=True,
        )


def test_a_folder_without_a_unet_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"/unet is missing$"):
        load_unet(tmp_path)


def test_exported_full_weights_come_back_equal(pipeline, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = load_unet(pipeline[0])
    export_policy(SDXL(), unet, tmp_path / "final", "full")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "final", subfolder="unet")
    assert all(
        torch.equal(a, b)
        for a, b in zip(unet.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("alpha", [2.0, 16.0])
def test_exported_adapters_act_as_they_did_in_training(pipeline, tmp_path, alpha):
    from diffusers import DiffusionPipeline

    folder, width, pooled = pipeline
    noised, batch = inputs(width, pooled)
    lora = LoraConfig(rank=4, alpha=alpha).model_dump()
    denoisers = setup_denoisers(SDXL(), load_unet(folder), config(lora=lora), needs_reference=True)
    nudge(denoisers)
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.load_lora_weights(export_policy(SDXL(), denoisers.policy, tmp_path / "final", "lora"))
    with torch.no_grad():
        trained = predict(denoisers.policy, noised, batch.conditions)
        torch.testing.assert_close(predict(stock.unet, noised, batch.conditions), trained)


def test_moving_averages_follow_the_ramp_worked_by_hand():
    """Step 1 moves by 1 - 2/11, step 2 by 1 - 3/12, whatever a larger decay asks for."""
    p = nn.Parameter(torch.tensor([1.0]))
    averages = MovingAverages({"p": p}, [0.9999, 0.1])
    p.data = torch.tensor([2.0])
    averages.update(1)
    first = 1 + (1 - 2 / 11)
    torch.testing.assert_close(averages.shadows[0][0], torch.tensor([first]))
    torch.testing.assert_close(averages.shadows[1][0], torch.tensor([1 + (1 - 0.1)]))
    averages.update(2)
    second = first + (2 - first) * (1 - 3 / 12)
    torch.testing.assert_close(averages.shadows[0][0], torch.tensor([second]))


def test_an_average_is_swapped_in_without_a_copy_and_out_after_an_error():
    p = nn.Parameter(torch.tensor([1.0]))
    averages = MovingAverages({"p": p}, [0.5])
    p.data = torch.tensor([3.0])
    weights, shadow = p.data_ptr(), averages.shadows[0][0].data_ptr()
    with pytest.raises(RuntimeError, match="inside"), averages.applied(0):
        assert (p.data_ptr(), p.item()) == (shadow, 1.0)
        raise RuntimeError("inside")
    assert (p.data_ptr(), p.item()) == (weights, 3.0)
