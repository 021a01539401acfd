"""Reference and averages in one pass: equal to separate passes, and nothing left behind."""

import pytest
import torch

from fastpo.config import load_config, parse_config
from fastpo.demo.base import build_unet
from fastpo.errors import ConfigError
from fastpo.models.denoisers import setup_denoisers, without_dropout
from fastpo.models.unet import SDXL, predict
from fastpo.train import train
from fastpo.train.ema import MovingAverages
from fastpo.train.lora_batched import SMALL, in_one_pass, predict_together
from fastpo.types import NoisedPair, PairBatch

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


def train_config(**options):
    raw = {
        "model": {"path": "m"},
        "data": {"source": "folder", "path": "d"},
        "prepare": {"cache_dir": "c"},
        "train": {
            "output_dir": "o",
            "objective": {"name": "adaptive_dpo"},
            "annotators": {"kind": "ema"},
            "max_steps": 1,
            "precision": "fp32",
            **options,
        },
    }
    return parse_config(raw).train


def setting(targets, pairs=3, size=8):
    torch.manual_seed(0)
    unet = build_unet()
    lora = {"target_modules": targets, "dropout": 0.5}
    denoisers = setup_denoisers(SDXL(), unet, train_config(lora=lora), needs_reference=True)
    averages = MovingAverages(denoisers.trainable, [0.9, 0.5])
    for tensors in (*averages.shadows, denoisers.trainable.values()):
        for tensor in tensors:
            tensor.data.add_(0.1 * torch.randn_like(tensor))
    wide = unet.config.projection_class_embeddings_input_dim - 48
    none = torch.zeros(pairs, dtype=torch.int64)
    steps = torch.randint(1000, (pairs,))
    noised = NoisedPair(
        noisy_latents=torch.randn(2 * pairs, 4, size, size),
        index=steps,
        timesteps=steps,
        target=torch.randn(pairs, 4, size, size),
    )
    batch = PairBatch(
        index=none,
        pair_key=none,
        visit=none,
        flipped=none.bool(),
        latent_mean=noised.noisy_latents,
        latent_logvar=noised.noisy_latents,
        conditions={
            "prompt_embeds": torch.randn(pairs, 5, unet.config.cross_attention_dim),
            "pooled": torch.randn(pairs, wide),
            "add_time_ids": torch.randint(8, 64, (pairs, 6)).float(),
        },
    )
    return denoisers, averages, noised, batch


def one_by_one(denoisers, averages, noised, batch):
    with torch.no_grad(), denoisers.reference() as model:
        found = [predict(model, noised, batch.conditions)]
    with torch.no_grad(), without_dropout(denoisers.policy) as model:
        for which in range(2):
            with averages.applied(which):
                found.append(predict(model, noised, batch.conditions))
        found.append(predict(model, noised, batch.conditions))  # the policy itself
    return found


@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, "conv1"]], ids=["linear", "and conv"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "averages alone"])
def test_one_pass_equals_separate_ones(targets, reference):
    denoisers, averages, noised, batch = setting(targets)
    *separate, policy = one_by_one(denoisers, averages, noised, batch)
    conditions = batch.conditions
    with without_dropout(denoisers.policy):
        together = predict_together(denoisers, averages, noised, conditions, reference=reference)
    separate = separate if reference else separate[1:]
    assert len(together) == len(separate)
    for one, other in zip(together, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[-1], together[-2], atol=1e-3)
    # Nothing is left behind: the policy answers as before, with its own adapters.
    assert torch.equal(one_by_one(denoisers, averages, noised, batch)[-1], policy)
    assert denoisers.trainable.keys() == averages.parameters.keys()


def test_auto_takes_one_pass_where_batches_are_small():
    small, large = SMALL, SMALL + 1
    assert [in_one_pass(train_config(), n) for n in (small, large)] == [True, False]
    for chosen in (True, False):
        config = train_config(annotators={"kind": "ema", "batched": chosen})
        assert in_one_pass(config, small) is in_one_pass(config, large) is chosen
    assert not in_one_pass(train_config(method="full"), small)
    assert not in_one_pass(train_config(annotators={"kind": "ledger"}), small)


def test_one_pass_needs_lora():
    with pytest.raises(ConfigError, match=r"batched: true needs train\.method: lora"):
        train_config(method="full", annotators={"kind": "ema", "batched": True})


def test_a_run_is_the_same_either_way(experiment, read_metrics):
    runs = []
    for batched in (True, False):
        path = experiment(
            name=f"batched-{batched}",
            objective={"name": "adaptive_dpo", "beta": 500.0},
            annotators={"kind": "ema", "batched": batched, "warmup_steps": 1},
            optim={"lr": 1e-2},  # or the averages would differ by rounding
        )
        runs.append(read_metrics(train(load_config(path), progress=False)))
    # A metric of two averages' difference keeps two digits, and the loss is weighted by it.
    for one, other in zip(*runs, strict=True):
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-2, abs=1e-5), key
    assert runs[0][-1]["minority/q90"] > 0
