"""A family that FastPO has never seen: this file and one line in the registry, then a whole run.

It differs from the UNets in all that the interface hides: a transformer on tokens, three named
conditions (one a mask), a flow schedule whose denoiser is told `1 - sigma`, a real number, and
answers with the sign turned round, an export under `transformer/`.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin, SD3LoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file
from torch import nn

from fastpo.config import parse_config
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.errors import ConfigError, ModelError
from fastpo.models.denoisers import add_lora
from fastpo.models.encoders import Encoders, load_vae
from fastpo.models.export import LORA_FILE
from fastpo.models.family import ModelFamily
from fastpo.models.folder import ModelFolder, read_json
from fastpo.models.registry import FAMILIES
from fastpo.models.schedule import flow_schedule
from fastpo.noise import setup_noise
from fastpo.reference_cache import prepare_reference
from fastpo.testing import write_folder
from fastpo.train import train
from fastpo.train.consolidate import consolidate

WORDS, WIDTH, SUMMARY, PATCH, CHANNELS = 6, 8, 5, 2, 4


# The family: what a file beside `fastpo/models/unet.py` would hold.


class ToyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in "qkv")
        self.to_out = nn.Linear(width, width)

    def forward(self, x, mask):
        y = self.norm(x)
        q, k, v = (layer(y)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return x + self.to_out(F.gelu(out[:, 0]))


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, width=16, words_width=WIDTH, summary_width=SUMMARY, patch=PATCH):
        super().__init__()
        self.read = nn.Linear(CHANNELS * patch**2, width)
        self.words = nn.Linear(words_width, width)
        self.summary = nn.Linear(summary_width, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(2))
        self.write = nn.Linear(width, CHANNELS * patch**2)

    def forward(self, tokens, time, words, mask, summary):
        told = self.summary(summary) + self.time(time[:, None].to(tokens.dtype))
        x = torch.cat((self.read(tokens) + told[:, None], self.words(words)), dim=1)
        seen = torch.cat((mask.new_ones(tokens.shape[:2]), mask), dim=1)
        for block in self.blocks:
            x = block(x, seen)
        return self.write(x[:, : tokens.shape[1]])


class ToyEncoders(Encoders):
    def prompt_conditions(self, prompts):
        (table,) = self.text_encoders
        letters = torch.zeros(len(prompts), WORDS, dtype=torch.int64)
        for row, prompt in zip(letters, prompts, strict=True):
            codes = [1, *(2 + ord(letter) % 30 for letter in prompt[-WORDS + 1 :])]
            row[: len(codes)] = torch.tensor(codes)
        words, mask = table[letters.to(self.device)], letters.to(self.device) > 0
        return {"words": words, "word_mask": mask, "summary": words.sum(1)[:, :SUMMARY]}


class ToyFamily(ModelFamily):
    name, denoiser, title = "toy", "transformer", "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out")
    encoder_parts = ("text_encoder",)
    denoiser_class, pipeline_class = ToyTransformer, SD3LoraLoaderMixin

    def recognizes(self, folder):
        path = folder / "transformer" / "config.json"
        return path.is_file() and read_json(path).get("_class_name") == "ToyTransformer"

    def load_encoders(self, folder, config, device):
        vae = load_vae(folder.vae, folder.variant, torch.float32).to(device).eval()
        letters = read_json(folder.component("text_encoder") / "config.json")["letters"]
        return ToyEncoders(vae, (), (torch.tensor(letters, device=device),), device)

    def denoiser_factor(self, folder):
        return PATCH

    def schedule(self, folder, resolution):
        config = read_json(folder.component("scheduler") / "scheduler_config.json")
        schedule = flow_schedule(
            FlowMatchEulerDiscreteScheduler.from_config(config), latent_scale=0.5
        )
        return replace(schedule, timesteps=1.0 - schedule.sigma)

    def predict(self, denoiser, noised, conditions):
        latents = noised.noisy_latents
        rows, channels, height, width = latents.shape
        grid = (rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        tokens = latents.view(grid).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        words, mask, summary = (
            conditions[name].repeat(2, *[1] * (conditions[name].ndim - 1))
            for name in ("words", "word_mask", "summary")
        )
        dtype = latents.dtype
        answer = denoiser(
            tokens, noised.timesteps.repeat(2), words.to(dtype), mask, summary.to(dtype)
        )
        answer = answer.view(rows, grid[2], grid[4], channels, PATCH, PATCH)
        return -answer.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


# The runs.


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", f"{__name__}:ToyFamily")
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A toy pipeline's folder, and images to align it with."""
    root = tmp_path_factory.mktemp("toy")
    model, generator = root / "model", torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ToyTransformer().save_pretrained(model / "transformer")
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=CHANNELS,
            norm_num_groups=4,
        ).save_pretrained(model / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(model / "scheduler")
    (model / "text_encoder").mkdir()
    letters = torch.randn(32, WIDTH, generator=generator).tolist()
    (model / "text_encoder" / "config.json").write_text(json.dumps({"letters": letters}))
    (model / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    write_folder(root / "data", 6, sizes=((24, 24), (24, 24), (32, 20)))
    return root


@pytest.fixture(scope="module")
def config_of(toy):
    """`config_of(name, key=value, ...)`: a run's configuration over the one prepared cache."""

    def configuration(name, **options):
        plain = {
            "output_dir": str(toy / name),
            "objective": {"name": "dpo", "beta": 20.0},
            "method": "full",
            "optim": {"lr": 3e-3, "schedule": "constant"},
            "max_steps": 40,
            "micro_batch_size": 2,
            "precision": "fp32",
            "checkpoint_every": 20,
            "trackers": [],
        }
        if options.get("method") == "lora":
            targets = list(ToyFamily.lora_targets)
            plain["lora"] = {"rank": 4, "alpha": 8.0, "target_modules": targets}
        raw = {
            "seed": 3,
            "model": {"path": str(toy / "model")},
            "data": {"source": "folder", "path": str(toy / "data")},
            "prepare": {
                "cache_dir": str(toy / "cache"),
                "resolution": 16,
                "store_precision": "fp32",
            },
            "train": plain | options,
        }
        return parse_config(raw)

    return configuration


@pytest.fixture(scope="module")
def cache(config_of):
    return prepare(config_of("unused"), progress=False)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "trainable.safetensors")


def test_the_cache_holds_whatever_the_family_names(cache, config_of):
    cache = PairCache.open(config_of("unused"), verify=True)
    assert cache.family == "toy"
    assert len(cache.latent_shapes) == 2
    batch = cache.read([0, 1], 0)
    assert {name: (t.dtype, t.shape[1:]) for name, t in batch.conditions.items()} == {
        "words": (torch.float32, (WORDS, WIDTH)),
        "word_mask": (torch.bool, (WORDS,)),
        "summary": (torch.float32, (SUMMARY,)),
    }
    assert batch.conditions["word_mask"].all(), "`prompt 0` has more letters than fit"
    assert cache.empty_prompt()["word_mask"].tolist() == [[True] + [False] * (WORDS - 1)]
    encoders = Encoders.load(config_of("unused"), device="cpu")
    for name, tensor in encoders.encode_prompts(["prompt 0", "prompt 1"]).items():
        assert torch.equal(batch.conditions[name], tensor)


def test_the_denoiser_is_told_real_numbers_and_the_ledger_counts_places(cache, config_of):
    config = config_of("unused", sample_latents=False)
    noise = setup_noise(config, ModelFolder.resolve(config.model))
    noised = noise.noised_pair(cache.read([0, 1], 0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma = scheduler.sigmas.flip(0)[noised.index]
    assert noised.index.dtype == torch.int64
    assert torch.equal(noised.timesteps, 1.0 - sigma)
    clean = 0.5 * cache.read([0, 1], 0).latent_mean
    # target = noise - x and noisy = (1 - sigma) x + sigma noise, hence noisy - sigma target = x
    image = noised.noisy_latents - sigma.repeat(2)[:, None, None, None] * noised.target
    torch.testing.assert_close(image, clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_resumes_and_exports(cache, config_of, method, toy):
    options = {
        "method": method,
        "objective": {"name": "sft"},  # of random pairs there is no preference to be learned
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "ema_decay": 0.9,
        "empty_prompt_rate": 0.2,
    }
    whole = train(config_of(f"whole-{method}", **options), progress=False)
    course = losses(whole)
    assert sum(course[-10:]) < 0.9 * sum(course[:10])
    end = weights(whole, 40)
    assert end
    assert all(torch.isfinite(tensor).all() for tensor in end.values())

    train(config_of(f"part-{method}", **options, max_steps=20), progress=False)
    part = train(config_of(f"part-{method}", **options), resume=True, progress=False)
    resumed = weights(part, 40)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in end.items())
    assert losses(part) == course

    lora = config_of("unused", method="lora").train.lora if method == "lora" else None
    for folder in (whole / "final", consolidate(whole, toy / f"again-{method}")):
        assert_export_holds(folder, end, toy / "model", lora)


def assert_export_holds(folder, end, model, lora):
    """The exported model, loaded by diffusers alone, answers as the trained one."""
    trained = ToyTransformer.from_pretrained(model, subfolder="transformer")
    if lora is not None:
        loaded = ToyTransformer.from_pretrained(model, subfolder="transformer")
        loaded.load_lora_adapter(folder, weight_name=LORA_FILE, prefix="transformer")
        add_lora(ToyFamily(), trained, lora)
    else:
        loaded = ToyTransformer.from_pretrained(folder, subfolder="transformer")
    assert trained.load_state_dict(end, strict=False).unexpected_keys == []
    g = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(3, 7, CHANNELS * PATCH**2, generator=g),
        torch.rand(3, generator=g),
        torch.randn(3, WORDS, WIDTH, generator=g),
        torch.ones(3, WORDS, dtype=torch.bool),
        torch.randn(3, SUMMARY, generator=g),
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), trained(*inputs))
        base = ToyTransformer.from_pretrained(model, subfolder="transformer")
        assert not torch.allclose(base(*inputs), trained(*inputs), atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_cached_reference_and_ledger_train_it_too(cache, config_of, method):
    options = {
        "method": method,
        "objective": {"name": "adaptive_dpo"},
        "annotators": {"kind": "ledger"},
        "max_steps": 6,
    }
    live = train(config_of(f"live-{method}", **options), progress=False)
    cached_config = config_of(f"cached-{method}", **options, reference="cached")
    errors = prepare_reference(cached_config, progress=False)
    assert "transformer" in json.loads((errors.folder / "reference.json").read_text())["identity"]
    cached = train(cached_config, progress=False)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-4)
    assert (cached / "minority.csv").read_text().count("\n") == len(cache) + 1


def test_averages_of_adapters_run_in_one_pass(cache, config_of):
    options = {
        "method": "lora",
        "objective": {"name": "adaptive_dpo"},
        "max_steps": 4,
    }
    found = []
    for batched in (True, False):
        ema = {"kind": "ema", "decays": [0.5, 0.9], "warmup_steps": 0, "batched": batched}
        run = train(config_of(f"ema-{batched}", **options, annotators=ema), progress=False)
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_wrong_targets_name_the_familys_own(config_of, cache):
    lora = {"target_modules": ["attn.nothing"]}
    with pytest.raises(ConfigError, match=r"usual for toy: to_q, to_k, to_v, to_out"):
        train(config_of("targets", method="lora", lora=lora), progress=False)


def test_without_its_line_nobody_knows_it(toy, monkeypatch):
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(
        ModelError, match=r"no unet/config\.json .*\(sdxl, sd15, .*ToyPipeline.*transformer/"
    ):
        ModelFolder(toy / "model").family  # noqa: B018
